"""Convolution and pooling of any rank and type, as reductions over strided windows.

Slower than the steps `Conv` and `Pooling`, which take what they can.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from optcompiler.lowering.build import map_views, reshaped
from optcompiler.lowering.core import Lowering
from optcompiler.lowering.expressions import SMALL, call, cast, is_extreme, number
from optcompiler.lowering.ir import (
    Accumulator,
    Const,
    Expr,
    Index,
    Load,
    Loop,
    View,
    product,
    row_major,
)
from optcompiler.lowering.reduce import emit_reduction, lowest, reduction_step

Shape = tuple[int, ...]
NOWHERE = Const("INT64", (1 << 63) - 1)


def window_pads(
    attributes: Mapping[str, object],
    size: Shape,
    kernel: Shape,
    strides: Shape,
    dilations: Shape,
) -> Shape:
    """Padding as (begin..., end...), `auto_pad` resolved."""
    rank = len(kernel)
    mode = attributes.get("auto_pad") or "NOTSET"
    if mode == "NOTSET":
        given = attributes.get("pads")
        return tuple(given) if given else (0,) * (2 * rank)  # type: ignore[arg-type]
    if mode == "VALID":
        return (0,) * (2 * rank)
    begin, end = [0] * rank, [0] * rank
    for i in range(rank):
        steps = -(-size[i] // strides[i])
        total = max((steps - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 - size[i], 0)
        begin[i] = total // 2 if mode == "SAME_UPPER" else total - total // 2
        end[i] = total - begin[i]
    return (*begin, *end)


class Windows:
    """The geometry of a sliding window over [N, C, *spatial]."""

    def __init__(
        self, attributes: Mapping[str, Any], size: Shape, kernel: Shape, out: Shape
    ) -> None:
        rank = len(kernel)
        self.size, self.kernel, self.out = size, kernel, out
        self.strides: Shape = tuple(attributes.get("strides") or (1,) * rank)
        self.dilations: Shape = tuple(attributes.get("dilations") or (1,) * rank)
        pads = window_pads(attributes, size, kernel, self.strides, self.dilations)
        self.begin, self.end = pads[:rank], pads[rank:]

    def padded(self) -> Shape:
        """Extent of the input with all that a window reaches."""
        return tuple(
            max((o - 1) * s + (k - 1) * d + 1, b + n)
            for o, s, k, d, b, n in zip(
                self.out, self.strides, self.kernel, self.dilations, self.begin, self.size,
                strict=True,
            )
        )  # fmt: skip

    def source(self, low: Lowering, node: ir.Node, x: Expr, lead: Shape, fill: float) -> View:
        """`x` of [*lead, *spatial] as [*lead, *out, *kernel], `fill` outside."""
        shape = (*lead, *self.size)
        wide = (*lead, *self.padded())
        rank, first = len(self.kernel), len(lead)
        if isinstance(x, Load) and wide == shape:
            view = x.view
        else:
            view = View(low.buffer(x.dtype, product(wide)), wide, row_major(wide))
            inner = view
            if wide != shape:
                low.emit(Loop, (node,), out=view, epilogue=number(fill, x))
                for axis in range(rank):
                    inner = inner.slice(first + axis, self.begin[axis], self.size[axis])
            low.emit(Loop, (node,), out=inner, epilogue=x)
        steps = view.strides[first:]
        return View(
            view.buffer,
            (*lead, *self.out, *self.kernel),
            (
                *view.strides[:first],
                *(s * t for s, t in zip(steps, self.strides, strict=True)),
                *(s * d for s, d in zip(steps, self.dilations, strict=True)),
            ),
            view.offset,
        )

    def inside(self, padding: bool) -> np.ndarray:
        """How many elements of each window count, [*out]; padded ones too with `padding`."""
        total = np.ones((), np.float32)
        for o, s, k, d, b, e, n in zip(
            self.out, self.strides, self.kernel, self.dilations, self.begin, self.end, self.size,
            strict=True,
        ):  # fmt: skip
            at = np.arange(o)[:, None] * s - b + np.arange(k) * d
            low, high = (-b, n + e) if padding else (0, n)
            count = ((at >= low) & (at < high)).sum(1).astype(np.float32)
            total = total[..., None] * count
        return total


def convolve(low: Lowering, node: ir.Node) -> None:
    """Conv by its definition: a sum of products over a window of every channel of a group."""
    x, w, out = node.inputs[0], node.inputs[1], node.outputs[0]
    assert x is not None
    assert w is not None
    attributes = low.flat.attributes(node)
    shape, weights = low.shape(out), low.shape(w)
    groups = int(attributes.get("group") or 1)
    n, channels = low.shape(x)[:2]
    rank = len(shape) - 2
    windows = Windows(attributes, low.shape(x)[2:], weights[2:], shape[2:])
    dtype = low.flat.dtype(out)
    work = "FLOAT" if dtype in SMALL else dtype
    each, depth = weights[0] // groups, weights[1]
    space = (n, groups, each, *shape[2:], depth, *weights[2:])
    source = windows.source(low, node, cast(low.expr(x), work), (n, channels), 0)
    split = source.reshape((n, groups, depth, *source.shape[2:]))
    if split is None:
        split = View(
            source.buffer, (n, groups, depth, *source.shape[2:]),
            (source.strides[0], source.strides[1] * depth, *source.strides[1:]), source.offset,
        )  # fmt: skip
    order = (0, 1, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))
    moved = split.permute(order)
    left = View(
        moved.buffer, space, (*moved.strides[:2], 0, *moved.strides[2:]), moved.offset
    )  # fmt: skip
    factor = map_views(
        cast(low.expr(w), work),
        lambda v: View(
            v.buffer, space,
            (0, v.strides[0] * each, v.strides[0], *(0,) * rank, *v.strides[1:]), v.offset,
        ),
    )  # fmt: skip
    start: Expr = Accumulator(work)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = reshaped(low.expr(node.inputs[2]), (1, shape[1], *(1,) * rank))
        assert bias is not None
        start = call("add", start, cast(map_views(bias, lambda v: v.broadcast(shape)), work))
    axes = tuple(range(3 + rank, len(space)))
    value = call("mul", Load(work, left), factor)
    emit_reduction(low, node, cast(start, dtype), "sum", space, axes, value)


def pool(low: Lowering, node: ir.Node) -> None:
    """MaxPool (with indices), AveragePool and LpPool by their definitions."""
    x, out = node.inputs[0], node.outputs[0]
    assert x is not None
    attributes = low.flat.attributes(node)
    shape = low.shape(out)
    rank = len(shape) - 2
    windows = Windows(attributes, low.shape(x)[2:], tuple(attributes["kernel_shape"]), shape[2:])
    dtype = low.flat.dtype(out)
    work = "FLOAT" if dtype in SMALL else dtype
    x_expr = cast(low.expr(x), work)
    start: Expr = Accumulator(work)
    largest = node.op_type == "MaxPool"
    fill = lowest(work) if largest else 0
    source = windows.source(low, node, x_expr, shape[:2], fill)
    value: Expr = Load(work, source)
    if node.op_type == "AveragePool":
        count = windows.inside(bool(attributes.get("count_include_pad")))
        divisor = low.constant(count.astype(np.float64 if work == "DOUBLE" else np.float32))
        start = call("div", start, Load(divisor.dtype, divisor.broadcast(shape)))
    elif node.op_type == "LpPool":
        p = attributes.get("p") or 2
        value = call("pow", call("abs", value), number(p, value))
        start = call("pow", start, number(1 / p, start))
    axes = tuple(range(2 + rank, 2 + 2 * rank))
    indices = node.outputs[1] if len(node.outputs) > 1 else None
    wanted = indices is not None and (indices.uses() or indices.is_graph_output())
    space = source.shape
    if indices is None or not wanted:
        op = "max" if largest else "sum"
        emit_reduction(low, node, cast(start, dtype), op, space, axes, value)
        return
    best = low.destination(out, row_major(shape))
    kept = (*shape, *(1,) * rank)
    tall = best.reshape(kept)
    assert tall is not None
    reduction_step(low, node, tall, cast(start, dtype), "max", space, axes, value)
    low.exprs[out] = Load(dtype, best)
    found = is_extreme(value, cast(Load(dtype, tall.broadcast(space)), work))
    place = call("where", found, _place(windows, shape, attributes), NOWHERE)
    where = low.destination(indices, row_major(shape))
    tall = where.reshape(kept)
    assert tall is not None
    reduction_step(low, node, tall, Accumulator("INT64"), "min", space, axes, place)
    low.exprs[indices] = Load("INT64", where)


def _place(windows: Windows, shape: Shape, attributes: Mapping[str, Any]) -> Expr:
    """The place of a window's element in the flattened input, INT64."""
    rank = len(windows.size)
    order = range(rank) if attributes.get("storage_order") else range(rank - 1, -1, -1)
    steps = [0] * rank
    step = 1
    for axis in order:
        steps[axis] = step
        step *= windows.size[axis]
    total = _times(Index("INT64", 0), shape[1] * step)
    total = call("add", total, _times(Index("INT64", 1), step))
    for axis in range(rank):
        at = _times(Index("INT64", 2 + axis), windows.strides[axis])
        at = call("add", at, _times(Index("INT64", 2 + rank + axis), windows.dilations[axis]))
        at = call("sub", at, Const("INT64", windows.begin[axis]))
        total = call("add", total, _times(at, steps[axis]))
    return total


def _times(index: Expr, factor: int) -> Expr:
    return call("mul", index, Const("INT64", factor))
