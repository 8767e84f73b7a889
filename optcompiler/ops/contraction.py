"""Convolutions and matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from optcompiler.ops.costs import (
    conv_cost,
    conv_transpose_cost,
    einsum_cost,
    gemm_cost,
    matmul_cost,
)
from optcompiler.ops.declare import op
from optcompiler.ops.spec import OpSpec
from optcompiler.ops.windows import pad_spatial, resolve_pads, sides, symmetric

Tensor = torch.Tensor


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Convolution of [N, C, *spatial] with [M, C / group, *kernel]; 1 to 3 spatial axes."""
    rank = x.dim() - 2
    strides = list(strides or [1] * rank)
    dilations = list(dilations or [1] * rank)
    pairs = resolve_pads(x.shape[2:], weight.shape[2:], strides, dilations, pads, auto_pad)
    if symmetric(pairs):
        amount = [begin for begin, _ in pairs]
    else:
        x, amount = pad_spatial(x, pairs), [0] * rank
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return convolve(x, weight, bias, strides, amount, dilations, group)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Transposed convolution; padding crops the full result, `output_shape` decides how much."""
    rank = x.dim() - 2
    strides = list(strides or [1] * rank)
    dilations = list(dilations or [1] * rank)
    extra = list(output_padding or [0] * rank)
    full = [
        (size - 1) * stride + (taps - 1) * dilation + 1 + more
        for size, stride, taps, dilation, more in zip(
            x.shape[2:], strides, weight.shape[2:], dilations, extra, strict=True
        )
    ]
    pairs: list[tuple[int, int]] = sides(pads) if pads else [(0, 0)] * rank
    if auto_pad in ("SAME_UPPER", "SAME_LOWER") and output_shape is None:
        output_shape = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if output_shape is not None:
        pairs = list[tuple[int, int]]()
        for have, want in zip(full, output_shape[-rank:], strict=True):
            crop = have - want
            small, large = crop // 2, crop - crop // 2
            pairs.append((small, large) if auto_pad == "SAME_UPPER" else (large, small))
    elif auto_pad == "VALID":
        pairs = [(0, 0)] * rank
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    if symmetric(pairs) and all(begin >= 0 for begin, _ in pairs):
        amount = [begin for begin, _ in pairs]
        if all(more < max(s, d) for more, s, d in zip(extra, strides, dilations, strict=True)):
            return convolve(x, weight, bias, strides, amount, extra, group, dilations)
    y = convolve(x, weight, None, strides, [0] * rank, [0] * rank, group, dilations)
    grown = [(0, size - have) for size, have in zip(full, y.shape[2:], strict=True)]
    y = pad_spatial(pad_spatial(y, grown), [(-begin, -end) for begin, end in pairs])
    return y if bias is None else y + bias.reshape([-1] + [1] * rank)


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """`alpha * A' @ B' + beta * C`, C broadcast to [M, N]."""
    left = a.t() if transA else a
    right = b.t() if transB else b
    if c is not None and a.is_floating_point():
        return torch.addmm(c, left, right, beta=beta, alpha=alpha)
    y = left @ right
    y = y if alpha == 1.0 else alpha * y
    return y if c is None else y + (c if beta == 1.0 else beta * c)


def einsum(*operands: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *operands)


def _centred(x: Tensor, zero_point: Tensor | None, row_axis: int | None) -> Tensor:
    """Levels minus zero point in float64, which holds every sum of products exactly."""
    wide = x.double()
    if zero_point is None:
        return wide
    zero = zero_point.double()
    if row_axis is not None and zero.dim() == 1 and zero.numel() > 1:
        zero = zero.unsqueeze(row_axis)
    return wide - zero


def matmul_integer(
    a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None
) -> Tensor:
    """Integer product with zero points removed; int32 result. Per row of A, per column of B."""
    product = torch.matmul(_centred(a, a_zero, -1), _centred(b, b_zero, None))
    return product.to(torch.int32)


def conv_integer(
    x: Tensor,
    weight: Tensor,
    x_zero: Tensor | None = None,
    w_zero: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Integer convolution with zero points removed (so padding is neutral); int32 result."""
    zero = w_zero
    if zero is not None and zero.dim() == 1 and zero.numel() > 1:
        zero = zero.reshape([-1] + [1] * (weight.dim() - 1))
    y = conv(
        _centred(x, x_zero, None),
        _centred(weight, zero, None),
        None,
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        pads=pads,
        strides=strides,
    )
    return y.to(torch.int32)


SPECS: tuple[OpSpec, ...] = (
    op("Conv", conv, conv_cost),
    op("ConvTranspose", conv_transpose, conv_transpose_cost),
    op("Gemm", gemm, gemm_cost, since=7),
    op("MatMul", torch.matmul, matmul_cost),
    op("Einsum", einsum, einsum_cost, since=12),
    op("MatMulInteger", matmul_integer, matmul_cost, since=10, levels="consumes"),
    op("ConvInteger", conv_integer, conv_cost, since=10, levels="consumes"),
)
