"""Observers: from the values seen in calibration to a range.

An observer reads any number of arrays in constant memory. The built-in ones share a histogram whose
bins are aligned to zero and have a power of two for width, so that widening it merges whole bins:
the result does not depend on the order of the batches, and nothing is resampled.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Seen:
    """What an observer knows of the values it saw, for the ledger.

    `low` and `high` are the least and the greatest finite value, `zeros` how many were 0; the
    others are counted around `centres` ([bins], ascending; both empty for an observer that keeps no
    distribution).
    """

    low: float
    high: float
    zeros: int
    centres: Float64
    counts: Float64


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

    def summary(self) -> Seen | None:
        """How the values were spread, for the ledger; None where nothing is known of it."""
        return None


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

    def summary(self) -> Seen | None:
        if not math.isfinite(self._low):
            return None
        return Seen(self._low, self._high, self._zeros, *self._bins())

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


class MovingAverageObserver(MinMaxObserver):
    """The extremes of each batch, averaged: a later batch counts for `momentum` of the average.

    The order of batches matters, as it does for Jacob et al. ("Quantization and Training of Neural
    Networks for Efficient Integer-Arithmetic-Only Inference", 2018, section 3.1).
    """

    name = "moving-average"

    def __init__(self, momentum: float = 0.1) -> None:
        super().__init__()
        if not 0.0 < momentum <= 1.0:
            raise InputError(f"momentum={momentum}; give a number above 0, at most 1.")
        self.momentum = momentum

    def update(self, array: Array) -> None:
        before = self._low, self._high
        self._low, self._high = math.inf, -math.inf
        super().update(array)
        if not math.isfinite(self._low):
            self._low, self._high = before
        elif math.isfinite(before[0]):
            kept = 1.0 - self.momentum
            self._low = kept * before[0] + self.momentum * self._low
            self._high = kept * before[1] + self.momentum * self._high


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


class EntropyObserver(_HistogramObserver):
    """The clipping whose levels lose least information: the least Kullback-Leibler divergence of
    the quantised histogram from that of the values, clipped ones counted at the ends (Migacz,
    "8-bit Inference with TensorRT", GTC 2017). Zeros do not count.
    """

    name = "entropy"

    def range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        low, high = self._extremes()
        if low == high:
            return low, high
        centres, counts = self._bins()
        low, high = _symmetric(low, high, symmetric)

        def divergence(share: float) -> float:
            return _divergence(centres, counts, low * share, high * share, 2**bits)

        best = min(np.linspace(1.0, 0.1, 91), key=divergence)
        return low * float(best), high * float(best)


def _divergence(centres: Float64, counts: Float64, low: float, high: float, levels: int) -> float:
    """KL(values || quantised values) over the bins, where a level spreads over its bins evenly."""
    inside = (centres >= low) & (centres <= high)
    if not inside.any():
        return math.inf
    kept = counts[inside]
    clipped = kept.copy()
    clipped[0] += counts[centres < low].sum()
    clipped[-1] += counts[centres > high].sum()
    level = np.clip(np.floor((centres[inside] - low) / (high - low) * levels), 0, levels - 1)
    _, which = np.unique(level, return_inverse=True)
    spread_counts = (np.bincount(which, kept) / np.bincount(which))[which]
    p, q = clipped / clipped.sum(), spread_counts / spread_counts.sum()
    return float(np.sum(p * np.log(p / q)))


def builtin_observers() -> tuple[type[Observer], ...]:
    """The observers that come with optcompiler."""
    return (MinMaxObserver, MovingAverageObserver, PercentileObserver, MseObserver, EntropyObserver)


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
