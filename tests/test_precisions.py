"""Precisions by name: one spelling for all ways to give several, and only what the target has."""

from __future__ import annotations

from typing import Any

import pytest

from optcompiler.backend import Capabilities
from optcompiler.errors import InputError
from optcompiler.precisions import allowed_precisions, spelled
from optcompiler.target import Target


@pytest.mark.parametrize("several", [{"int8", "w4a4"}, "w4a4, int8", ("w4a4", "int8", "int8")])
def test_several_precisions_in_one_spelling(several: Any) -> None:
    assert spelled(several) == "int8,w4a4"
    known = Capabilities(frozenset({"fp32", "int8", "bf16"}), emulated=frozenset({"w4a4"}))
    target = Target("toy")
    assert allowed_precisions("int8,w4a4", known, target) == {"fp32", "int8", "w4a4"}
    assert allowed_precisions("auto,w4a4", known, target) == {"fp32", "int8", "bf16", "w4a4"}
    assert allowed_precisions("auto", known, target) == {"fp32", "int8", "bf16"}
    with pytest.raises(InputError, match=r"no precision 'fp9'; it has bf16, fp32, int8, w4a4"):
        allowed_precisions("fp9,int8", known, target)


def test_no_precision_at_all() -> None:
    for nothing in ("", " , ", ()):
        with pytest.raises(InputError, match="names none"):
            spelled(nothing)
