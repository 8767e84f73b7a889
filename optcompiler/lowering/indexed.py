"""Writing at computed places, and the places of the largest elements."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.lowering.build import map_views, reshaped
from optcompiler.lowering.composites import gather_along, wrapped
from optcompiler.lowering.core import Lowering, Rule
from optcompiler.lowering.expressions import SMALL, call, cast
from optcompiler.lowering.flatten import site_of
from optcompiler.lowering.ir import (
    Accumulator,
    Const,
    Expr,
    Index,
    Load,
    Loop,
    Scatter,
    TopK,
    View,
    row_major,
)
from optcompiler.lowering.layout import not_constant


def _base(low: Lowering, node: ir.Node) -> View:
    """The output, filled with what is scattered into."""
    out = node.outputs[0]
    assert node.inputs[0] is not None
    view = low.destination(out, row_major(low.shape(out)))
    low.emit(Loop, (node,), out=view, epilogue=low.expr(node.inputs[0]))
    low.exprs[out] = Load(view.dtype, view)
    return view


def _write(
    low: Lowering, node: ir.Node, out: View, space: tuple[int, ...], place: Expr, value: Expr
) -> None:
    op = str(low.flat.attributes(node).get("reduction") or "none")
    start: Expr = Accumulator("FLOAT" if out.dtype in SMALL else out.dtype)
    low.emit(
        Scatter, (node,), out=out, epilogue=cast(start, out.dtype), op=op, space=space,
        place=place, value=cast(value, start.dtype),
    )  # fmt: skip


def lower_scatter_elements(low: Lowering, node: ir.Node) -> None:
    data, indices, updates = node.inputs[:3]
    assert data is not None
    assert indices is not None
    assert updates is not None
    shape, space = low.shape(data), low.shape(indices)
    axis = int(low.flat.attributes(node).get("axis") or 0) % len(shape)
    out = _base(low, node)
    place = call("mul", wrapped(low.expr(indices), shape[axis]), Const("INT64", out.strides[axis]))
    for other, stride in enumerate(out.strides):
        if other != axis and space[other] > 1:
            step = call("mul", Index("INT64", other), Const("INT64", stride))
            place = call("add", place, step)
    value = low.expr(updates)
    if low.shape(updates) != space:
        for other, size in enumerate(space):
            value = map_views(value, lambda v, a=other, n=size: v.slice(a, 0, n))
    _write(low, node, out, space, place, value)


def lower_scatter_nd(low: Lowering, node: ir.Node) -> None:
    data, indices, updates = node.inputs[:3]
    assert data is not None
    assert indices is not None
    assert updates is not None
    shape, places = low.shape(data), low.shape(indices)
    depth, rank = places[-1], len(places) - 1
    space = (*places[:-1], *shape[depth:])
    out = _base(low, node)
    place: Expr = Const("INT64", 0)
    for part in range(depth):
        piece = map_views(low.expr(indices), lambda v, p=part: v.slice(rank, p, 1))
        one = reshaped(piece, (*places[:-1], *(1,) * (len(shape) - depth)))
        if one is None:
            raise not_constant(node, "indices of this layout")
        one = wrapped(map_views(one, lambda v: v.broadcast(space)), shape[part])
        place = call("add", place, call("mul", one, Const("INT64", out.strides[part])))
    for axis in range(depth, len(shape)):
        step = call("mul", Index("INT64", rank + axis - depth), Const("INT64", out.strides[axis]))
        place = call("add", place, step)
    _write(low, node, out, space, place, low.expr(updates))


def lower_top_k(low: Lowering, node: ir.Node) -> None:
    x, (values, indices) = node.inputs[0], node.outputs
    assert x is not None
    attributes, shape = low.flat.attributes(node), low.shape(x)
    axis = int(attributes.get("axis", -1)) % len(shape)
    count = low.shape(values)[axis]
    if count > shape[axis]:
        raise UnsupportedOperatorError(
            f"TopK {site_of(node)!r}: {count} of {shape[axis]} elements were asked for."
        )
    value = low.expr(x)
    dense = low.destination(indices, row_major(low.shape(indices)))
    low.emit(
        TopK, (node,), out=dense, epilogue=Accumulator("INT64"), space=shape, axis=axis,
        value=cast(value, "FLOAT") if value.dtype in SMALL else value,
        largest=bool(attributes.get("largest", 1)),
    )  # fmt: skip
    low.exprs[indices] = Load("INT64", dense)
    gather_along(low, node, value, shape, axis, low.exprs[indices], low.shape(indices))


INDEXED: Mapping[str, Rule] = {
    "ScatterElements": lower_scatter_elements, "Scatter": lower_scatter_elements,
    "ScatterND": lower_scatter_nd, "TopK": lower_top_k,
}  # fmt: skip
