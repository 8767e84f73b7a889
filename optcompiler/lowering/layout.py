"""Operators that move elements: views where strides can say it, loops where they cannot."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.lowering.build import channels_last, map_views, reshaped
from optcompiler.lowering.core import Lowering, Rule
from optcompiler.lowering.expressions import call, number
from optcompiler.lowering.flatten import site_of
from optcompiler.lowering.ir import Call, Const, Expr, Index, Load, Loop, row_major


def lower_reshape(low: Lowering, node: ir.Node) -> None:
    """Reshape, Flatten, Squeeze and Unsqueeze: another view, or a copy where strides cannot say."""
    source, out = node.inputs[0], node.outputs[0]
    assert source is not None
    shape = low.shape(out)
    expr = reshaped(low.expr(source), shape)
    if expr is None:
        before = low.shape(source)
        view = low.store_plain(low.expr(source), before, row_major(before), node)
        expr = Load(view.dtype, view.reshape(shape) or view)
    low.exprs[out] = expr


def lower_transpose(low: Lowering, node: ir.Node) -> None:
    source, out = node.inputs[0], node.outputs[0]
    assert source is not None
    rank = len(low.shape(out))
    order = tuple(low.flat.attributes(node).get("perm") or range(rank - 1, -1, -1))
    low.exprs[out] = map_views(low.expr(source), lambda v: v.permute(order))


def lower_expand(low: Lowering, node: ir.Node) -> None:
    source, out = node.inputs[0], node.outputs[0]
    assert source is not None
    low.exprs[out] = low.expr(source, low.shape(out))


def lower_slice(low: Lowering, node: ir.Node) -> None:
    source, out = node.inputs[0], node.outputs[0]
    assert source is not None
    shape = low.shape(source)
    starts, ends = (low.array(node.inputs[i]) for i in (1, 2))
    if starts is None or ends is None:
        raise not_constant(node, "starts and ends")
    given = [low.array(v) if v is not None else None for v in node.inputs[3:5]]
    axes = given[0] if given and given[0] is not None else np.arange(starts.size)
    steps = given[1] if len(given) > 1 and given[1] is not None else np.ones(starts.size, np.int64)
    expr = low.expr(source)
    for start, end, axis, step in zip(
        starts.tolist(), ends.tolist(), axes.tolist(), steps.tolist(), strict=True
    ):
        where = axis % len(shape)
        span = range(*slice(start, end, step).indices(shape[where]))
        first, length = (span.start if len(span) else 0), len(span)
        expr = map_views(expr, lambda v, a=where, s=first, n=length, t=step: v.slice(a, s, n, t))
    low.exprs[out] = expr


def lower_split(low: Lowering, node: ir.Node) -> None:
    source = node.inputs[0]
    assert source is not None
    axis = int(low.flat.attributes(node).get("axis", 0)) % len(low.shape(source))
    start = 0
    for out in node.outputs:
        length = low.shape(out)[axis]
        low.exprs[out] = map_views(
            low.expr(source), lambda v, s=start, n=length: v.slice(axis, s, n)
        )
        start += length


def lower_concat(low: Lowering, node: ir.Node) -> None:
    out = node.outputs[0]
    shape = low.shape(out)
    axis = int(low.flat.attributes(node)["axis"]) % len(shape)
    strides = row_major(shape)
    for value in node.inputs:
        assert value is not None
        found = low.strides_like(low.expr(value), low.shape(value))
        if len(shape) == 4 and found == channels_last(low.shape(value)):
            strides = channels_last(shape)
    view = low.destination(out, strides)
    start = 0
    for value in node.inputs:
        assert value is not None
        length = low.shape(value)[axis]
        if length:
            part = view.slice(axis, start, length)
            low.emit(Loop, (node,), out=part, epilogue=low.expr(value))
        start += length
    low.exprs[out] = Load(view.dtype, view)


def lower_pad(low: Lowering, node: ir.Node) -> None:
    source, out = node.inputs[0], node.outputs[0]
    assert source is not None
    attributes = low.flat.attributes(node)
    if attributes.get("mode", "constant") != "constant":
        raise UnsupportedOperatorError(
            f"Pad {site_of(node)!r}: mode {attributes['mode']!r} has no lowered form; use constant."
        )
    pads = low.array(node.inputs[1])
    if pads is None:
        raise not_constant(node, "pads")
    before, shape = low.shape(source), low.shape(out)
    rank = len(shape)
    axes_value = low.array(node.inputs[3]) if len(node.inputs) > 3 else None
    axes = [int(a) % rank for a in axes_value] if axes_value is not None else list(range(rank))
    lead = [0] * rank
    for place, axis in enumerate(axes):
        lead[axis] = int(pads[place])
    fill_value = node.inputs[2] if len(node.inputs) > 2 else None
    view = low.destination(out, low.strides_like(low.expr(source), shape))
    kind = number(0, low.expr(source))
    fill = kind if fill_value is None else low.expr(fill_value, shape)
    low.emit(Loop, (node,), out=view, epilogue=fill)
    expr, inner = low.expr(source), view
    for axis in range(rank):
        crop = max(-lead[axis], 0)
        start = max(lead[axis], 0)
        length = min(before[axis] - crop, shape[axis] - start)
        inner = inner.slice(axis, start, length)
        expr = map_views(expr, lambda v, a=axis, s=crop, n=length: v.slice(a, s, n))
    low.emit(Loop, (node,), out=inner, epilogue=expr)
    low.exprs[out] = Load(view.dtype, view)


def lower_trilu(low: Lowering, node: ir.Node) -> None:
    source, out = node.inputs[0], node.outputs[0]
    assert source is not None
    shape = low.shape(out)
    given = node.inputs[1] if len(node.inputs) > 1 else None
    k: Expr = Const("INT64", 0)
    if given is not None:
        single = reshaped(low.expr(given), ())
        assert single is not None
        k = map_views(single, lambda v: v.broadcast(shape))
    row, column = Index("INT64", len(shape) - 2), Index("INT64", len(shape) - 1)
    edge = Call("INT64", "add", (row, k))
    upper = bool(low.flat.attributes(node).get("upper", 1))
    keep = call("ge" if upper else "le", column, edge)
    expr = low.expr(source)
    view = low.store_plain(
        call("where", keep, expr, number(0, expr)), shape, row_major(shape), node
    )
    low.exprs[out] = Load(view.dtype, view)


def not_constant(node: ir.Node, what: str) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(
        f"{node.op_type} {site_of(node)!r}: {what} computed at run time have no lowered form; "
        f"make them constants."
    )


LAYOUT: Mapping[str, Rule] = {
    "Reshape": lower_reshape, "Flatten": lower_reshape, "Squeeze": lower_reshape,
    "Unsqueeze": lower_reshape, "Transpose": lower_transpose, "Expand": lower_expand,
    "Slice": lower_slice, "Split": lower_split, "Concat": lower_concat, "Pad": lower_pad,
    "Trilu": lower_trilu,
}  # fmt: skip
