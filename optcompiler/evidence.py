"""What a quantising pass knows of a candidate, as plain data for the ledger.

A pass puts this into `Candidate.details`, from where it goes to `ledger.json`; `explain` and the
report only read it. Figures have four digits: the ledger stays small, and sums of floats in another
order do not change its bytes. Scales are written in full.

    "observed"     by value: what calibration saw; at the first candidate that reads the value
    "activations"  by value: type, range, scale and zero point, and what they lose
    "weight"       type, range, scales, and what they lose
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from optcompiler.observers import Seen
from optcompiler.quantization import (
    FLOAT8,
    INTEGER_RANGES,
    QuantizationScheme,
    quantize_array,
    spread,
)

Array = npt.NDArray[Any]

OBSERVED, ACTIVATIONS, WEIGHT = "observed", "activations", "weight"

BARS = 32
"""Bins of a histogram in the ledger."""

SAMPLE = 1 << 20
"""Elements of a weight that are looked at; above that, an even stride along an axis is taken."""


def observed(seen: Seen) -> dict[str, Any]:
    """How the values of one tensor were spread in calibration.

    `low` and `high` are the least and the greatest, `values` how many there were, `zeros` the share
    that was exactly 0, and `histogram` how many of the others fell into each of `BARS` equal parts
    of [low, high]. An observer that keeps no distribution knows the extremes alone.
    """
    told: dict[str, Any] = {"low": figure(seen.low), "high": figure(seen.high)}
    total = int(seen.counts.sum()) + seen.zeros
    if not total:
        return told
    told |= {"values": total, "zeros": figure(seen.zeros / total)}
    if seen.high > seen.low:
        share = (seen.centres - seen.low) / (seen.high - seen.low)
        places = np.clip(np.floor(share * BARS), 0, BARS - 1).astype(np.int64)
        counts = np.bincount(places, weights=seen.counts, minlength=BARS)
        told["histogram"] = [int(c) for c in counts]
    return told


def activation(seen: Seen | None, dtype: str, scale: float, zero_point: int) -> dict[str, Any]:
    """One quantiser of an activation: `type` (an ONNX name), the range of its levels, `scale`,
    `zero_point`; `clipped`, the share of values further than half a level outside of the range; and
    `sqnr_db`, 10 log10 of the power of the values over that of the quantisation error, both from
    the observer's histogram."""
    least, greatest = _bounds(dtype)
    low, high = (least - zero_point) * scale, (greatest - zero_point) * scale
    told: dict[str, Any] = {
        "type": dtype, "low": figure(low), "high": figure(high), "scale": _shortest(scale),
        "zero_point": int(zero_point),
    }  # fmt: skip
    if seen is None or not (total := int(seen.counts.sum()) + seen.zeros):
        return told
    centres, counts = seen.centres, seen.counts
    levels = quantize_array(centres, np.asarray(scale), np.asarray(zero_point), dtype)
    levels = levels.astype(np.float64) - zero_point
    outside = (centres < low - scale / 2) | (centres > high + scale / 2)
    return told | _lost(
        float((counts * centres**2).sum()),
        float((counts * (levels * scale - centres) ** 2).sum()),
        float(counts[outside].sum()) / total,
    )


def weight(
    array: Array, scales: Array, scheme: QuantizationScheme, zero_points: Array | None = None
) -> dict[str, Any]:
    """One quantiser of a weight: `type`, the weight's least and greatest value, `scales` (how many,
    the least, the median, the greatest), `clipped` and `sqnr_db` as in `activation`.

    `scales` is [], [C] along the axis of `scheme`, or in its blocks along that axis; `zero_points`
    has its shape and is None for zeros.
    """
    axis, block = scheme.axis or 0, scheme.block
    none = np.zeros((), np.float32)
    shifts = none if zero_points is None else zero_points
    array, *looked = _sampled(scheme, array, scales, shifts)
    step, zeros = (spread(np.asarray(p, np.float64), array.shape, axis, block) for p in looked)
    levels = quantize_array(array, looked[0], looked[1], scheme.dtype, axis, block)
    exact = array.astype(np.float64)
    least, greatest = _bounds(scheme.dtype)
    outside = (exact < (least - zeros - 0.5) * step) | (exact > (greatest - zeros + 0.5) * step)
    flat = np.asarray(scales).reshape(-1)
    told: dict[str, Any] = {
        "type": scheme.dtype,
        "low": figure(exact.min(initial=math.inf)), "high": figure(exact.max(initial=-math.inf)),
        "scales": {
            "count": int(flat.size), "min": figure(flat.min()), "median": figure(np.median(flat)),
            "max": figure(flat.max()),
        },
    }  # fmt: skip
    if block:
        told["block"] = block
    return told | _lost(
        float((exact**2).sum()),
        float((((levels.astype(np.float64) - zeros) * step - exact) ** 2).sum()),
        float(outside.mean()),
    )


def _bounds(dtype: str) -> tuple[float, float]:
    if dtype in FLOAT8:
        return -FLOAT8[dtype], FLOAT8[dtype]
    return INTEGER_RANGES[dtype]


def _sampled(scheme: QuantizationScheme, array: Array, *parameters: Array) -> list[Array]:
    """Every so many-th index along the longest axis that has no scales of its own."""
    every = [np.asarray(array), *map(np.asarray, parameters)]
    stride = -(-every[0].size // SAMPLE)
    shape, axis = every[0].shape, scheme.axis
    others = [i for i in range(len(shape)) if axis is None or i != axis % len(shape)]
    if stride <= 1 or not others:
        return every
    along = max(others, key=lambda i: shape[i])
    chosen = (slice(None),) * along + (slice(None, None, stride),)
    return [every[0][chosen], *(p[chosen] if scheme.block and p.ndim else p for p in every[1:])]


def _lost(power: float, noise: float, clipped: float) -> dict[str, Any]:
    told: dict[str, Any] = {"clipped": figure(clipped)}
    if power > 0 and noise > 0:
        told["sqnr_db"] = figure(10 * math.log10(power / noise))
    return told


def figure(value: Any) -> float:
    """A number with four digits that matter."""
    return float(f"{float(value):.4g}")


def _shortest(value: Any) -> float:
    """A float32 as the shortest decimal that is read back as it."""
    return float(str(np.float32(value)))
