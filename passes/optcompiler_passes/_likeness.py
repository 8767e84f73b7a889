"""Which values of a student its teacher has too."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from optcompiler.program import Program, shape_of


def likeness(teacher: Program) -> Callable[[ir.Value], bool]:
    """Whether the teacher has a value of this name, type and shape.

    Sizes that are not fixed count as equal: shape inference names those that it cannot express in
    the inputs' sizes anew in every program.
    """
    known = {str(v.name): v for n in teacher.graph for v in n.outputs if v.name}

    def sizes(value: ir.Value) -> list[int | None] | None:
        if value.shape is None:
            return None
        return [d if isinstance(d, int) else None for d in shape_of(value)]

    def like(value: ir.Value) -> bool:
        other = known.get(str(value.name))
        if other is None or other.dtype != value.dtype:
            return False
        return sizes(other) is not None and sizes(other) == sizes(value)

    return like
