"""Levels of few bits: how they are spread over a tensor, and their scales and zero points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from optcompiler.errors import InputError

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

INTEGER_RANGES: Mapping[str, tuple[int, int]] = {
    "INT4": (-8, 7),
    "UINT4": (0, 15),
    "INT8": (-128, 127),
    "UINT8": (0, 255),
    "INT16": (-32768, 32767),
    "UINT16": (0, 65535),
}
"""Least and greatest level by ONNX type name."""

FLOAT8: Mapping[str, float] = {"FLOAT8E4M3FN": 448.0, "FLOAT8E5M2": 57344.0}
"""Greatest finite value by ONNX type name (Micikevicius et al., "FP8 Formats", 2022)."""


@dataclass(frozen=True)
class QuantizationScheme:
    """What the levels of a tensor are, and how many of its elements share a scale.

    `dtype` is an ONNX type name of `INTEGER_RANGES` or `FLOAT8`. A scale is for the whole tensor,
    for an index of `axis`, or with `block` for so many elements along `axis`. `symmetric` levels
    have no zero point but the type's middle. Raises `InputError` for what does not go together.
    """

    dtype: str
    axis: int | None = None
    block: int = 0
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in INTEGER_RANGES and self.dtype not in FLOAT8:
            known = ", ".join([*INTEGER_RANGES, *FLOAT8])
            raise InputError(f"no levels of type {self.dtype!r}; take one of {known}.")
        if self.block < 0 or self.block == 1:
            raise InputError(f"block={self.block}; take 0 for none, or two elements and more.")
        if self.block and self.axis is None:
            raise InputError(f"block={self.block} needs the axis that it divides.")
        if self.dtype in FLOAT8 and not self.symmetric:
            raise InputError(f"{self.dtype} has a zero of its own; leave symmetric as it is.")

    @property
    def bits(self) -> int:
        """Of one level."""
        if self.dtype in FLOAT8:
            return 8
        least, greatest = INTEGER_RANGES[self.dtype]
        return (greatest - least).bit_length()

    @property
    def range_bits(self) -> int:
        """Bits of the integers that an observer's range is for: floats are finer near zero than
        integers of as many bits, so clipping gains them nothing and 16 is said."""
        return 16 if self.dtype in FLOAT8 else self.bits

    @property
    def granularity(self) -> str:
        """ "per tensor", "per channel" or "per block"."""
        return "per block" if self.block else "per tensor" if self.axis is None else "per channel"

    def parameters(self, low: float, high: float) -> tuple[np.float32, int]:
        """Scale and zero point of a tensor with values in [low, high]: `quantization_parameters`,
        or for floats the scale that takes the greatest magnitude to the type's greatest value."""
        if self.dtype in FLOAT8:
            bound = max(-low, high)
            if not math.isfinite(bound):
                raise InputError(f"the range [{low}, {high}] is not finite; check the data.")
            return np.float32(max(bound / FLOAT8[self.dtype], _TINY) if bound else 1.0), 0
        return quantization_parameters(low, high, self.dtype, self.symmetric)

    def __str__(self) -> str:
        kind = "" if self.symmetric else ", with zero points"
        size = f" of {self.block}" if self.block else ""
        return f"{self.dtype.lower()} {self.granularity}{size}{kind}"


_TINY = float(np.finfo(np.float32).tiny) * 256


def quantization_parameters(
    low: float, high: float, dtype: str, symmetric: bool = False
) -> tuple[np.float32, int]:
    """Scale and zero point of the integer type `dtype` (an ONNX name) for values in [low, high].

    The interval is widened to hold zero, and zero is represented exactly. Symmetric signed types
    use the levels from -(2**(bits - 1) - 1) and zero point 0. The scale is never 0 or subnormal;
    scale * (levels above zero) does not exceed a `high` whose `low` is 0, so that a quantiser after
    a Relu or a Clip implies it. Formula: Jacob et al., "Quantization and Training of Neural
    Networks for Efficient Integer-Arithmetic-Only Inference", 2018, section 2.1. Raises
    `InputError` for other types and for bounds that are not finite.
    """
    if dtype not in INTEGER_RANGES:
        raise InputError(f"cannot quantise to {dtype}; take one of {', '.join(INTEGER_RANGES)}.")
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"the range [{low}, {high}] is not finite; check the calibration data.")
    least, greatest = INTEGER_RANGES[dtype]
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        bound = max(-low, high)
        if least < 0:
            return np.float32(max(bound / greatest, _TINY) if bound else 1.0), 0
        half = (greatest + 1) // 2
        return np.float32(max(bound / (half - 1), _TINY) if bound else 1.0), half
    if low == high:
        return np.float32(1.0), least if least == 0 else 0
    scale = np.float32(max((high - low) / (greatest - least), _TINY))
    if low == 0.0 and float(scale) * (greatest - least) > high and scale > _TINY:
        scale = np.nextafter(scale, np.float32(0.0))
    zero_point = round(least - low / float(scale))
    return scale, min(max(zero_point, least), greatest)


def weight_scales(
    weight: Array, dtype: str = "INT8", axis: int | None = None, method: str = "mse"
) -> Float32:
    """Symmetric scales of a float weight: one per index of `axis` ([C]), or one for all ([]).

    `method` is "minmax" (largest magnitude over the greatest level) or "mse" (the largest magnitude
    times the factor in [0.5, 1] whose rounding and clipping error is least; for floats as "minmax",
    since their levels lie closest around zero). A channel of zeros gets the largest of the other
    scales. Raises `InputError` for another method and for weights that are not finite.
    """
    if method not in ("minmax", "mse"):
        raise InputError(f"weight observer {method!r} is not known; take minmax or mse.")
    floats = dtype in FLOAT8
    greatest = FLOAT8[dtype] if floats else INTEGER_RANGES[dtype][1]
    rows = np.asarray(weight, np.float32)
    rows = rows.reshape(1, -1) if axis is None else np.moveaxis(rows, axis, 0)
    rows = np.ascontiguousarray(rows.reshape(rows.shape[0], -1))
    largest = np.abs(rows).max(axis=1, initial=0.0)
    if not np.isfinite(largest).all():
        raise InputError("weights hold NaN or infinity; fix the checkpoint.")
    largest[largest < np.finfo(np.float32).tiny * 65536] = 0.0
    best = largest / greatest
    if method == "mse" and rows.shape[1] > 1 and not floats:
        best = _least_error(rows, best, int(greatest))
    fallback = float(best.max(initial=0.0)) or 1.0
    best = np.where(largest > 0, best, np.float32(fallback)).astype(np.float32)
    return best if axis is not None else best.reshape(())


_SAMPLE = 8192
"""Weights of a channel looked at in the search; above that, an even stride is taken."""


def _least_error(rows: Float32, full: Float32, greatest: int) -> Float32:
    stride = max(1, rows.shape[1] // _SAMPLE)
    sample = rows[:, ::stride]
    safe = np.where(full > 0, full, np.float32(1.0))
    best = full.copy()
    least = np.full(len(rows), np.inf)
    for factor in np.linspace(1.0, 0.5, 26, dtype=np.float32):
        scale = (safe * factor)[:, None]
        levels = np.rint(sample / scale)
        np.clip(levels, -greatest - 1, greatest, out=levels)
        error = np.square(sample - levels * scale).sum(axis=1, dtype=np.float64)
        better = error < least
        least = np.where(better, error, least)
        best = np.where(better & (full > 0), full * factor, best)
    return best


def quantize_array(
    array: Array, scale: Array, zero_point: Array | None, dtype: str, axis: int = 1, block: int = 0
) -> Array:
    """ONNX QuantizeLinear's levels: saturate(round_half_even(array / scale) + zero_point), int64.

    Those of `FLOAT8` are array / scale rounded to the type, in which they are returned. `scale` is
    [], [C] along `axis`, or blocked along `axis` with `block` values per scale; float32 arithmetic
    as the operator specifies.
    """
    x = np.asarray(array, np.float32)
    s = spread(np.asarray(scale, np.float32), x.shape, axis, block)
    if dtype in FLOAT8:
        bound = np.float32(FLOAT8[dtype])
        return np.clip(np.nan_to_num(x / s), -bound, bound).astype(ir.DataType[dtype].numpy())
    least, greatest = INTEGER_RANGES[dtype]
    zero = 0 if zero_point is None else spread(np.asarray(zero_point), x.shape, axis, block)
    levels = np.rint(np.nan_to_num(x / s)).astype(np.float64) + np.asarray(zero, np.float64)
    return np.clip(levels, least, greatest).astype(np.int64)


def spread(parameter: Array, shape: tuple[int, ...], axis: int, block: int = 0) -> Array:
    """A scale or zero point made broadcastable to a tensor of `shape`."""
    if parameter.size == 1:
        return parameter.reshape(())
    axis %= len(shape)
    if block:
        return np.repeat(parameter, block, axis=axis)[tuple(slice(0, n) for n in shape)]
    return parameter.reshape([-1 if i == axis else 1 for i in range(len(shape))])
