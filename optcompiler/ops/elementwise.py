"""Arithmetic, mathematics, comparisons, logic and bits, element by element."""

from __future__ import annotations

import functools
from typing import Any
from typing import cast as cast_type

import onnx_ir as ir
import torch

from optcompiler.ops.costs import DIVISION, TRANSCENDENTAL, pointwise_cost, variadic_cost
from optcompiler.ops.declare import op
from optcompiler.ops.spec import OpSpec, TypeLookup
from optcompiler.ops.types import (
    FLOAT8,
    INTEGER_RANGES,
    carrier_type,
    from_carrier,
    onnx_type,
    to_carrier,
    torch_type,
)

Tensor = torch.Tensor


def div(a: Tensor, b: Tensor) -> Tensor:
    """Quotient; integers truncate towards zero."""
    if a.is_floating_point() or a.is_complex():
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """Remainder with the sign of the divisor, or of the dividend when `fmod` is 1."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def power(base: Tensor, exponent: Tensor | float | list[int]) -> Tensor:
    """`base ** exponent` in the type of `base`."""
    if isinstance(exponent, list):
        exponent = torch.tensor(exponent, device=base.device)
    return torch.pow(base, exponent).to(base.dtype)


def total(*operands: Tensor) -> Tensor:
    return functools.reduce(torch.add, operands)


def mean(*operands: Tensor) -> Tensor:
    return total(*operands) / len(operands)


def maximum(*operands: Tensor) -> Tensor:
    return functools.reduce(torch.maximum, operands)


def minimum(*operands: Tensor) -> Tensor:
    return functools.reduce(torch.minimum, operands)


def reciprocal(x: Tensor) -> Tensor:
    return torch.reciprocal(x).to(x.dtype)


def rounded(x: Tensor) -> Tensor:
    """Nearest integer, halves to even."""
    return torch.round(x)


def _scalar(bound: Any) -> Any:
    return cast_type("list[Any]", bound)[0] if isinstance(bound, list) else bound


def clip(
    x: Tensor,
    low: Tensor | float | None = None,
    high: Tensor | float | None = None,
    *,
    min: float | None = None,
    max: float | None = None,
) -> Tensor:
    """Clamp to [low, high]; the bounds were attributes before opset 11."""
    low = _scalar(min if low is None else low)
    high = _scalar(max if high is None else high)
    if low is None and high is None:
        return x
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        below = x if low is None else torch.maximum(x, torch.as_tensor(low, dtype=x.dtype))
        return below if high is None else torch.minimum(below, torch.as_tensor(high, dtype=x.dtype))
    return torch.clamp(x, low, high)


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


def bit_shift(a: Tensor, b: Tensor, *, direction: str) -> Tensor:
    """Logical shift of unsigned integers by `b` bits; shifting all bits out gives 0."""
    if direction == "LEFT":
        return torch.bitwise_left_shift(a, b.to(a.dtype))
    return torch.bitwise_right_shift(a, b.to(a.dtype))


def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    x = x.float() if x.dtype in FLOAT8 else x
    if detect_negative and detect_positive:
        return torch.isinf(x)
    if detect_negative:
        return torch.isneginf(x)
    return torch.isposinf(x) if detect_positive else torch.zeros_like(x, dtype=torch.bool)


def is_nan(x: Tensor) -> Tensor:
    return torch.isnan(x.float() if x.dtype in FLOAT8 else x)


def logical_xor(a: Tensor, b: Tensor) -> Tensor:
    return torch.logical_xor(a, b)


def identity(x: Any) -> Any:
    return x


_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FLOAT8_MAX = {
    torch.float8_e4m3fn: 448.0,
    torch.float8_e4m3fnuz: 240.0,
    torch.float8_e5m2: 57344.0,
    torch.float8_e5m2fnuz: 57344.0,
}


def to_float4(x: Tensor) -> Tensor:
    """The nearest float4e2m1 values (ties to even mantissa, saturating), held in float32."""
    magnitude = x.float().abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    nearest = torch.clamp(torch.round(magnitude / step) * step, max=_FLOAT4[-1])
    return torch.copysign(nearest, x.float())


def to_float8(x: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
    """Cast to a float8 type; out of range saturates, or becomes infinite or NaN."""
    limit = _FLOAT8_MAX.get(dtype)
    if limit is None:
        return x.to(dtype)
    wide = x.float()
    if saturate:
        bounded = torch.clamp(wide, -limit, limit)
        return torch.where(torch.isnan(wide), wide, bounded).to(dtype)
    bits = x.to(dtype)
    if dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e4m3fn):
        # Halfway past the largest value rounds back to it; beyond that there is only NaN.
        step = limit * (1 / 16 if "e4m3" in str(dtype) else 1 / 8) / 1.75
        over = ~(wide.abs() < limit + step) & ~torch.isnan(wide)
        return torch.where(over, torch.full_like(wide, float("nan")), bits.float()).to(dtype)
    return bits


def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str | None = None) -> Tensor:
    """Convert to ONNX type `to`: floats truncate to integers, narrow integers wrap."""
    kind = ir.DataType(to)
    source = x.float() if x.dtype in FLOAT8 else x
    if kind == ir.DataType.FLOAT4E2M1:
        return to_float4(source)
    if kind == ir.DataType.FLOAT8E8M0:
        return to_e8m0(source, round_mode or "up", bool(saturate))
    target = carrier_type(kind)
    if target in FLOAT8:
        return to_float8(source, target, bool(saturate))
    if kind in INTEGER_RANGES and source.dtype != torch.bool:
        return _to_integer(source, kind, target)
    return source.to(target)


def to_e8m0(x: Tensor, round_mode: str, saturate: bool) -> Tensor:
    """Powers of two from 2**-127 to 2**127; `round_mode` is "up", "down" or "nearest"."""
    wide = x.double().abs()
    exponent = torch.log2(wide)
    if round_mode == "up":
        exponent = torch.ceil(exponent)
    elif round_mode == "down":
        exponent = torch.floor(exponent)
    else:
        low = torch.floor(exponent)
        exponent = torch.where(wide >= 1.5 * torch.exp2(low), low + 1, low)
    bits = exponent + 127
    special = torch.isnan(x) | torch.isinf(x) & (not saturate)
    if saturate:
        bits = torch.clamp(bits, 0, 254)
    else:
        special = special | (bits > 254) | (bits < 0)
    bits = torch.where(special, torch.full_like(bits, 255.0), bits)
    return bits.to(torch.uint8).view(torch.float8_e8m0fnu)


def _to_integer(x: Tensor, kind: ir.DataType, target: torch.dtype) -> Tensor:
    low, high = INTEGER_RANGES[kind]
    if high >= 2**31 - 1 or (torch_type(kind) == target and high > 15):
        # A float beyond int64 has no defined conversion; through int64 narrower types wrap.
        return x.to(torch.int64).to(target) if x.is_floating_point() else x.to(target)
    count = high - low + 1
    return (torch.remainder(x.to(torch.int64) - low, count) + low).to(target)


def cast_like(
    x: Tensor,
    like: Tensor,
    *,
    to: int | None = None,
    saturate: int = 1,
    round_mode: str | None = None,
) -> Tensor:
    """Convert to the declared type of `like`, given as `to` where it is known."""
    kind = onnx_type(like.dtype) if to is None else to
    return cast(x, to=kind, saturate=saturate, round_mode=round_mode)


def _like_type(node: ir.Node, type_of: TypeLookup) -> dict[str, Any]:
    dtype = type_of(node.inputs[1]) or type_of(node.outputs[0])
    return {} if dtype is None else {"to": int(dtype)}


def bit_cast(x: Tensor, *, to: int, source: int | None = None) -> Tensor:
    """The same bits read as ONNX type `to`, of equal width."""
    bits = x if source is None else from_carrier(x, torch_type(source))
    return to_carrier(bits.view(torch_type(to)))


def _source_type(node: ir.Node, type_of: TypeLookup) -> dict[str, Any]:
    kind = type_of(node.inputs[0])
    return {} if kind is None else {"source": int(kind)}


def _pointwise(op_type: str, meaning: Any, weight: int = 1, **options: Any) -> OpSpec:
    return op(op_type, meaning, pointwise_cost(weight), pointwise=True, **options)


SPECS: tuple[OpSpec, ...] = (
    _pointwise("Add", torch.add, since=7),
    _pointwise("Sub", torch.sub, since=7),
    _pointwise("Mul", torch.mul, since=7),
    _pointwise("Div", div, DIVISION, since=7),
    _pointwise("Mod", mod, DIVISION, since=10),
    _pointwise("Pow", power, TRANSCENDENTAL, since=7, static=(1,)),
    _pointwise("Neg", torch.neg),
    _pointwise("Abs", torch.abs),
    _pointwise("Sign", torch.sign),
    _pointwise("Reciprocal", reciprocal, DIVISION),
    _pointwise("Sqrt", torch.sqrt, DIVISION),
    _pointwise("Exp", torch.exp, TRANSCENDENTAL),
    _pointwise("Log", torch.log, TRANSCENDENTAL),
    _pointwise("Sin", torch.sin, TRANSCENDENTAL),
    _pointwise("Cos", torch.cos, TRANSCENDENTAL),
    _pointwise("Tan", torch.tan, TRANSCENDENTAL),
    _pointwise("Asin", torch.asin, TRANSCENDENTAL),
    _pointwise("Acos", torch.acos, TRANSCENDENTAL),
    _pointwise("Atan", torch.atan, TRANSCENDENTAL),
    _pointwise("Sinh", torch.sinh, TRANSCENDENTAL),
    _pointwise("Cosh", torch.cosh, TRANSCENDENTAL),
    _pointwise("Asinh", torch.asinh, TRANSCENDENTAL),
    _pointwise("Acosh", torch.acosh, TRANSCENDENTAL),
    _pointwise("Atanh", torch.atanh, TRANSCENDENTAL),
    _pointwise("Erf", torch.erf, TRANSCENDENTAL),
    _pointwise("Ceil", torch.ceil),
    _pointwise("Floor", torch.floor),
    _pointwise("Round", rounded),
    _pointwise("Clip", clip, 2, static=(1, 2)),
    op("Sum", total, variadic_cost, pointwise=True, since=8),
    op("Mean", mean, variadic_cost, pointwise=True, since=8),
    op("Max", maximum, variadic_cost, pointwise=True, since=8),
    op("Min", minimum, variadic_cost, pointwise=True, since=8),
    _pointwise("Where", where, since=9),
    _pointwise("Equal", torch.eq, since=7),
    _pointwise("Less", torch.lt, since=7),
    _pointwise("LessOrEqual", torch.le, since=12),
    _pointwise("Greater", torch.gt, since=7),
    _pointwise("GreaterOrEqual", torch.ge, since=12),
    _pointwise("And", torch.logical_and, since=7),
    _pointwise("Or", torch.logical_or, since=7),
    _pointwise("Xor", logical_xor, since=7),
    _pointwise("Not", torch.logical_not),
    _pointwise("BitwiseAnd", torch.bitwise_and, since=18),
    _pointwise("BitwiseOr", torch.bitwise_or, since=18),
    _pointwise("BitwiseXor", torch.bitwise_xor, since=18),
    _pointwise("BitwiseNot", torch.bitwise_not, since=18),
    _pointwise("BitShift", bit_shift, since=11),
    _pointwise("IsInf", is_inf, since=10),
    _pointwise("IsNaN", is_nan, since=9),
    _pointwise("Identity", identity, 0, levels="moves"),
    _pointwise("Cast", cast, since=6),
    _pointwise("CastLike", cast_like, since=15, facts=_like_type),
    _pointwise("BitCast", bit_cast, since=26, facts=_source_type),
)
