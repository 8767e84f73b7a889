"""Reductions, softmax, normalisation, pooling, gathering and running sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.lowering.build import (
    channels_last,
    evaluate_constant,
    is_channels_last,
    map_views,
    reshaped,
)
from optcompiler.lowering.contractions import quantised
from optcompiler.lowering.core import Lowering, Rule
from optcompiler.lowering.expressions import SMALL, call, cast, number
from optcompiler.lowering.flatten import site_of
from optcompiler.lowering.ir import (
    Accumulator,
    CumSum,
    Dequantize,
    Expr,
    Gather,
    Load,
    Normalization,
    Pooling,
    Quantization,
    Softmax,
    View,
    product,
    row_major,
)
from optcompiler.lowering.layout import not_constant
from optcompiler.lowering.reduce import emit_reduction
from optcompiler.lowering.windows import pool, window_pads

REDUCE = {
    "ReduceSum": "sum", "ReduceMean": "mean", "ReduceMax": "max", "ReduceMin": "min",
    "ReduceProd": "prod", "ReduceSumSquare": "sumsq", "ReduceL2": "sumsq",
}  # fmt: skip


def lower_reduce(low: Lowering, node: ir.Node) -> None:
    x, out = node.inputs[0], node.outputs[0]
    assert x is not None
    attributes = low.flat.attributes(node)
    space = low.shape(x)
    given = attributes.get("axes")
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        array = low.array(node.inputs[1])
        given = _declared_axes(low, node) if array is None else array.tolist()
    if not given and attributes.get("noop_with_empty_axes"):
        # nothing is summed, but each element is still squared
        value = low.expr(x)
        if REDUCE[node.op_type] == "sumsq":
            value = call("abs", value) if node.op_type == "ReduceL2" else call("mul", value, value)
        low.exprs[out] = value
        return
    axes = tuple(sorted(int(a) % len(space) for a in given)) if given else tuple(range(len(space)))
    if any(a not in range(-len(space), len(space)) for a in given or ()):
        raise UnsupportedOperatorError(
            f"{node.op_type} {site_of(node)!r}: axes {given} of a tensor of rank {len(space)}."
        )
    reduce(low, node, REDUCE[node.op_type], axes)


def _declared_axes(low: Lowering, node: ir.Node) -> list[int]:
    """Axes known only when it runs, from the shape that the model gives the output."""
    assert node.inputs[0] is not None
    space, shape = low.shape(node.inputs[0]), low.shape(node.outputs[0])
    axes = [i for i, (n, m) in enumerate(zip(space, shape, strict=False)) if n != m]
    if len(space) != len(shape) or low.flat.attributes(node).get("noop_with_empty_axes"):
        raise not_constant(node, "axes")
    return axes or [i for i, n in enumerate(space) if n == 1]


def reduce(low: Lowering, node: ir.Node, op: str, axes: tuple[int, ...]) -> None:
    x = node.inputs[0]
    assert x is not None
    dtype = low.flat.dtype(node.outputs[0])
    value = low.expr(x)
    if dtype in SMALL:
        value = cast(value, "FLOAT")
    start: Expr = Accumulator(value.dtype)
    if node.op_type == "ReduceL2":
        start = call("sqrt", start)
    emit_reduction(low, node, cast(start, dtype), op, low.shape(x), axes, value)


def lower_global_pool(low: Lowering, node: ir.Node) -> None:
    assert node.inputs[0] is not None
    axes = tuple(range(2, len(low.shape(node.inputs[0]))))
    reduce(low, node, "mean" if node.op_type == "GlobalAveragePool" else "max", axes)


def lower_softmax(low: Lowering, node: ir.Node) -> None:
    x, out = node.inputs[0], node.outputs[0]
    assert x is not None
    dtype = low.flat.dtype(out)
    value = cast(low.expr(x), "FLOAT")
    axis = low.flat.attributes(node).get("axis", -1) % len(low.shape(out))
    log = node.op_type == "LogSoftmax"

    def emit(nodes: tuple[ir.Node, ...], last: ir.Value, expr: Expr) -> None:
        view = low.destination(last, None)
        low.emit(Softmax, nodes, out=view, epilogue=expr, axis=axis, value=value, log=log)
        low.exprs[last] = Load(view.dtype, view)

    low.fused(node, cast(Accumulator("FLOAT"), dtype), emit)


def lower_normalization(low: Lowering, node: ir.Node) -> None:
    x, out = node.inputs[0], node.outputs[0]
    assert x is not None
    attributes = low.flat.attributes(node)
    shape = low.shape(out)
    axis = attributes.get("axis", -1) % len(shape)
    epsilon = attributes.get("epsilon")
    start: Expr = Accumulator("FLOAT")
    for op, operand in zip(("mul", "add"), node.inputs[1:3], strict=False):
        if operand is not None:
            start = call(op, start, cast(low.expr(operand, shape), "FLOAT"))
    start = cast(start, low.flat.dtype(out))
    value, rms = cast(low.expr(x), "FLOAT"), node.op_type == "RMSNormalization"

    def emit(nodes: tuple[ir.Node, ...], last: ir.Value, expr: Expr) -> None:
        view = low.destination(last, None)
        low.emit(
            Normalization, nodes, out=view, epilogue=expr, axis=axis, value=value,
            epsilon=1e-5 if epsilon is None else epsilon, rms=rms,
        )  # fmt: skip
        low.exprs[last] = Load(view.dtype, view)

    low.fused(node, start, emit)


def lower_pool(low: Lowering, node: ir.Node) -> None:
    x, out = node.inputs[0], node.outputs[0]
    assert x is not None
    attributes = low.flat.attributes(node)
    shape = low.shape(out)
    rank = len(shape) - 2
    indices = any(v.uses() or v.is_graph_output() for v in node.outputs[1:])
    narrow = {"UINT8", "INT8"} | low.narrow
    kinds = {"FLOAT"} if node.op_type == "AveragePool" else {"FLOAT"} | narrow
    if node.op_type == "LpPool" or rank not in (1, 2) or indices or x.dtype is None or (
        x.dtype.name not in kinds
    ):  # fmt: skip
        pool(low, node)
        return
    kernel = tuple(attributes["kernel_shape"])
    strides = tuple(attributes.get("strides") or (1,) * rank)
    dilations = tuple(attributes.get("dilations") or (1,) * rank)
    pads = window_pads(attributes, low.shape(x)[2:], kernel, strides, dilations)
    operand = quantised(low.expr(x), None)
    mean = node.op_type == "AveragePool"
    quantization: Quantization | None = None
    start: Expr
    if operand is not None:
        source, quantization = operand.view, operand.quantization
        start = Accumulator("FLOAT" if mean else source.dtype)
        if not mean:
            start = replace_leaf(low.expr(x), start)
    else:
        source = low.view(x, node)
        start = Accumulator("FLOAT" if mean else source.dtype)
    if rank == 1:
        source = source.reshape((*source.shape[:2], 1, source.shape[2])) or source
        kernel, strides, dilations = (1, *kernel), (1, *strides), (1, *dilations)
        pads = (0, pads[0], 0, pads[1])
    wide = shape if rank == 2 else (*shape[:2], 1, shape[2])

    def emit(nodes: tuple[ir.Node, ...], last: ir.Value, expr: Expr) -> None:
        flows = rank == 2 and source.shape[1] > 1 and is_channels_last(source)
        dense = low.destination(last, channels_last(shape) if flows else None)
        view, epilogue = (dense, expr) if rank == 2 else (dense.reshape(wide), reshaped(expr, wide))
        assert view is not None
        assert epilogue is not None
        low.emit(
            Pooling, nodes, out=view, epilogue=epilogue, op="mean" if mean else "max",
            source=source, kernel=kernel, strides=strides, pads=pads, dilations=dilations,
            count_padding=bool(attributes.get("count_include_pad")),
            quantization=quantization if mean else None,
        )  # fmt: skip
        low.exprs[last] = Load(dense.dtype, dense)

    low.fused(node, start, emit)


def replace_leaf(dequantize: Expr, leaf: Expr) -> Expr:
    """A dequantisation with its integer replaced: maxima commute with it."""
    assert isinstance(dequantize, Dequantize)
    return replace(dequantize, arg=leaf)


def lower_gather(low: Lowering, node: ir.Node) -> None:
    data, indices = node.inputs[0], node.inputs[1]
    assert data is not None
    assert indices is not None
    axis = low.flat.attributes(node).get("axis", 0) % len(low.shape(data))
    known = low.array(indices)
    gather(low, node, low.expr(data), low.shape(data), axis, known, lambda: low.view(indices, node))


def lower_gather_nd(low: Lowering, node: ir.Node) -> None:
    """The indexed axes as one, and one index into it."""
    data, indices = node.inputs[0], node.inputs[1]
    assert data is not None
    assert indices is not None
    if low.flat.attributes(node).get("batch_dims"):
        raise UnsupportedOperatorError(
            f"GatherND {site_of(node)!r}: batch_dims other than 0 have no lowered form."
        )
    shape, places = low.shape(data), low.shape(indices)
    depth = places[-1]
    inner = row_major(shape[:depth])
    flat = (product(shape[:depth]), *shape[depth:])
    source = reshaped(low.expr(data), flat)
    if source is None:
        copy = low.store_plain(low.expr(data), shape, row_major(shape), node)
        source = Load(copy.dtype, copy.reshape(flat) or copy)
    known = low.array(indices)
    if known is not None:
        wrapped = known % np.array(shape[:depth])
        known = np.ascontiguousarray((wrapped * np.array(inner)).sum(axis=-1))

    def index() -> View:
        total: Expr | None = None
        for part in range(depth):
            piece = map_views(low.expr(indices), lambda v, p=part: v.slice(len(places) - 1, p, 1))
            one = reshaped(piece, places[:-1])
            if one is None:
                raise not_constant(node, "indices of this layout")
            low_end = call("lt", one, number(0, one))
            one = call("where", low_end, call("add", one, number(shape[part], one)), one)
            term = call("mul", one, number(inner[part], one))
            total = term if total is None else call("add", total, term)
        assert total is not None
        return low.store_plain(total, places[:-1], row_major(places[:-1]), node)

    gather(low, node, source, flat, 0, known, index)


def gather(
    low: Lowering,
    node: ir.Node,
    data: Expr,
    shape: tuple[int, ...],
    axis: int,
    known: np.ndarray | None,
    index: Callable[[], View],
) -> None:
    """A view where the indices are evenly spaced constants, else a step."""
    out = node.outputs[0]
    if known is not None:
        span = _arithmetic(known.reshape(-1) % shape[axis])
        if span is not None:
            expr = map_views(data, lambda v: v.slice(axis, *span))
            final = reshaped(expr, low.shape(out))
            if final is not None:
                low.exprs[out] = final
                return
    constant = evaluate_constant(data, shape)
    if constant is not None and not isinstance(data, Load):
        source = low.constant(constant)
    elif isinstance(data, Load):
        source = data.view
    else:
        source = low.store_plain(data, shape, row_major(shape), node)
    where = low.constant(known) if known is not None else index()

    def emit(nodes: tuple[ir.Node, ...], last: ir.Value, expr: Expr) -> None:
        view = low.destination(last, None)
        low.emit(Gather, nodes, out=view, epilogue=expr, data=source, indices=where, axis=axis)
        low.exprs[last] = Load(view.dtype, view)

    low.fused(node, Accumulator(source.dtype), emit)


def _arithmetic(indices: np.ndarray) -> tuple[int, int, int] | None:
    """(start, count, step) of an arithmetic sequence, else None."""
    if indices.size == 0:
        return None
    if indices.size == 1:
        return int(indices[0]), 1, 1
    steps = np.diff(indices)
    if (steps != steps[0]).any() or steps[0] == 0:
        return None
    return int(indices[0]), indices.size, int(steps[0])


def lower_cumsum(low: Lowering, node: ir.Node) -> None:
    x, out = node.inputs[0], node.outputs[0]
    assert x is not None
    array = low.array(node.inputs[1])
    if array is None and len(low.shape(out)) > 1:
        raise not_constant(node, "axis")
    axis = 0 if array is None else int(array.reshape(-1)[0]) % len(low.shape(out))
    attributes, value = low.flat.attributes(node), low.expr(x)
    dtype = value.dtype
    if dtype in SMALL:
        value = cast(value, "FLOAT")

    def emit(nodes: tuple[ir.Node, ...], last: ir.Value, expr: Expr) -> None:
        view = low.destination(last, None)
        low.emit(
            CumSum, nodes, out=view, epilogue=expr, axis=axis, value=value,
            exclusive=bool(attributes.get("exclusive")), reverse=bool(attributes.get("reverse")),
            op="prod" if node.op_type == "CumProd" else "sum",
        )  # fmt: skip
        low.exprs[last] = Load(view.dtype, view)

    low.fused(node, cast(Accumulator(value.dtype), dtype), emit)


REDUCTIONS: Mapping[str, Rule] = {
    **dict.fromkeys(REDUCE, lower_reduce),
    "GlobalAveragePool": lower_global_pool, "GlobalMaxPool": lower_global_pool,
    "Softmax": lower_softmax, "LogSoftmax": lower_softmax,
    "LayerNormalization": lower_normalization, "RMSNormalization": lower_normalization,
    "MaxPool": lower_pool, "AveragePool": lower_pool,
    "Gather": lower_gather, "GatherND": lower_gather_nd, "CumSum": lower_cumsum,
    "CumProd": lower_cumsum, "LpPool": lower_pool,
}  # fmt: skip
