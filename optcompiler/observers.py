"""Observers: from the values seen in calibration to a range, and on to scale and zero point.

An observer reads any number of arrays in constant memory. The built-in ones share a histogram whose
bins are aligned to zero and have a power of two for width, so that widening it merges whole bins:
the result does not depend on the order of the batches, and nothing is resampled.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from optcompiler.errors import InputError

if TYPE_CHECKING:
    import torch

    from optcompiler.ops import OpTable
    from optcompiler.program import Program
    from optcompiler.rewriting import Batch, Progress

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]

BINS = 4096

INTEGER_RANGES: Mapping[str, tuple[int, int]] = {
    "INT4": (-8, 7),
    "UINT4": (0, 15),
    "INT8": (-128, 127),
    "UINT8": (0, 255),
    "INT16": (-32768, 32767),
    "UINT16": (0, 65535),
}
"""Least and greatest level by ONNX type name."""


class Observer(ABC):
    """Reads values batch by batch and ends up with a range. One instance watches one tensor."""

    name: ClassVar[str]
    """How options and the command line call it."""

    @abstractmethod
    def update(self, array: Array) -> None:
        """Take in one batch of values, of any shape and any real type."""

    @abstractmethod
    def range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        """The interval that `2**bits` levels should cover: low <= 0 <= high, finite.

        With `symmetric`, low is -high. Raises `InputError` when no finite value was seen.
        """

    @property
    def non_finite(self) -> int:
        """How many of the values were NaN or infinite; they do not count in the range."""
        return 0


class _HistogramObserver(Observer):
    """Counts of finite non-zero values in `BINS` bins [k * width, (k + 1) * width)."""

    def __init__(self) -> None:
        self._counts: npt.NDArray[np.int64] = np.zeros(BINS, np.int64)
        self._exponent: int | None = None
        self._first = 0
        self._low = math.inf
        self._high = -math.inf
        self._zeros = 0
        self._non_finite = 0

    @property
    def non_finite(self) -> int:
        return self._non_finite

    def update(self, array: Array) -> None:
        values = np.asarray(array).reshape(-1)
        if values.dtype.name not in ("float32", "float64"):
            values = values.astype(np.float64)
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            kept = values[np.isfinite(values)]
            self._non_finite += values.size - kept.size
            if kept.size == 0:
                return
            values, low, high = kept, float(kept.min()), float(kept.max())
        self._low, self._high = min(self._low, low), max(self._high, high)
        if low == high == 0.0:
            self._zeros += values.size
            return
        width = self._cover(min(low, 0.0), max(high, 0.0))
        zeros = int(values.size - np.count_nonzero(values))
        index = np.floor(values / values.dtype.type(width)).astype(np.int64) - self._first
        counts = np.bincount(np.clip(index, 0, BINS - 1), minlength=BINS)
        counts[-self._first] -= zeros
        self._zeros += zeros
        self._counts += counts

    def _cover(self, low: float, high: float) -> float:
        """Widen the bins until they hold [low, high] beside what they hold; return the width."""
        if self._exponent is None:
            self._exponent = math.frexp((high - low) / (BINS - 2))[1]
            self._exponent = max(self._exponent, -140)
            self._first = math.floor(low / 2.0**self._exponent)
        while True:
            width = 2.0**self._exponent
            first = min(self._first, math.floor(low / width))
            last = max(self._last(), math.floor(high / width))
            if last - first < BINS:
                break
            self._halve()
        shifted = np.zeros_like(self._counts)
        offset = self._first - first
        shifted[offset:] = self._counts[: BINS - offset]
        self._counts, self._first = shifted, first
        return width

    def _last(self) -> int:
        filled = np.flatnonzero(self._counts)
        return self._first + (int(filled[-1]) if filled.size else 0)

    def _halve(self) -> None:
        assert self._exponent is not None
        new_first = self._first // 2
        target = (self._first + np.arange(BINS)) // 2 - new_first
        merged = np.zeros_like(self._counts)
        np.add.at(merged, target, self._counts)
        self._counts, self._first = merged, new_first
        self._exponent += 1

    def _extremes(self) -> tuple[float, float]:
        """Least and greatest value seen, zero included. Raises `InputError` when nothing was."""
        if not math.isfinite(self._low):
            raise InputError(
                "an observer saw no finite value; pass calibration batches that are not empty "
                "and hold no NaN."
            )
        return min(self._low, 0.0), max(self._high, 0.0)

    def _bins(self) -> tuple[Float64, Float64]:
        """Centres (clipped to the values seen) and counts of the bins that hold something."""
        filled = np.flatnonzero(self._counts)
        width = 2.0 ** (self._exponent or 0)
        low, high = self._extremes()
        centres = np.clip((self._first + filled + 0.5) * width, low, high).astype(np.float64)
        return centres, self._counts[filled].astype(np.float64)


def _symmetric(low: float, high: float, symmetric: bool) -> tuple[float, float]:
    bound = max(-low, high)
    return (-bound, bound) if symmetric else (low, high)


class MinMaxObserver(_HistogramObserver):
    """The least and the greatest value seen."""

    name = "minmax"

    def update(self, array: Array) -> None:
        values = np.asarray(array)
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            kept = values[np.isfinite(values)]
            self._non_finite += values.size - kept.size
            if kept.size == 0:
                return
            low, high = float(kept.min()), float(kept.max())
        self._low, self._high = min(self._low, low), max(self._high, high)

    def range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        return _symmetric(*self._extremes(), symmetric)


class PercentileObserver(_HistogramObserver):
    """Drops the outermost values: `percentile` of all values, zeros included, stay on each side."""

    name = "percentile"

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        if not 50.0 < percentile <= 100.0:
            raise InputError(f"percentile={percentile}; give a number above 50, at most 100.")
        self.percentile = percentile

    def range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        low, high = self._extremes()
        filled = np.flatnonzero(self._counts)
        width = 2.0 ** (self._exponent or 0)
        lefts = (self._first + filled) * width
        counts = self._counts[filled]
        tail = (1.0 - self.percentile / 100.0) * (int(counts.sum()) + self._zeros)
        above = np.cumsum(counts[::-1])[::-1]
        below = np.cumsum(counts)
        kept_high, kept_low = lefts[above > tail] + width, lefts[below > tail]
        high = min(high, max(float(kept_high[-1]) if kept_high.size else 0.0, 0.0))
        low = max(low, min(float(kept_low[0]) if kept_low.size else 0.0, 0.0))
        return _symmetric(low, high, symmetric)


class MseObserver(_HistogramObserver):
    """The clipping that makes the mean squared quantisation error least, by search over a grid.

    Both ends shrink together first, then each alone (Choukroun et al., "Low-bit Quantization of
    Neural Networks for Efficient Inference", 2019, uses the same criterion for activations).
    """

    name = "mse"

    def range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        low, high = self._extremes()
        if low == high:
            return low, high
        centres, counts = self._bins()
        low, high = _symmetric(low, high, symmetric)

        def error(bounds: tuple[float, float]) -> float:
            return _histogram_error(centres, counts, *bounds, bits, symmetric)

        grid = np.linspace(1.0, 0.1, 91)
        low, high = min(((low * a, high * a) for a in grid), key=error)
        if symmetric:
            return low, high
        fine = np.linspace(1.0, 0.5, 51)
        if low < 0:
            low = min(((low * a, high) for a in fine), key=error)[0]
        if high > 0:
            high = min(((low, high * a) for a in fine), key=error)[1]
        return low, high


def _histogram_error(
    centres: Float64, counts: Float64, low: float, high: float, bits: int, symmetric: bool
) -> float:
    levels = 2**bits - 1 - int(symmetric)
    scale = (high - low) / levels
    offset = round(low / scale)
    quantized = np.clip(np.rint(centres / scale), offset, offset + levels) * scale
    return float(np.dot((centres - quantized) ** 2, counts))


def builtin_observers() -> tuple[type[Observer], ...]:
    """The observers that come with optcompiler."""
    return (MinMaxObserver, PercentileObserver, MseObserver)


def observer_named(name: str) -> type[Observer]:
    """A built-in observer by its `name`; raises `InputError` listing the names."""
    found = {o.name: o for o in builtin_observers()}
    if name not in found:
        raise InputError(f"observer {name!r} is not known; take one of {', '.join(found)}.")
    return found[name]


def observe(
    program: Program,
    names: Sequence[str],
    batches: Sequence[Batch],
    make: Callable[[], Observer],
    ops: OpTable | None = None,
    progress: Progress | None = None,
) -> dict[str, Observer]:
    """Run `program` over `batches` once and let one new observer watch each named value.

    No value is kept after its last use, so memory does not grow with names or batches. Names must
    be values of the main graph that an output depends on. Raises `UnsupportedOperatorError` where
    the program holds an operator without a meaning in torch, and `InputError` for an unknown name.
    """
    from optcompiler import executor

    observers = {name: make() for name in names}
    module = executor.to_torch(program, ops, trainable=False)

    def seen(name: str, tensor: torch.Tensor) -> None:
        observers[name].update(tensor.detach().cpu().numpy())

    description = f"observing {len(observers)} values"
    items: Iterable[Batch] = progress.track(batches, description) if progress else batches
    for batch in items:
        executor.observe(module, batch, seen, names)
    return observers


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
    tiny = float(np.finfo(np.float32).tiny) * 256
    if symmetric:
        bound = max(-low, high)
        if least < 0:
            return np.float32(max(bound / greatest, tiny) if bound else 1.0), 0
        half = (greatest + 1) // 2
        return np.float32(max(bound / (half - 1), tiny) if bound else 1.0), half
    if low == high:
        return np.float32(1.0), least if least == 0 else 0
    scale = np.float32(max((high - low) / (greatest - least), tiny))
    if low == 0.0 and float(scale) * (greatest - least) > high and scale > tiny:
        scale = np.nextafter(scale, np.float32(0.0))
    zero_point = round(least - low / float(scale))
    return scale, min(max(zero_point, least), greatest)


def weight_scales(
    weight: Array, dtype: str = "INT8", axis: int | None = None, method: str = "mse"
) -> Float32:
    """Symmetric scales of a float weight: one per index of `axis` ([C]), or one for all ([]).

    `method` is "minmax" (largest magnitude over the greatest level) or "mse" (the largest magnitude
    times the factor in [0.5, 1] whose rounding and clipping error is least). A channel of zeros
    gets the largest of the other scales. Raises `InputError` for another method and for weights
    that are not finite.
    """
    if method not in ("minmax", "mse"):
        raise InputError(f"weight observer {method!r} is not known; take minmax or mse.")
    greatest = INTEGER_RANGES[dtype][1]
    rows = np.asarray(weight, np.float32)
    rows = rows.reshape(1, -1) if axis is None else np.moveaxis(rows, axis, 0)
    rows = np.ascontiguousarray(rows.reshape(rows.shape[0], -1))
    largest = np.abs(rows).max(axis=1, initial=0.0)
    if not np.isfinite(largest).all():
        raise InputError("weights hold NaN or infinity; fix the checkpoint.")
    largest[largest < np.finfo(np.float32).tiny * 65536] = 0.0
    best = largest / greatest
    if method == "mse" and rows.shape[1] > 1:
        best = _least_error(rows, best, greatest)
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
) -> npt.NDArray[np.int64]:
    """ONNX QuantizeLinear's integer levels: saturate(round_half_even(array / scale) + zero_point).

    `scale` is [], [C] along `axis`, or blocked along `axis` with `block` values per scale; float32
    arithmetic as the operator specifies.
    """
    least, greatest = INTEGER_RANGES[dtype]
    x = np.asarray(array, np.float32)
    s = spread(np.asarray(scale, np.float32), x.shape, axis, block)
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
