from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from optcompiler.batching import Batched


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_any_number_of_samples(make: Any, count: int) -> None:
    sizes = []

    def call(x: Any, *, scale: Any) -> dict[str, Any]:
        sizes.append(x.shape[0])
        return {"double": x * 2, "pair": (x + 1, [x * scale])}

    x = make(np.arange(count * 2, dtype=np.float32).reshape(count, 2))
    got = Batched(call, 3)(x, scale=3)
    assert set(sizes) == {3}
    np.testing.assert_array_equal(got["double"], x * 2)
    np.testing.assert_array_equal(got["pair"][0], x + 1)
    np.testing.assert_array_equal(got["pair"][1][0], x * 3)


def test_pieces_between_bounds_are_not_filled_up() -> None:
    sizes = []

    def call(x: Any) -> Any:
        sizes.append(len(x))
        return x * 2

    for count in (1, 2, 3, 5, 7):
        x = np.arange(count, dtype=np.float32)
        np.testing.assert_array_equal(Batched(call, 3, 2)(x), x * 2)
    assert sizes == [2, 2, 3, 3, 2, 3, 3, 2]
