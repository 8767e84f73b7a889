"""Emission of reductions, for every operator that is one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optcompiler.lowering.build import reshaped, rewrite
from optcompiler.lowering.core import Lowering
from optcompiler.lowering.expressions import REAL
from optcompiler.lowering.ir import Accumulator, Expr, Load, Loop, Reduction, View, row_major


def lowest(dtype: str) -> float:
    """The least number of an element type."""
    if dtype in REAL:
        return -np.inf
    if dtype == "BOOL":
        return 0
    return int(np.iinfo(ir.DataType[dtype].numpy()).min)


def reduction_step(
    low: Lowering,
    node: ir.Node,
    out: View,
    epilogue: Expr,
    op: str,
    space: tuple[int, ...],
    axes: tuple[int, ...],
    value: Expr,
    nodes: tuple[ir.Node, ...] = (),
) -> None:
    low.emit(
        Reduction, nodes or (node,), out=out, epilogue=epilogue, op=op, space=space, axes=axes,
        value=value,
    )  # fmt: skip


def emit_reduction(
    low: Lowering,
    node: ir.Node,
    start: Expr,
    op: str,
    space: tuple[int, ...],
    axes: tuple[int, ...],
    value: Expr,
) -> None:
    """Reduce `value` over `axes` of its space into the node's first output, what follows fused.

    The output has the space's other elements in order. `start` is its element in terms of the
    accumulator.
    """
    if not space:  # a scalar: one axis, so that there is one to loop over
        single = reshaped(value, (1,))
        assert single is not None
        space, value = (1,), single
    kept = tuple(1 if i in axes else n for i, n in enumerate(space))
    shape = low.shape(node.outputs[0])

    def emit(nodes: tuple[ir.Node, ...], last: ir.Value, expr: Expr) -> None:
        dense = low.destination(last, None)
        view, epilogue = dense.reshape(kept), reshaped(expr, kept)
        if view is None or epilogue is None:
            work = value.dtype
            buffer = low.buffer(work, dense.elements)
            view = View(buffer, kept, row_major(kept))
            reduction_step(low, node, view, Accumulator(work), op, space, axes, value)
            plain = Load(work, View(buffer, shape, row_major(shape)))
            after = rewrite(expr, lambda e: plain if isinstance(e, Accumulator) else e)
            low.emit(Loop, nodes, out=dense, epilogue=after)
        else:
            reduction_step(low, node, view, epilogue, op, space, axes, value, nodes)
        low.exprs[last] = Load(dense.dtype, dense)

    low.fused(node, start, emit)
