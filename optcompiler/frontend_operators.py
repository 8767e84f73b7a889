"""ONNX forms of torch operators that torch.onnx has none for, or a wrong one.

`translations` is what `torch.onnx.export` knows as a `custom_translation_table`: a few operators
are written in ONNX here, those of `optcompiler.ops.aten` become nodes of their own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnxscript import values
from onnxscript.function_libs.torch_lib import ops as torchlib

from optcompiler.ops import aten

Translation = Callable[..., Any]

op: Any = onnxscript.opset18
_core: Any = torchlib.core
_nn: Any = torchlib.nn

_TENSORS = [
    f"tensor({name})"
    for name in (
        "bool", "float16", "bfloat16", "float", "double", "int8", "int16", "int32", "int64",
        "uint8",
    )
]  # fmt: skip


@functools.cache
def translations() -> Mapping[Any, Translation]:
    """An ONNX form by torch operator."""
    carried = {aten.overload_of(name): _carried(name) for name in aten.NAMES}
    return {**carried, **_WRITTEN}


def complex_translations() -> Mapping[Any, Translation]:
    """The same for complex tensors, whose last axis holds the real and the imaginary part."""
    return {
        _aten.constant_pad_nd.default: _complex_pad,
        _aten._conj_physical.default: _complex_conjugate,
    }


# -- operators that stay themselves ---------------------------------------------------------


def _carried(name: str) -> Translation:
    """Makes a node of the operator's own out of a call."""
    arguments = aten.schema_of(name).arguments
    node = values.Op(values.Opset(aten.DOMAIN, 1), name, _schema(name))

    def translate(*given: Any, **named: Any) -> Any:
        call = {a.name: value for a, value in zip(arguments, given, strict=False)} | named
        inputs = [call.pop(a.name, None) for a in arguments if aten.is_tensor(a)]
        return node(*inputs, **{k: v for k, v in call.items() if v is not None})

    return translate


def _schema(name: str) -> onnx.defs.OpSchema:
    """The ONNX schema that says of a node what torch's says of the operator."""
    Formal = onnx.defs.OpSchema.FormalParameter
    option = onnx.defs.OpSchema.FormalParameterOption
    known = aten.schema_of(name)
    inputs = [a for a in known.arguments if aten.is_tensor(a)]
    optional = {a.name: "Optional" in str(a.type) for a in inputs}
    constraints = [(f"T{i}", _TENSORS, "") for i in range(len(inputs) + len(known.returns))]
    return onnx.defs.OpSchema(
        name, aten.DOMAIN, 1,
        inputs=[
            Formal(a.name, f"T{i}", param_option=option.Optional if optional[a.name] else
                   option.Single)
            for i, a in enumerate(inputs)
        ],
        outputs=[
            Formal(f"output_{i}", f"T{len(inputs) + i}") for i in range(len(known.returns))
        ],
        attributes=[
            onnx.defs.OpSchema.Attribute(a.name, _attribute_type(str(a.type)), required=False)
            for a in known.arguments if not aten.is_tensor(a)
        ],
        type_constraints=constraints,
    )  # fmt: skip


def _attribute_type(text: str) -> onnx.defs.OpSchema.AttrType:
    item = next(
        kind
        for word, kind in (
            ("str", "STRING"), ("float", "FLOAT"), ("number", "FLOAT"), ("int", "INT"),
            ("bool", "INT"),
        )
        if word in text
    )  # fmt: skip
    return getattr(onnx.defs.OpSchema.AttrType, f"{item}S" if "List" in text else item)


# -- operators written in ONNX --------------------------------------------------------------


def _ints(values_: Sequence[int] | int) -> Any:
    return op.Constant(value=ir.tensor(np.atleast_1d(np.asarray(values_, np.int64))))


def _like(value: float, x: Any) -> Any:
    return op.CastLike(op.Constant(value=ir.tensor(np.float32(value))), x)


def _expanded(values_: Sequence[int] | int, count: int, default: int = 1) -> list[int]:
    """A setting of a window for each of `count` dimensions; torch lets one stand for all."""
    listed = [values_] if isinstance(values_, int) else list(values_) or [default]
    return listed * count if len(listed) == 1 else listed


def _split(x: Any, sizes: Sequence[int], dim: int = 0) -> Any:
    if len(sizes) == 1:
        return [op.Identity(x)]
    parts = op.Split(x, _ints(sizes), axis=dim, num_outputs=len(sizes))
    # torch.onnx asks for the number, and ONNX forbids it beside sizes
    parts[0].producer().attributes.pop("num_outputs")
    return list(parts)


def _split_even(x: Any, size: int, dim: int = 0) -> Any:
    extent = x.shape[dim]
    if not isinstance(extent, int) or size == 0:
        return _core.aten_split(x, size, dim)
    whole, rest = divmod(extent, size)
    return _split(x, [size] * whole + [rest] * (rest > 0) or [0], dim)


def _cumprod(x: Any, dim: int, dtype: int = -1) -> Any:
    """Products over windows that double: log2(extent) multiplications."""
    y = x if dtype == -1 else op.Cast(x, to=dtype)
    if len(x.shape) == 0:
        return op.Identity(y)
    axes, step, extent = _ints(dim), 1, x.shape[dim]
    while step < extent:
        head = op.Slice(y, _ints(0), _ints(step), axes)
        moved = op.Slice(y, _ints(0), _ints(extent - step), axes)
        rest = op.Slice(y, _ints(step), _ints(extent), axes)
        y = op.Concat(head, op.Mul(rest, moved), axis=dim)
        step *= 2
    return op.Identity(y)


def _signbit(x: Any) -> Any:
    zero = _like(0.0, x)
    return op.Or(op.Less(x, zero), op.Less(op.Div(_like(1.0, x), x), zero))


def _copysign(x: Any, sign: Any) -> Any:
    size = op.Abs(x)
    sign = _like(sign, x) if isinstance(sign, (int, float)) else sign
    return op.Where(_signbit(sign), op.Neg(size), size)


def _hypot(x: Any, y: Any) -> Any:
    """Scaled by the larger leg, which keeps squares in range."""
    large, small = op.Max(op.Abs(x), op.Abs(y)), op.Min(op.Abs(x), op.Abs(y))
    safe = op.Where(op.Equal(large, _like(0.0, large)), _like(1.0, large), large)
    ratio = op.Div(small, safe)
    return op.Mul(large, op.Sqrt(op.Add(op.Mul(ratio, ratio), _like(1.0, large))))


def _fmax(x: Any, y: Any) -> Any:
    return op.Where(op.IsNaN(x), y, op.Where(op.IsNaN(y), x, op.Max(x, y)))


def _fmin(x: Any, y: Any) -> Any:
    return op.Where(op.IsNaN(x), y, op.Where(op.IsNaN(y), x, op.Min(x, y)))


def _aminmax(x: Any, *, dim: int | None = None, keepdim: bool = False) -> Any:
    axes = () if dim is None or len(x.shape) == 0 else (_ints(dim),)
    keep = int(keepdim)
    return op.ReduceMin(x, *axes, keepdims=keep), op.ReduceMax(x, *axes, keepdims=keep)


def _log_sigmoid(x: Any) -> Any:
    """min(x, 0) - log(1 + exp(-|x|)), which loses nothing where the sigmoid nears 0 or 1."""
    tail = op.Softplus(op.Neg(op.Abs(x)))
    return op.Sub(op.Min(x, _like(0.0, x)), tail)


def _cdist(x: Any, y: Any, p: float, compute_mode: int | None = None) -> Any:
    difference = op.Abs(op.Sub(op.Unsqueeze(x, _ints(-2)), op.Unsqueeze(y, _ints(-3))))
    return _norm(difference, p)


def _norm(difference: Any, p: float) -> Any:
    """The p-norm of the last axis, of what is not negative."""
    last = _ints(-1)
    if p == 0:
        apart = op.CastLike(op.Greater(difference, _like(0.0, difference)), difference)
        return op.ReduceSum(apart, last, keepdims=0)
    if p == float("inf"):
        return op.ReduceMax(difference, last, keepdims=0)
    if p in (1.0, 2.0):
        return (op.ReduceL1 if p == 1 else op.ReduceL2)(difference, last, keepdims=0)
    total = op.ReduceSum(op.Pow(difference, _like(p, difference)), last, keepdims=0)
    return op.Pow(total, _like(1 / p, difference))


def _masked_select(x: Any, mask: Any) -> Any:
    mask_like = op.Expand(mask, op.Shape(x))
    spread = op.Expand(x, op.Shape(mask_like))
    flat = _ints(-1)
    return op.Compress(op.Reshape(spread, flat), op.Reshape(mask_like, flat), axis=0)


def _searchsorted(
    edges: Any, x: Any, *, out_int32: bool = False, right: bool = False,
    side: str | None = None, sorter: Any = None,
) -> Any:  # fmt: skip
    """How many edges lie before each value: all pairs compared. A NaN lies after all of them."""
    if sorter is not None:
        edges = op.GatherElements(edges, sorter, axis=-1)
    edges = op.Unsqueeze(edges, _ints(-2)) if len(edges.shape) > 1 else edges
    x = op.Unsqueeze(x, _ints(-1))
    after = op.Greater(edges, x) if right or side == "right" else op.GreaterOrEqual(edges, x)
    counted = op.Cast(op.Not(after), to=ir.DataType.INT64)
    total = op.ReduceSum(counted, _ints(-1), keepdims=0)
    return op.Cast(total, to=ir.DataType.INT32) if out_int32 else total


def _bucketize(x: Any, edges: Any, *, out_int32: bool = False, right: bool = False) -> Any:
    return _searchsorted(edges, x, out_int32=out_int32, right=right)


def _nonzero(x: Any) -> Any:
    if len(x.shape) > 0:
        return op.Transpose(op.NonZero(x), perm=[1, 0])
    # a scalar has a row when it is not zero, and no columns
    rows = op.Transpose(op.NonZero(op.Reshape(x, _ints(1))), perm=[1, 0])
    return op.Slice(rows, _ints(0), _ints(0), _ints(1))


def _at_least(x: Any, rank: int) -> Any:
    """Axes that `torch.atleast_1d`, `_2d` and `_3d` add."""
    axes = {(1, 0): [0], (2, 0): [0, 1], (2, 1): [0], (3, 0): [0, 1, 2], (3, 1): [0, 2],
            (3, 2): [2]}.get((rank, len(x.shape)))  # fmt: skip
    return x if axes is None else op.Unsqueeze(x, _ints(axes))


def _hstack(tensors: Sequence[Any]) -> Any:
    axis = 0 if len(tensors[0].shape) <= 1 else 1
    return op.Concat(*(_at_least(t, 1) for t in tensors), axis=axis)


def _vstack(tensors: Sequence[Any]) -> Any:
    return op.Concat(*(_at_least(t, 2) for t in tensors), axis=0)


def _dstack(tensors: Sequence[Any]) -> Any:
    return op.Concat(*(_at_least(t, 3) for t in tensors), axis=2)


def _column_stack(tensors: Sequence[Any]) -> Any:
    columns = [op.Reshape(t, _ints([-1, 1])) if len(t.shape) <= 1 else t for t in tensors]
    return op.Concat(*columns, axis=1)


def _im2col(
    x: Any, kernel_size: Sequence[int], dilation: Sequence[int], padding: Sequence[int],
    stride: Sequence[int],
) -> Any:  # fmt: skip
    """Rows and columns of every patch gathered by constant indices."""
    kernel, spread, pad, step = (_expanded(v, 2) for v in (kernel_size, dilation, padding, stride))
    height, width = int(x.shape[-2]), int(x.shape[-1])
    taps = [
        np.arange(0, extent + 2 * p - d * (k - 1), s)[None, :] + d * np.arange(k)[:, None]
        for extent, k, d, p, s in zip((height, width), kernel, spread, pad, step, strict=True)
    ]  # fmt: skip
    rows, columns = (op.Constant(value=ir.tensor(t.astype(np.int64))) for t in taps)
    before = [0] * (len(x.shape) - 2)
    padded = op.Pad(x, _ints([*before, *pad, *before, *pad])) if any(pad) else x
    axis = len(x.shape) - 2
    patches = op.Gather(op.Gather(padded, columns, axis=axis + 1), rows, axis=axis)
    lead = list(range(axis))
    patches = op.Transpose(patches, perm=[*lead, axis, axis + 2, axis + 1, axis + 3])
    size = [int(x.shape[axis - 1]) * kernel[0] * kernel[1], taps[0].shape[1] * taps[1].shape[1]]
    return op.Reshape(patches, _ints([0] * (axis - 1) + size))


def _average_pool(count: int, original: Translation) -> Translation:
    """`divisor_override` divides the sum of a window; ONNX knows its own divisors alone."""

    def translate(
        x: Any, kernel_size: Sequence[int], stride: Sequence[int] = (),
        padding: Sequence[int] = (0,), ceil_mode: bool = False, count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:  # fmt: skip
        if divisor_override is None:
            return original(x, kernel_size, stride, padding, ceil_mode, count_include_pad)
        kernel, pad = _expanded(kernel_size, count), _expanded(padding, count)
        step = _expanded(stride, count) if stride else kernel
        beyond: list[int] = []
        for extent, k, s, p in zip(x.shape[-count:], kernel, step, pad, strict=True):
            room = extent + 2 * p - k
            last = -(-room // s) if ceil_mode else room // s
            last -= ceil_mode and last * s >= extent + p
            beyond.append(max(last * s + k - extent - p, 0))
        before = [0] * (len(x.shape) - count)
        padded = op.Pad(x, _ints([*before, *pad, *before, *beyond]))
        mean = op.AveragePool(padded, kernel_shape=kernel, strides=step)
        return op.Mul(mean, _like(math.prod(kernel) / divisor_override, x))

    return translate


def _adaptive_average_3d(x: Any, output_size: Sequence[int]) -> Any:
    """Windows of one size where the extents divide; otherwise one sum of products per axis."""
    y = x
    rank = len(x.shape)
    for axis, size in zip(range(rank - 3, rank), _expanded(output_size, 3), strict=True):
        extent = int(x.shape[axis])
        weights = np.zeros((extent, size), np.float32)
        for i in range(size):
            low, high = i * extent // size, -(-(i + 1) * extent // size)
            weights[low:high, i] = 1 / (high - low)
        order = [*(a for a in range(rank) if a != axis), axis]
        back = [order.index(a) for a in range(rank)]
        matrix = op.CastLike(op.Constant(value=ir.tensor(weights)), x)
        y = op.Transpose(op.MatMul(op.Transpose(y, perm=order), matrix), perm=back)
    return y


def _adaptive_max(count: int) -> Translation:
    carried = _carried(f"adaptive_max_pool{count}d")

    def translate(x: Any, output_size: Sequence[int]) -> Any:
        extents = [int(d) for d in x.shape[-count:]]
        sizes = _expanded(output_size, count)
        if any(e % s for e, s in zip(extents, sizes, strict=True)) or len(x.shape) != count + 2:
            return carried(x, output_size)
        windows = [e // s for e, s in zip(extents, sizes, strict=True)]
        y, places = op.MaxPool(x, kernel_shape=windows, strides=windows)
        return y, op.Mod(places, _ints(math.prod(extents)))

    return translate


def _batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> list[Any]:
    """By the batch's own statistics: the result, their mean and 1 / deviation, and the running
    statistics after this batch."""
    axes = _ints([a for a in range(len(x.shape)) if a != 1])
    wide = [1, -1] + [1] * (len(x.shape) - 2)
    own = op.ReduceMean(x, axes, keepdims=1)
    centred = op.Sub(x, own)
    spread = op.ReduceMean(op.Mul(centred, centred), axes, keepdims=1)
    rstd = op.Reciprocal(op.Sqrt(op.Add(spread, _like(eps, x))))
    y = op.Mul(centred, rstd)
    if weight is not None:
        y = op.Mul(y, op.Reshape(weight, _ints(wide)))
    if bias is not None:
        y = op.Add(y, op.Reshape(bias, _ints(wide)))
    results = [y, op.Squeeze(own, axes), op.Squeeze(rstd, axes)]
    if mean is None or var is None:
        return results
    count = math.prod(int(d) for a, d in enumerate(x.shape) if a != 1)
    unbiased = op.Mul(op.Squeeze(spread, axes), _like(count / max(count - 1, 1), x))
    for old, new in ((mean, results[1]), (var, unbiased)):
        kept = op.Mul(old, _like(1 - momentum, old))
        results.append(op.Add(kept, op.Mul(new, _like(momentum, old))))
    return results


def _native_batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float,
    eps: float,
) -> Any:  # fmt: skip
    if not training:
        return _core.aten_native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return _batch_norm(x, weight, bias, mean, var, momentum, eps)[:3]


def _functional_batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float,
    eps: float,
) -> Any:  # fmt: skip
    if not training:
        original = _core.aten__native_batch_norm_legit_functional
        return original(x, weight, bias, mean, var, training, momentum, eps)
    return _batch_norm(x, weight, bias, mean, var, momentum, eps)


def _stateless_batch_norm(
    x: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> Any:
    return _batch_norm(x, weight, bias, None, None, momentum, eps)


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """torch.onnx knows four dimensions; with three there is one head."""

    def attend(*tensors: Any) -> Any:
        return _nn.aten_scaled_dot_product_attention(
            *tensors, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    if len(query.shape) != 3:
        return attend(query, key, value)
    axis = _ints(0)
    return op.Squeeze(attend(*(_with_axis(t, axis) for t in (query, key, value))), axis)


def _with_axis(tensor: Any, axis: Any) -> Any:
    wide = op.Unsqueeze(tensor, axis)
    # the exporter tells later functions of inputs alone, and attention asks
    wide.shape, wide.dtype = ir.Shape([1, *tensor.shape]), tensor.dtype
    return wide


def _extreme(reduce: str) -> Translation:
    def translate(x: Any, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
        if len(x.shape) == 0:
            return op.Identity(x)
        axes = (_ints(dim),) if len(dim) else ()
        return getattr(op, reduce)(x, *axes, keepdims=int(keepdim))

    return translate


def _reverse_subtract(x: Any, other: Any, alpha: float = 1) -> Any:
    if isinstance(other, float) and not x.dtype.is_floating_point():
        x = op.Cast(x, to=ir.DataType.FLOAT)
    left = other if isinstance(other, ir.Value) else _like(other, x)
    return op.Sub(left, x if alpha == 1 else op.Mul(x, _like(alpha, x)))


def _squeeze(x: Any, dim: Sequence[int]) -> Any:
    axes = [d % len(x.shape) for d in dim] if len(x.shape) else []
    ones = [a for a in axes if x.shape[a] == 1]
    return op.Squeeze(x, _ints(ones)) if ones else op.Identity(x)


def _resize(x: Any, size: Sequence[int], memory_format: Any = None) -> Any:
    count = math.prod(size)
    if count > math.prod(int(d) for d in x.shape):
        raise ValueError(
            f"resize of {x.shape} to {list(size)} reads memory that nothing was put in"
        )
    flat = op.Slice(op.Reshape(x, _ints(-1)), _ints(0), _ints(count))
    return op.Reshape(flat, _ints(size), allowzero=1)


def _empty_permuted(size: Sequence[int], layout: Sequence[int], dtype: int = 1, **_: Any) -> Any:
    zero = ir.tensor(np.zeros(1, ir.DataType(dtype).numpy()))
    return op.ConstantOfShape(op.Constant(value=ir.tensor(np.asarray(size, np.int64))), value=zero)


def _pdist(x: Any, p: float = 2.0) -> Any:
    first, second = np.triu_indices(int(x.shape[0]), 1)
    rows = [
        op.Gather(x, op.Constant(value=ir.tensor(index.astype(np.int64))))
        for index in (first, second)
    ]
    return _norm(op.Abs(op.Sub(*rows)), p)


def _cross_entropy(
    scores: Any, target: Any, weight: Any = None, reduction: int = 1, ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    """ONNX knows batches alone; the scores of one sample are a batch of one."""

    def loss(*tensors: Any) -> Any:
        return _nn.aten_cross_entropy_loss(
            *tensors, weight, reduction, ignore_index, label_smoothing
        )

    if len(scores.shape) != 1:
        return loss(scores, target)
    axis = _ints(0)
    found = loss(_with_axis(scores, axis), _with_axis(target, axis))
    return op.Squeeze(found, axis) if reduction == 0 else found


_FOLDS: dict[str, Callable[[Any, int], Any]] = {
    "circular": lambda places, extent: places % extent,
    "replicate": lambda places, extent: places.clip(0, extent - 1),
    "reflect": lambda places, extent: extent - 1 - abs(extent - 1 - abs(places)),
}
"""Which element of an axis fills a place before, in or after it."""


def _pad(x: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """Kernels of Pad have no circular mode, and may crop what they should still read."""
    plain = mode == "constant" or (mode != "circular" and min(pad, default=0) >= 0)
    if plain or not all(isinstance(d, int) for d in x.shape):
        return _nn.aten_pad(x, pad, mode, value)
    y = x
    for place, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        axis = len(x.shape) - 1 - place
        extent = int(x.shape[axis])
        index = _FOLDS[mode](np.arange(-before, extent + after), extent)
        if before or after:
            y = op.Gather(y, op.Constant(value=ir.tensor(index.astype(np.int64))), axis=axis)
    return y


def _complex_pad(x: Any, pad: Sequence[int], value: float = 0.0) -> Any:
    if value:
        raise ValueError(f"padding complex numbers with {value} has no ONNX form")
    rank = len(x.shape) - 1
    wide = [*pad, *[0] * (2 * rank - len(pad))]
    return op.Pad(x, _ints([*wide[-2::-2], 0, *wide[-1::-2], 0]))


def _complex_conjugate(x: Any) -> Any:
    return op.Mul(x, op.CastLike(op.Constant(value=ir.tensor(np.array([1, -1], np.float32))), x))


_aten: Any = torch.ops.aten
_WRITTEN: dict[Any, Translation] = {
    _aten.split.Tensor: _split_even,
    _aten.unsafe_split.Tensor: _split_even,
    _aten.split_with_sizes.default: _split,
    _aten.unsafe_split_with_sizes.default: _split,
    _aten.cumprod.default: _cumprod,
    _aten.signbit.default: _signbit,
    _aten.copysign.Tensor: _copysign,
    _aten.copysign.Scalar: _copysign,
    _aten.hypot.default: _hypot,
    _aten.fmax.default: _fmax,
    _aten.fmin.default: _fmin,
    _aten.aminmax.default: _aminmax,
    _aten.log_sigmoid.default: _log_sigmoid,
    _aten._cdist_forward.default: _cdist,
    _aten._pdist_forward.default: _pdist,
    _aten.amax.default: _extreme("ReduceMax"),
    _aten.amin.default: _extreme("ReduceMin"),
    _aten.rsub.Scalar: _reverse_subtract,
    _aten.squeeze.dims: _squeeze,
    _aten.resize.default: _resize,
    _aten.empty_permuted.default: _empty_permuted,
    _aten.pad.default: _pad,
    _aten.cross_entropy_loss.default: _cross_entropy,
    _aten.masked_select.default: _masked_select,
    _aten.searchsorted.Tensor: _searchsorted,
    _aten.bucketize.Tensor: _bucketize,
    _aten.nonzero.default: _nonzero,
    _aten.hstack.default: _hstack,
    _aten.vstack.default: _vstack,
    _aten.dstack.default: _dstack,
    _aten.column_stack.default: _column_stack,
    _aten.im2col.default: _im2col,
    _aten.avg_pool2d.default: _average_pool(2, _nn.aten_avg_pool2d),
    _aten.avg_pool3d.default: _average_pool(3, _nn.aten_avg_pool3d),
    _aten._adaptive_avg_pool3d.default: _adaptive_average_3d,
    _aten.adaptive_max_pool2d.default: _adaptive_max(2),
    _aten.adaptive_max_pool3d.default: _adaptive_max(3),
    _aten.native_batch_norm.default: _native_batch_norm,
    _aten._native_batch_norm_legit.default: _native_batch_norm,
    _aten._native_batch_norm_legit.no_stats: _stateless_batch_norm,
    _aten._native_batch_norm_legit_functional.default: _functional_batch_norm,
    _aten.scaled_dot_product_attention.default: _attention,
}
