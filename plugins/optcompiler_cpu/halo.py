"""Borders of images in memory: a step of this backend's own."""

from __future__ import annotations

from dataclasses import dataclass

from optcompiler.lowering.extents import c_long
from optcompiler.lowering.ir import Const, Step
from optcompiler_cpu.code import KernelCode, Pointers
from optcompiler_cpu.isa import Isa
from optcompiler_cpu.loops import function
from optcompiler_cpu.scalars import stored_type


@dataclass(frozen=True, eq=False, kw_only=True)
class Halo(Step):
    """Fills the border of `out`, [N, C, H, W] channels-last, with the epilogue's constant."""

    pads: tuple[int, int, int, int]


def print_halo(step: Halo, isa: Isa) -> KernelCode:
    """Rows above and below in one run each, and the two sides of every row."""
    n, c, h, w = step.out.shape
    top, left, bottom, right = step.pads
    pointers = Pointers()
    out = pointers.view(step.out, written=True)
    ctype = stored_type(step.out.dtype)
    assert isinstance(step.epilogue, Const)
    params = pointers.params
    value = f"({ctype}){params.add(float(step.epilogue.value))}"
    row = w * c
    runs = [
        (f"{out} + i * {c_long(h * row)}", top * row),
        (f"{out} + i * {c_long(h * row)} + {c_long((h - bottom) * row)}", bottom * row),
    ]
    sides = [
        (f"{out} + (i * {h} + y) * {c_long(row)}", left * c),
        (f"{out} + (i * {h} + y) * {c_long(row)} + {c_long((w - right) * c)}", right * c),
    ]

    def fill(at: str, count: int) -> list[str]:
        if not count:
            return []
        return [
            "{",
            f"  {ctype} *o = {at};",
            f"  for (long k = 0; k < {count}; ++k) o[k] = value;",
            "}",
        ]

    lines = [
        f"const {ctype} value = {value};",
        f"for (long i = 0; i < {n}; ++i) {{",
        *(f"  {x}" for run in runs for x in fill(*run)),
        f"  for (long y = {top}; y < {h - bottom}; ++y) {{",
        *(f"    {x}" for side in sides for x in fill(*side)),
        "  }",
        "}",
    ]
    return function(pointers, lines, False)
