"""QuantizeLinear and DequantizeLinear as a differentiable fake-quantise.

Quantised levels live in a float tensor. Rounding and clamping pass gradients straight through, and
the gradient of the scale is that of Esser et al., "Learned Step Size Quantization" (ICLR 2020),
equation 3, split between the two operators: QuantizeLinear gives -x / s² inside the range and
DequantizeLinear gives the centred level, which sum to round(x / s) - x / s inside and to the
clamped level outside. The paper's gradient scale (section 2.2) is left to the optimiser.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from optcompiler.ops.contraction import conv
from optcompiler.ops.costs import DIVISION, pointwise_cost, qlinear_conv_cost, traffic
from optcompiler.ops.costs import elements as count_elements
from optcompiler.ops.declare import op
from optcompiler.ops.elementwise import to_float4, to_float8
from optcompiler.ops.spec import OpSpec, TypeLookup, Work
from optcompiler.ops.types import INTEGER_RANGES, carrier_type, onnx_type

Tensor = torch.Tensor


class _Levels(torch.autograd.Function):
    """clamp(round(x / s) + z, low, high), straight through to x, LSQ to s, clamped to z."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.bounds = (low, high)
        return torch.clamp(torch.round(x / scale) + zero, low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, scale, zero = ctx.saved_tensors
        low, high = ctx.bounds
        (gradient,) = gradients
        ratio = x / scale
        level = torch.round(ratio) + zero
        inside = gradient * ((level >= low) & (level <= high))
        grad_x = grad_scale = grad_zero = None
        if ctx.needs_input_grad[0]:
            grad_x = (inside / scale).sum_to_size(x.shape)
        if ctx.needs_input_grad[1]:
            grad_scale = (-inside * ratio / scale).sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            grad_zero = inside.sum_to_size(zero.shape)
        return grad_x, grad_scale, grad_zero, None, None


def _aligned(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point in a shape that broadcasts against `x`."""
    if block_size:
        repeated = parameter.repeat_interleave(block_size, dim=axis)
        return repeated.narrow(axis, 0, x.shape[axis])
    if parameter.numel() == 1:
        return parameter.reshape(())
    shape = [1] * x.dim()
    shape[axis] = parameter.numel()
    return parameter.reshape(shape)


def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    saturate: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    target: int | None = None,
) -> Tensor:
    """Levels of ONNX type `target` in a float32 tensor; halves round to even, then saturate.

    `scale` and `zero_point` are per tensor, per slice of `axis`, or per block of `axis`.
    """
    if target is None:
        target = ir.DataType.UINT8 if zero_point is None else onnx_type(zero_point.dtype)
    kind = ir.DataType(target)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    step = _aligned(scale, x, axis, block_size).to(wide.dtype)
    zero = (
        torch.zeros((), dtype=wide.dtype, device=x.device)
        if zero_point is None
        else _aligned(zero_point, x, axis, block_size).to(wide.dtype)
    )
    bounds = INTEGER_RANGES.get(kind)
    if bounds is not None:
        return _Levels.apply(wide, step, zero, *bounds)  # type: ignore[no-any-return]
    ratio = wide / step + zero
    with torch.no_grad():
        if kind == ir.DataType.FLOAT4E2M1:
            rounded = to_float4(ratio)
        else:
            rounded = to_float8(ratio, carrier_type(kind), bool(saturate)).to(wide.dtype)
    limit = torch.amax(torch.abs(rounded)) if rounded.numel() else rounded.sum()
    inside = torch.clamp(ratio, -limit, limit)
    return torch.where(torch.isfinite(rounded), inside + (rounded - inside).detach(), rounded)


def _levels_type(node: ir.Node, type_of: TypeLookup) -> dict[str, Any]:
    """The type of a QuantizeLinear's levels: declared, or that of the zero point, or uint8."""
    attribute = node.attributes.get("output_dtype")
    if attribute is not None and not attribute.is_ref() and int(attribute.value):
        return {"target": int(attribute.value)}
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is None:
        return {"target": int(ir.DataType.UINT8)}
    kind = type_of(zero) or type_of(node.outputs[0])
    return {} if kind is None else {"target": int(kind)}


def dequantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """`(x - zero_point) * scale` in the scale's type, or in `output_dtype`."""
    kind = carrier_type(output_dtype) if output_dtype else scale.dtype
    wide = kind if kind in (torch.float32, torch.float64) else torch.float32
    if x.dtype == torch.int32:
        levels = x.double() if zero_point is None else x.double() - zero_point.double()
        levels = levels.to(wide)
    else:
        levels = x.to(wide)
        if zero_point is not None:
            levels = levels - _aligned(zero_point.to(wide), x, axis, block_size)
    return (levels * _aligned(scale, x, axis, block_size).to(wide)).to(kind)


def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 levels, scale and zero point from the range of `x` extended to hold 0."""
    low = torch.clamp(torch.amin(x), max=0)
    high = torch.clamp(torch.amax(x), min=0)
    scale = (high - low) / 255
    zero = torch.clamp(torch.round(-low / torch.where(scale == 0, 1, scale)), 0, 255)
    levels = torch.clamp(torch.round(x / torch.where(scale == 0, 1, scale)) + zero, 0, 255)
    return levels.to(torch.uint8), scale, zero.to(torch.uint8)


def qlinear_matmul(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor,
    y_scale: Tensor, y_zero: Tensor, *, target: int,
) -> Tensor:  # fmt: skip
    """Quantised product: dequantise, multiply, quantise."""
    product = torch.matmul(_real(a, a_scale, a_zero, -1), _real(b, b_scale, b_zero, None))
    return _requantized(product, y_scale, y_zero, target)


def qlinear_conv(
    x: Tensor, x_scale: Tensor, x_zero: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor,
    y_scale: Tensor, y_zero: Tensor, bias: Tensor | None = None, *, target: int, **geometry: Any,
) -> Tensor:  # fmt: skip
    """Quantised convolution; int32 bias of scale `x_scale * w_scale`."""
    shape = [-1] + [1] * (w.dim() - 1)
    weight = (w.double() - w_zero.double().reshape(shape)) * w_scale.double().reshape(shape)
    offset = None if bias is None else bias.double() * (x_scale.double() * w_scale.double())
    y = conv(_real(x, x_scale, x_zero, None), weight, offset, **geometry)
    return _requantized(y, y_scale, y_zero, target)


def _real(x: Tensor, scale: Tensor, zero: Tensor, row_axis: int | None) -> Tensor:
    step, offset = scale.double(), zero.double()
    if row_axis is not None and step.dim() == 1 and step.numel() > 1:
        step, offset = step.unsqueeze(row_axis), offset.unsqueeze(row_axis)
    return (x.double() - offset) * step


def _requantized(y: Tensor, scale: Tensor, zero: Tensor, target: int) -> Tensor:
    kind = ir.DataType(target)
    levels = torch.round(y / scale.double()) + zero.double()
    return torch.clamp(levels, *INTEGER_RANGES[kind]).to(carrier_type(kind))


def _output_type(node: ir.Node, type_of: TypeLookup) -> dict[str, Any]:
    kind = type_of(node.inputs[7]) or type_of(node.outputs[0])
    return {"target": int(kind if kind is not None else ir.DataType.UINT8)}


def _qlinear_matmul_cost(node: ir.Node) -> Work:
    inner = node.inputs[0].shape[-1] if node.inputs[0] is not None and node.inputs[0].shape else 1
    out = count_elements(node.outputs[0])
    return traffic(node, macs=out * (inner if isinstance(inner, int) else 1), flops=4 * out)


SPECS: tuple[OpSpec, ...] = (
    op(
        "QuantizeLinear",
        quantize_linear,
        pointwise_cost(DIVISION),
        since=10,
        facts=_levels_type,
        pointwise=True,
    ),
    op(
        "DequantizeLinear",
        dequantize_linear,
        pointwise_cost(2),
        since=10,
        pointwise=True,
        levels="consumes",
    ),
    op("DynamicQuantizeLinear", dynamic_quantize_linear, pointwise_cost(DIVISION + 4), since=11),
    op(
        "QLinearMatMul",
        qlinear_matmul,
        _qlinear_matmul_cost,
        since=10,
        facts=_output_type,
        levels="consumes",
    ),
    op(
        "QLinearConv",
        qlinear_conv,
        qlinear_conv_cost,
        since=10,
        facts=_output_type,
        levels="consumes",
    ),
)
