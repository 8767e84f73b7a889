"""Conv, MatMul and Gemm: operands, their quantisation, bias and epilogue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from optcompiler.lowering.build import (
    channels_last,
    is_channels_last,
    map_views,
    reshaped,
    view_array,
)
from optcompiler.lowering.core import Lowering, Rule
from optcompiler.lowering.expressions import SMALL, call, cast, number
from optcompiler.lowering.ir import (
    Accumulator,
    Const,
    Conv,
    Dequantize,
    Expr,
    Load,
    MatMul,
    Operand,
    Quantization,
    View,
    product,
    row_major,
)
from optcompiler.lowering.reduce import emit_reduction
from optcompiler.lowering.stored import HALVES, Stored
from optcompiler.lowering.windows import convolve, window_pads

INTEGERS = frozenset({"UINT8", "INT8"})
FLOATS = SMALL | {"FLOAT"}
"""Types whose products are summed in float32."""


def quantised(expr: Expr, channel_axis: int | None) -> Operand | None:
    """The operand when `expr` is an integer tensor dequantised by constants.

    Scales vary along `channel_axis` alone, or not at all.
    """
    if not isinstance(expr, Dequantize) or not isinstance(expr.arg, Load):
        return None
    view = expr.arg.view
    if view.dtype not in INTEGERS:
        return None
    scale = _parameter(expr.scale, channel_axis)
    zero = _parameter(expr.zero_point, channel_axis)
    if scale is None or zero is None:
        return None
    if scale.ndim != zero.ndim:
        scale, zero = np.broadcast_arrays(scale, zero)
    return Operand(view, Quantization(scale.astype(np.float32), zero.astype(np.int32)))


def _parameter(expr: Expr, axis: int | None) -> np.ndarray | None:
    if isinstance(expr, Const):
        return np.array(expr.value)
    if not isinstance(expr, Load) or expr.view.buffer.array is None:
        return None
    view = expr.view
    moving = [
        i for i, (n, s) in enumerate(zip(view.shape, view.strides, strict=True)) if n > 1 and s
    ]
    array = view_array(view)
    if not moving:
        return np.array(array.reshape(-1)[0])
    if axis is None or moving != [axis % len(view.shape)]:
        return None
    index: list[int | slice] = [0] * len(view.shape)
    index[axis] = slice(None)
    return np.ascontiguousarray(array[tuple(index)])


def operands(
    low: Lowering, node: ir.Node, a: ir.Value, b: ir.Value, axis_b: int, permute_b: bool = False
) -> tuple[Operand, Operand]:
    """Both integers where both sides are quantised and the target multiplies such, else floats.

    A constant second side is INT8 without a zero point, whatever it was stored as; a computed one
    has its zero point in the middle of its type. Where the target reads such weights, a constant
    second side stays as it is stored beside floats, and beside integers if it is in blocks.
    """
    qa = quantised(low.expr(a), None)
    kept = stored_operand(low, b, axis_b, permute_b)
    if kept is not None and kept.quantization is not None and kept.quantization.block and qa:
        return qa, kept
    if kept is not None and (qa is None or kept.quantization is None):
        return float_operand(low, node, a, narrow=frozenset()), kept
    qb = kept
    if qb is None and qa is not None:
        qb = stored_operand(low, b, axis_b, permute_b, groups=True)
        qb = None if qb is None or qb.quantization is None or qb.quantization.block else qb
    if qb is None:
        second = low.expr(b)
        if permute_b:
            second = map_views(second, lambda v: v.permute((1, 0)))
        qb = quantised(second, axis_b)
    if qa is not None and qb is not None and qb.quantization is not None:
        if qb.view.buffer.array is not None:
            qb = _centred(low, qb, axis_b, nibbles=kept is not None)
        elif not low.computed_integers or (qb.quantization.zero_point != _middle(qb.view)).any():
            qb = None
        if qb is not None:
            return qa, qb
    if kept is not None:
        return float_operand(low, node, a, narrow=frozenset()), kept
    return float_operand(low, node, a), float_operand(low, node, b, permute_b)


def stored_operand(
    low: Lowering, value: ir.Value, axis: int, permute: bool, groups: bool = False
) -> Operand | None:
    """A constant as it is stored, if that is by channels or along K, and of a type to keep.

    That of a convolution with `groups` is for those who make bytes of it.
    """
    rank = len(low.shape(value))
    if not low.stored or not (rank == 2 or (axis == 0 and (groups or _ungrouped(value)))):
        return None
    found = low.flat.stored.get(value)
    if found is None and value in low.exprs:
        expr = low.exprs[value]
        if permute:
            expr = map_views(expr, lambda v: v.permute((1, 0)))
        operand = quantised(expr, axis)
        if operand is None or operand.view.buffer.array is None:
            return None
        return operand if operand.view.dtype in low.stored else None
    if found is None:
        array = low.flat.constants.get(value)
        if array is None or low.flat.dtype(value) not in (low.stored & HALVES) - low.narrow:
            return None
        found = Stored(array)
    if permute:
        found = found.permuted((1, 0))
    view = low.constant(found.levels, value.name or "")
    if found.scale is None:
        return Operand(view)
    scale = _by_columns(found, found.scale, axis)
    if scale is None:
        return None
    zero = np.zeros_like(scale, np.int32)
    if found.zero_point is not None:
        given = _by_columns(found, found.zero_point, axis)
        if given is None:
            return None
        zero = np.broadcast_to(given, scale.shape)
    return Operand(view, Quantization(scale, zero, found.block))


def _ungrouped(value: ir.Value) -> bool:
    """Whether no convolution of groups reads the value: their kernels want floats."""
    return all(
        use.node.op_type != "Conv" or use.node.attributes.get_int("group", 1) == 1
        for use in value.uses()
    )


def _by_columns(stored: Stored, parameter: np.ndarray, axis: int) -> np.ndarray | None:
    """A parameter as [], [N] or, in blocks, [blocks of K, N]; None where it varies otherwise."""
    rank = stored.levels.ndim
    columns, depth = axis % rank, (0 if axis % rank == rank - 1 else 1)
    if not stored.block:
        if any(n > 1 for i, n in enumerate(parameter.shape) if i != columns):
            return None
        return parameter.reshape(-1) if parameter.size > 1 else parameter.reshape(())
    if stored.axis != depth:
        return None
    taps = stored.levels.shape[2:] if columns == 0 else ()
    if product(taps) > 1 and stored.levels.shape[depth] % stored.block:
        return None
    order = (*range(2, rank), depth, columns) if columns == 0 else (depth, columns)
    return np.ascontiguousarray(parameter.transpose(order).reshape(-1, parameter.shape[columns]))


def _middle(view: View) -> int:
    return 128 if view.dtype == "UINT8" else 0


def _centred(low: Lowering, operand: Operand, axis: int, nibbles: bool) -> Operand | None:
    """A constant operand less its zero point, as INT8 or, with `nibbles`, as the INT4 that it is;
    None where neither holds it."""
    quantization = operand.quantization
    assert quantization is not None
    zero = quantization.zero_point
    if operand.view.dtype in ({"INT8", "INT4"} if nibbles else {"INT8"}) and not zero.any():
        return operand
    array = view_array(operand.view).astype(np.int32)
    along = [1] * array.ndim
    along[axis] = -1
    array = array - (zero.reshape(along) if zero.ndim else zero)
    limits = np.iinfo(np.int8)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        return None
    small = nibbles and operand.view.dtype in {"INT4", "UINT4"}
    few = small and bool(array.size) and array.min() >= -8 and array.max() <= 7
    kind = ir.DataType.INT4.numpy() if few else np.dtype(np.int8)
    view = low.constant(array.astype(kind), operand.view.buffer.source)
    return Operand(view, Quantization(quantization.scale, np.zeros_like(zero)))


def float_operand(
    low: Lowering, node: ir.Node, value: ir.Value, permute: bool = False,
    narrow: frozenset[str] | None = None,
) -> Operand:  # fmt: skip
    """The value in floats, of types in `narrow` (the target's, if None) as they are."""
    array = low.array(value)
    if low.flat.dtype(value) in SMALL - (low.narrow if narrow is None else narrow):
        if array is not None:
            view = low.constant(array.astype(np.float32), value.name or "")
        else:
            expr, shape = cast(low.expr(value), "FLOAT"), low.shape(value)
            view = low.store_plain(expr, shape, low.strides_like(expr, shape), node)
    else:
        view = low.constant(array, value.name or "") if array is not None else low.view(value, node)
    return Operand(view.permute((1, 0)) if permute else view)


def adjacent(low: Lowering, node: ir.Node, operand: Operand, axis: int) -> Operand:
    """The operand with elements along `axis` next to each other, copied when they are not."""
    view = operand.view
    axis %= len(view.shape)
    if view.strides[axis] == 1 or view.shape[axis] == 1:
        return operand
    last = len(view.shape) - 1
    order = (*(i for i in range(last + 1) if i != axis), axis)
    inner = row_major(tuple(view.shape[i] for i in order))
    strides = [0] * len(order)
    for place, i in enumerate(order):
        strides[i] = inner[place]
    copy = low.store_plain(Load(view.dtype, view), view.shape, tuple(strides), node)
    return replace(operand, view=copy)


def bias_of(
    low: Lowering, value: ir.Value | None, a: Operand, b: Operand, size: int
) -> tuple[np.ndarray | None, Expr | None]:
    """A bias [size] as the step's own array, or as an expression over [size] for the epilogue."""
    if value is None:
        return None, None
    expr = low.expr(value)
    if a.quantization is None or b.quantization is None or b.quantization.block:
        array = low.array(value)
        if array is None:
            return None, cast(expr, "FLOAT")
        return spread(array, size).astype(np.float32, copy=False), None
    if isinstance(expr, Dequantize):
        integers = expr.arg
        scale, zero = _parameter(expr.scale, 0), _parameter(expr.zero_point, 0)
        wanted = a.quantization.scale * b.quantization.scale
        if (
            isinstance(integers, Load)
            and integers.view.buffer.array is not None
            and integers.view.dtype == "INT32"
            and scale is not None
            and zero is not None
            and not zero.any()
            and np.allclose(scale, wanted, rtol=1e-5, atol=0)
        ):
            return spread(view_array(integers.view), size), None
    array = low.array(value)
    if array is None:
        return None, expr
    return None, Load("FLOAT", low.constant(spread(array, size)))


def spread(array: np.ndarray, size: int) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(array.reshape(-1), (size,)))


def lower_conv(low: Lowering, node: ir.Node) -> None:
    x, w, out = node.inputs[0], node.inputs[1], node.outputs[0]
    assert x is not None
    assert w is not None
    attributes = low.flat.attributes(node)
    shape = low.shape(out)
    rank = len(shape) - 2
    dtype = low.flat.dtype(out)
    constant = low.flat.is_constant(w) or low.array(w) is not None
    if rank not in (1, 2) or not constant or dtype not in FLOATS:
        convolve(low, node)
        return
    a, b = operands(low, node, x, w, 0)
    kernel = low.shape(w)[2:]
    strides = tuple(attributes.get("strides") or (1,) * rank)
    dilations = tuple(attributes.get("dilations") or (1,) * rank)
    pads = window_pads(attributes, low.shape(x)[2:], kernel, strides, dilations)
    wide = (*shape[:2], 1, shape[2]) if rank == 1 else shape
    if rank == 1:
        a, b = (
            replace(o, view=o.view.reshape((*o.view.shape[:2], 1, o.view.shape[2])) or o.view)
            for o in (a, b)
        )
        strides, dilations, pads = (1, *strides), (1, *dilations), (0, pads[0], 0, pads[1])
    if not is_channels_last(a.view):
        dense = channels_last(a.view.shape)
        a = replace(a, view=low.store_plain(Load(a.view.dtype, a.view), a.view.shape, dense, node))
        if rank == 2 and isinstance(low.exprs.get(x), Load):
            low.exprs[x] = Load(a.view.dtype, a.view)
    value = node.inputs[2] if len(node.inputs) > 2 else None
    bias, bias_expr = bias_of(low, value, a, b, shape[1])
    epilogue: Expr = Accumulator("FLOAT")
    if bias_expr is not None:
        tall = (1, shape[1]) + (1,) * rank
        moved = map_views(bias_expr, lambda v: (v.reshape(tall) or v).broadcast(shape))
        epilogue = call("add", epilogue, moved)
    epilogue = cast(epilogue, dtype)

    def emit(nodes: tuple[ir.Node, ...], last: ir.Value, expr: Expr) -> None:
        dtype = low.flat.dtype(last)
        buffer = low.buffer(dtype, product(wide), "temp", last.name or "")
        view = View(buffer, wide, channels_last(wide))
        final = expr if rank == 2 else reshaped(expr, wide)
        assert final is not None
        low.emit(
            Conv, nodes, out=view, epilogue=final, a=a, b=b, bias=bias, strides=strides,
            pads=pads, dilations=dilations, groups=attributes.get("group", 1),
        )  # fmt: skip
        done = view if rank == 2 else replace(
            view, shape=shape, strides=(*view.strides[:2], view.strides[3])
        )  # fmt: skip
        low.exprs[last] = Load(view.dtype, done)

    low.fused(node, epilogue, emit)


def lower_matmul(low: Lowering, node: ir.Node) -> None:
    x, w, out = node.inputs[0], node.inputs[1], node.outputs[0]
    assert x is not None
    assert w is not None
    shape = low.shape(out)
    if low.flat.dtype(out) not in FLOATS:
        multiply(low, node, low.expr(x), low.expr(w), Accumulator(low.flat.dtype(out)))
        return
    a, b = operands(low, node, x, w, -1)
    va, vb = a.view, b.view
    if len(va.shape) == 1:
        va = replace(va, shape=(1, *va.shape), strides=(0, *va.strides))
    if len(vb.shape) == 1:
        vb = replace(vb, shape=(*vb.shape, 1), strides=(*vb.strides, 1))
    batch = np.broadcast_shapes(va.shape[:-2], vb.shape[:-2])
    va, vb = va.broadcast((*batch, *va.shape[-2:])), vb.broadcast((*batch, *vb.shape[-2:]))
    a = adjacent(low, node, replace(a, view=va), -1)
    start = cast(Accumulator("FLOAT"), low.flat.dtype(out))
    finish_matmul(low, node, a, replace(b, view=vb), shape, None, start)


def multiply(low: Lowering, node: ir.Node, a: Expr, b: Expr, start: Expr) -> None:
    """A matrix product of any type, as a reduction of products."""
    x, w = node.inputs[0], node.inputs[1]
    assert x is not None
    assert w is not None
    left, right = low.shape(x), low.shape(w)
    if low.flat.attributes(node).get("transA"):
        a, left = map_views(a, lambda v: v.permute((1, 0))), left[::-1]
    if low.flat.attributes(node).get("transB"):
        b, right = map_views(b, lambda v: v.permute((1, 0))), right[::-1]
    rows = left[-2] if len(left) > 1 else 1
    columns = right[-1] if len(right) > 1 else 1
    batch = np.broadcast_shapes(left[:-2], right[:-2])
    space = (*batch, rows, columns, *left[-1:])

    def across(view: View) -> View:
        tall = replace(view, shape=(1, *view.shape), strides=(0, *view.strides))
        tall = tall if len(view.shape) == 1 else view
        wide = (*tall.shape[:-1], 1, tall.shape[-1])
        strides = (*tall.strides[:-1], 0, tall.strides[-1])
        return replace(view, shape=wide, strides=strides).broadcast(space)

    def down(view: View) -> View:
        tall = replace(view, shape=(*view.shape, 1), strides=(*view.strides, 0))
        tall = tall if len(view.shape) == 1 else view
        last = len(tall.shape) - 1
        turned = tall.permute((*range(last - 1), last, last - 1))
        wide = (*turned.shape[:-2], 1, *turned.shape[-2:])
        strides = (*turned.strides[:-2], 0, *turned.strides[-2:])
        return replace(turned, shape=wide, strides=strides).broadcast(space)

    value = call("mul", map_views(a, across), map_views(b, down))
    emit_reduction(low, node, start, "sum", space, (len(space) - 1,), value)


def lower_gemm(low: Lowering, node: ir.Node) -> None:
    x, w, out = node.inputs[0], node.inputs[1], node.outputs[0]
    assert x is not None
    assert w is not None
    attributes = low.flat.attributes(node)
    shape = low.shape(out)
    dtype = low.flat.dtype(out)
    if dtype not in FLOATS:
        start: Expr = Accumulator(dtype)
        start = call("mul", number(attributes.get("alpha", 1.0), start), start)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            more = low.expr(node.inputs[2], shape)
            more = call("mul", number(attributes.get("beta", 1.0), more), more)
            start = call("add", start, more)
        multiply(low, node, low.expr(x), low.expr(w), start)
        return
    a, b = operands(low, node, x, w, -1, permute_b=bool(attributes.get("transB")))
    if attributes.get("transA"):
        a = replace(a, view=a.view.permute((1, 0)))
    a = adjacent(low, node, a, -1)
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    value = node.inputs[2] if len(node.inputs) > 2 else None
    epilogue: Expr = Accumulator("FLOAT")
    if alpha != 1.0:
        epilogue = call("mul", number(alpha, epilogue), epilogue)
    bias, extra = None, None
    if value is not None:
        rows = low.shape(value)[:-1]
        if alpha == 1.0 and beta == 1.0 and all(r == 1 for r in rows):
            bias, vector = bias_of(low, value, a, b, shape[1])
            if vector is not None:
                extra = map_views(vector, lambda v: v.broadcast(shape))
        else:
            extra = cast(low.expr(value, shape), "FLOAT")
            if beta != 1.0:
                extra = call("mul", number(beta, extra), extra)
    if extra is not None:
        epilogue = call("add", epilogue, extra)
    finish_matmul(low, node, a, b, shape, bias, cast(epilogue, dtype))


def finish_matmul(
    low: Lowering,
    node: ir.Node,
    a: Operand,
    b: Operand,
    shape: tuple[int, ...],
    bias: np.ndarray | None,
    epilogue: Expr,
) -> None:
    """Emit the region; leading axes become one M where every view allows it."""
    full = (*a.view.shape[:-1], b.view.shape[-1])

    def emit(nodes: tuple[ir.Node, ...], last: ir.Value, expr: Expr) -> None:
        result = low.shape(last)
        dense = low.destination(last, None if result == shape else row_major(result))
        out = dense if full == result else replace(
            dense, shape=full, strides=_widened(dense, full)
        )  # fmt: skip
        final = expr if full == shape else reshaped(expr, full)
        assert final is not None
        left, right = a, b
        flat = (int(np.prod(full[:-1])), full[-1])
        still = all(
            s == 0 or n == 1 for n, s in zip(b.view.shape[:-2], b.view.strides, strict=False)
        )
        if len(full) > 2 and still:
            flat_a = a.view.reshape((flat[0], a.view.shape[-1]))
            flat_out, flat_expr = out.reshape(flat), reshaped(final, flat)
            if flat_a is not None and flat_out is not None and flat_expr is not None:
                left, out, final = replace(a, view=flat_a), flat_out, flat_expr
                two = replace(b.view, shape=b.view.shape[-2:], strides=b.view.strides[-2:])
                right = replace(b, view=two)
        low.emit(MatMul, nodes, out=out, epilogue=final, a=left, b=right, bias=bias)
        low.exprs[last] = Load(dense.dtype, dense)

    low.fused(node, epilogue, emit, reshapes=True)


def _widened(view: View, full: tuple[int, ...]) -> tuple[int, ...]:
    wide = view.reshape(full)
    assert wide is not None
    return wide.strides


CONTRACTIONS: Mapping[str, Rule] = {
    "Conv": lower_conv,
    "MatMul": lower_matmul,
    "Gemm": lower_gemm,
}
