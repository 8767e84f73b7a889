"""Operators written as several steps of the kinds there are."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.lowering.build import map_views
from optcompiler.lowering.core import Lowering, Rule
from optcompiler.lowering.covered import repeats_elements
from optcompiler.lowering.expand import Facts
from optcompiler.lowering.expressions import call, cast, is_extreme
from optcompiler.lowering.flatten import site_of
from optcompiler.lowering.ir import (
    Accumulator,
    Const,
    Expr,
    Index,
    Load,
    Loop,
    Normalization,
    Reduction,
    View,
    product,
    row_major,
)
from optcompiler.lowering.reductions import gather


def wrapped(index: Expr, size: int) -> Expr:
    """An index as INT64, a negative one counted from the end."""
    index = cast(index, "INT64")
    below = call("lt", index, Const("INT64", 0))
    return call("where", below, call("add", index, Const("INT64", size)), index)


def lower_gather_elements(low: Lowering, node: ir.Node) -> None:
    data, indices = node.inputs[0], node.inputs[1]
    assert data is not None
    assert indices is not None
    shape = low.shape(data)
    axis = int(low.flat.attributes(node).get("axis", 0)) % len(shape)
    gather_along(
        low, node, low.expr(data), shape, axis, low.expr(indices), low.shape(indices)
    )  # fmt: skip


def gather_along(
    low: Lowering, node: ir.Node, data: Expr, shape: tuple[int, ...], axis: int, indices: Expr,
    space: tuple[int, ...],
) -> None:  # fmt: skip
    """Places in the flattened data, then a gather along its only axis."""
    strides = row_major(shape)
    copy = data.view if isinstance(data, Load) else None
    flat = copy.reshape((product(shape),)) if copy is not None and copy.contiguous else None
    if flat is None:
        copy = low.store_plain(data, shape, strides, node)
        flat = copy.reshape((product(shape),))
    assert flat is not None

    def places() -> View:
        total = call("mul", wrapped(indices, shape[axis]), Const("INT64", strides[axis]))
        for other, stride in enumerate(strides):
            if other != axis and space[other] > 1:
                step = call("mul", Index("INT64", other), Const("INT64", stride))
                total = call("add", total, step)
        return low.store_plain(total, space, row_major(space), node)

    gather(low, node, Load(flat.dtype, flat), flat.shape, 0, None, places)


def lower_arg_extreme(low: Lowering, node: ir.Node) -> None:
    """The extreme of the axis, then the first (or last) index that equals it."""
    x, out = node.inputs[0], node.outputs[0]
    assert x is not None
    attributes = low.flat.attributes(node)
    space = low.shape(x)
    axis = int(attributes.get("axis", 0)) % len(space)
    kept = tuple(1 if i == axis else n for i, n in enumerate(space))
    value = low.expr(x)
    best = View(low.buffer(value.dtype, product(kept)), kept, row_major(kept))
    op = "max" if node.op_type == "ArgMax" else "min"
    low.emit(
        Reduction, (node,), out=best, epilogue=Accumulator(value.dtype), op=op, space=space,
        axes=(axis,), value=value,
    )  # fmt: skip
    last = bool(attributes.get("select_last_index"))
    found = is_extreme(value, Load(value.dtype, best.broadcast(space)))
    missing = Const("INT64", -1 if last else space[axis])
    place = call("where", found, Index("INT64", axis), missing)
    dense = low.destination(out, None)
    view = dense.reshape(kept)
    assert view is not None
    low.emit(
        Reduction, (node,), out=view, epilogue=Accumulator("INT64"), op="max" if last else "min",
        space=space, axes=(axis,), value=place,
    )  # fmt: skip
    low.exprs[out] = Load(dense.dtype, dense)


def lower_instance_norm(low: Lowering, node: ir.Node) -> None:
    x, out = node.inputs[0], node.outputs[0]
    assert x is not None
    shape = low.shape(out)
    wide = (shape[1],) + (1,) * (len(shape) - 2)
    start: Expr = Accumulator("FLOAT")
    for op, operand in zip(("mul", "add"), node.inputs[1:3], strict=True):
        assert operand is not None
        each = map_views(low.expr(operand), lambda v: (v.reshape(wide) or v).broadcast(shape))
        start = call(op, start, cast(each, "FLOAT"))
    start = cast(start, low.flat.dtype(out))
    epsilon = low.flat.attributes(node).get("epsilon")
    value = cast(low.expr(x), "FLOAT")

    def emit(nodes: tuple[ir.Node, ...], last: ir.Value, expr: Expr) -> None:
        view = low.destination(last, None)
        low.emit(
            Normalization, nodes, out=view, epilogue=expr, axis=2, value=value,
            epsilon=1e-5 if epsilon is None else epsilon,
        )  # fmt: skip
        low.exprs[last] = Load(view.dtype, view)

    low.fused(node, start, emit)


def lower_resize(low: Lowering, node: ir.Node) -> None:
    """Enlarging by whole factors, each element repeated; the output as [H, fh, W, fw] blocks."""
    x, out = node.inputs[0], node.outputs[0]
    assert x is not None
    before, shape = low.shape(x), low.shape(out)
    if not repeats_elements(node, Facts(low.flat.shapes, low.flat.constants)):
        raise UnsupportedOperatorError(
            f"Resize {site_of(node)!r}: sizes and scales computed at run time have no lowered "
            f"form; make them constants."
        )
    dense = low.destination(out, low.strides_like(low.expr(x), shape))
    space: list[int] = []
    strides: list[int] = []
    for size, small, stride in zip(shape, before, dense.strides, strict=True):
        space += [small, size // small]
        strides += [stride * (size // small), stride]

    def spread(view: View) -> View:
        inner = [s for stride in view.strides for s in (stride, 0)]
        return View(view.buffer, tuple(space), tuple(inner), view.offset)

    target = View(dense.buffer, tuple(space), tuple(strides), dense.offset)
    low.emit(Loop, (node,), out=target, epilogue=map_views(low.expr(x), spread))
    low.exprs[out] = Load(dense.dtype, dense)


def lower_tile(low: Lowering, node: ir.Node) -> None:
    """The output as [repeats, size] blocks of every axis."""
    x, out = node.inputs[0], node.outputs[0]
    assert x is not None
    repeats = [n // max(m, 1) for n, m in zip(low.shape(out), low.shape(x), strict=True)]
    dense = low.destination(out, None)
    space: list[int] = []
    strides: list[int] = []
    for size, times, stride in zip(low.shape(x), repeats, dense.strides, strict=True):
        space += [times, size]
        strides += [stride * size, stride]

    def spread(view: View) -> View:
        inner = [s for stride in view.strides for s in (0, stride)]
        return View(view.buffer, tuple(space), tuple(inner), view.offset)

    target = View(dense.buffer, tuple(space), tuple(strides), dense.offset)
    low.emit(Loop, (node,), out=target, epilogue=map_views(low.expr(x), spread))
    low.exprs[out] = Load(dense.dtype, dense)


COMPOSITES: Mapping[str, Rule] = {
    "GatherElements": lower_gather_elements, "ArgMax": lower_arg_extreme,
    "ArgMin": lower_arg_extreme, "InstanceNormalization": lower_instance_norm,
    "Resize": lower_resize, "Tile": lower_tile,
}  # fmt: skip
