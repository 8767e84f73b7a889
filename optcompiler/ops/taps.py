"""Where each element of a resized axis comes from: taps and their weights, in numpy alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Taps = tuple[np.ndarray, np.ndarray, np.ndarray | None]


class Resampling(NamedTuple):
    """How one axis is resized: the attributes of Resize and what follows for the axis."""

    size: int
    target: int
    scale: float
    roi: tuple[float, float]
    transformation: str
    mode: str
    nearest_mode: str
    cubic_a: float
    exclude_outside: bool
    antialias: bool

    @staticmethod
    def of(
        shape: Sequence[int],
        roi: Sequence[float] | None,
        scales: Sequence[float] | None,
        sizes: Sequence[int] | None,
        attributes: Mapping[str, Any],
    ) -> Iterator[tuple[int, Resampling]]:
        """The axes that change, with how; `scales` go before `sizes`."""

        def given(name: str, default: Any) -> Any:
            value = attributes.get(name)
            return default if value is None else value

        axes = given("axes", None)
        dims = [a % len(shape) for a in axes] if axes is not None else list(range(len(shape)))
        lengths = [shape[a] for a in dims]
        factors = [float(s) for s in scales] if scales is not None else []
        if factors:
            targets = [math.floor(n * s) for n, s in zip(lengths, factors, strict=True)]
        else:
            targets = [int(n) for n in sizes] if sizes is not None else []
            factors = [t / n for t, n in zip(targets, lengths, strict=True)]
            policy = given("keep_aspect_ratio_policy", "stretch")
            if policy != "stretch":
                pick = min if policy == "not_larger" else max
                factors = [pick(factors)] * len(dims)
                targets = [math.floor(factors[0] * n + 0.5) for n in lengths]
        box = [float(v) for v in roi] if roi is not None else []
        box = box or [0.0] * len(dims) + [1.0] * len(dims)
        transformation = given("coordinate_transformation_mode", "half_pixel")
        crop = transformation == "tf_crop_and_resize"
        for i, axis in enumerate(dims):
            if targets[i] == lengths[i] and factors[i] == 1 and not crop:
                continue
            yield (
                axis,
                Resampling(
                    lengths[i],
                    targets[i],
                    factors[i],
                    (box[i], box[i + len(dims)]) if crop else (0.0, 1.0),
                    transformation,
                    given("mode", "nearest"),
                    given("nearest_mode", "round_prefer_floor"),
                    given("cubic_coeff_a", -0.75),
                    bool(given("exclude_outside", 0)),
                    bool(given("antialias", 0)),
                ),
            )


@functools.lru_cache(maxsize=256)
def taps_of(plan: Resampling) -> Taps:
    """Source indices [target, taps], weights [target, taps], and positions outside a crop."""
    size, scale, mode = plan.size, plan.scale, plan.mode
    position = _positions(size, plan.target, scale, plan.roi, plan.transformation)
    outside = None
    if plan.transformation == "tf_crop_and_resize":
        outside = (position < 0) | (position > size - 1)
    base = np.ceil(position) - 1
    ratio = (position - base)[:, None]
    if mode == "nearest":
        offsets = np.arange(0, 2)
        weight = _nearest_weights(ratio, plan.nearest_mode)
    elif mode == "linear":
        shrink = min(scale, 1.0) if plan.antialias else 1.0
        first = math.floor(-1 / shrink) + 1
        offsets = np.arange(first, 2 - first)
        weight = np.clip(1 - np.abs((offsets - ratio) * shrink), 0, 1)
    else:
        shrink = min(scale, 1.0) if plan.antialias else 1.0
        first = math.floor(-2 / shrink) + 1
        offsets = np.arange(first, 2 - first)
        weight = _cubic(np.abs((offsets - ratio) * shrink), plan.cubic_a)
    weight = weight / weight.sum(1, keepdims=True)
    index = base[:, None] + offsets
    if plan.exclude_outside:
        weight = np.where((index >= 0) & (index < size), weight, 0)
        weight = weight / weight.sum(1, keepdims=True)
    return np.clip(index, 0, size - 1).astype(np.int64), weight, outside


def _positions(
    size: int, target: int, scale: float, roi: tuple[float, float], transformation: str
) -> np.ndarray:
    """Where each output position lies on the input's axis."""
    at = np.arange(target, dtype=np.float64)
    length = scale * size
    if transformation == "align_corners":
        return at * 0 if length == 1 else at * (size - 1) / (length - 1)
    if transformation == "asymmetric":
        return at / scale
    if transformation == "tf_crop_and_resize":
        begin, end = roi
        if length == 1:
            return at * 0 + (end - begin) * (size - 1) / 2 + begin * (size - 1)
        return at * (end - begin) * (size - 1) / (length - 1) + begin * (size - 1)
    if transformation == "pytorch_half_pixel" and length == 1:
        return at * 0  # as specified, and as runtimes have it; onnx.reference takes -0.5
    centred = (at + 0.5) / scale - 0.5
    if transformation == "half_pixel_symmetric":
        return size / 2 * (1 - target / length) + centred
    return centred


def _nearest_weights(ratio: np.ndarray, nearest_mode: str) -> np.ndarray:
    right = {
        "round_prefer_floor": ratio > 0.5,
        "round_prefer_ceil": ratio >= 0.5,
        "floor": ratio >= 1,
        "ceil": ratio > 0,
    }[nearest_mode]
    return np.concatenate([~right, right], axis=1).astype(np.float64)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (1981), equation 15."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
