"""Seeded inputs made from the interface alone, for timing and for checking exact rewrites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from optcompiler.bounds import memory_bytes
from optcompiler.errors import InputError

if TYPE_CHECKING:
    from optcompiler.program import Port


def random_batch(
    ports: Sequence[Port],
    *,
    seed: int = 0,
    dynamic: int = 2,
    bounds: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> dict[str, np.ndarray]:
    """One input per port: floats standard normal, integers in [0, 2), booleans fair.

    Symbolic dimensions take the size `dynamic`, or the nearest within their `bounds`. Integers stay
    small because they are usually indices, masks or lengths. Raises `InputError` for a type that
    has no numpy counterpart.
    """
    rng = np.random.default_rng(seed)
    batch: dict[str, np.ndarray] = {}
    for port in ports:
        if port.kind != "tensor":
            raise InputError(f"input {port}: no example can be made; give one.")
        ends = [bounds.get(str(d), (dynamic, dynamic)) for d in port.shape]
        shape = tuple(
            d if isinstance(d, int) else min(max(dynamic, least), most)
            for d, (least, most) in zip(port.shape, ends, strict=True)
        )
        if min(shape, default=0) < 0 or 8 * prod(shape) > memory_bytes():
            raise InputError(f"input {port}: no memory holds an example; give one.")
        try:
            dtype = ir.DataType[port.dtype].numpy()
        except (KeyError, TypeError) as error:
            raise InputError(
                f"input {port.name!r} of type {port.dtype}: no example can be made; give one."
            ) from error
        if dtype == np.bool_ or np.issubdtype(dtype, np.integer):
            batch[port.name] = rng.integers(0, 2, shape).astype(dtype)
        elif dtype == np.dtype(object) or dtype.kind in "US":
            raise InputError(
                f"input {port.name!r} holds strings: no example can be made; give one."
            )
        else:
            batch[port.name] = rng.standard_normal(shape).astype(dtype)
    return batch
