"""Resampling: Resize and Upsample, grid sampling, affine grids."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from optcompiler.ops.costs import pointwise_cost
from optcompiler.ops.declare import op
from optcompiler.ops.spec import OpSpec
from optcompiler.ops.types import numbers, whole_list

Tensor = torch.Tensor


def resize(
    x: Tensor,
    roi: Any = None,
    scales: Any = None,
    sizes: Any = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Resample each axis on its own: weights and taps per output position, then a weighted sum."""
    dims = [a % x.dim() for a in axes] if axes is not None else list(range(x.dim()))
    lengths = [x.shape[a] for a in dims]
    factors = [float(s) for s in _list(scales)]
    if factors:
        targets = [math.floor(n * s) for n, s in zip(lengths, factors, strict=True)]
    else:
        targets = whole_list(sizes)
        factors = [t / n for t, n in zip(targets, lengths, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            pick = min if keep_aspect_ratio_policy == "not_larger" else max
            factors = [pick(factors)] * len(dims)
            targets = [math.floor(factors[0] * n + 0.5) for n in lengths]
    box = [float(v) for v in _list(roi)] or [0.0] * len(dims) + [1.0] * len(dims)
    y = x if x.is_floating_point() else x.double()
    for i, axis in enumerate(dims):
        crop = coordinate_transformation_mode == "tf_crop_and_resize"
        if targets[i] == lengths[i] and factors[i] == 1 and not crop:
            continue
        y = _resample(
            y,
            axis,
            extrapolation_value,
            _taps(
                lengths[i],
                targets[i],
                factors[i],
                (box[i], box[i + len(dims)]) if crop else (0.0, 1.0),
                coordinate_transformation_mode,
                mode,
                nearest_mode,
                cubic_coeff_a,
                bool(exclude_outside),
                bool(antialias),
            ),
        )
    return y if x.is_floating_point() else torch.round(y).to(x.dtype)


def _list(value: Any) -> list[Any]:
    return [] if value is None else numbers(value)


Taps = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _resample(x: Tensor, axis: int, outside: float, taps: Taps) -> Tensor:
    """The weighted sum of each output position's taps along `axis`."""
    index, weight, extrapolated = taps
    total: Tensor | None = None
    shape = [1] * x.dim()
    shape[axis] = index.shape[0]
    for k in range(index.shape[1]):
        if not weight[:, k].any():
            continue
        part = torch.index_select(x, axis, torch.as_tensor(index[:, k], device=x.device))
        if not (weight[:, k] == 1).all():
            factor = torch.as_tensor(weight[:, k], device=x.device).to(x.dtype)
            part = part * factor.reshape(shape)
        total = part if total is None else total + part
    if total is None:
        raise AssertionError("every output position has a tap")
    if extrapolated is None:
        return total
    mask = torch.as_tensor(extrapolated, device=x.device).reshape(shape)
    return torch.where(mask, torch.full_like(total, outside), total)


@functools.lru_cache(maxsize=256)
def _taps(
    size: int,
    target: int,
    scale: float,
    roi: tuple[float, float],
    transformation: str,
    mode: str,
    nearest_mode: str,
    cubic_a: float,
    exclude_outside: bool,
    antialias: bool,
) -> Taps:
    """Source indices [target, taps], weights [target, taps], and positions outside a crop."""
    position = _positions(size, target, scale, roi, transformation)
    outside = None
    if transformation == "tf_crop_and_resize":
        outside = (position < 0) | (position > size - 1)
    base = np.ceil(position) - 1
    ratio = (position - base)[:, None]
    if mode == "nearest":
        offsets = np.arange(0, 2)
        weight = _nearest_weights(ratio, nearest_mode)
    elif mode == "linear":
        shrink = min(scale, 1.0) if antialias else 1.0
        first = math.floor(-1 / shrink) + 1
        offsets = np.arange(first, 2 - first)
        weight = np.clip(1 - np.abs((offsets - ratio) * shrink), 0, 1)
    else:
        shrink = min(scale, 1.0) if antialias else 1.0
        first = math.floor(-2 / shrink) + 1
        offsets = np.arange(first, 2 - first)
        weight = _cubic(np.abs((offsets - ratio) * shrink), cubic_a)
    weight = weight / weight.sum(1, keepdims=True)
    index = base[:, None] + offsets
    if exclude_outside:
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
        return at * 0 - 0.5
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


def upsample(x: Tensor, scales: Any = None, *, mode: str = "nearest", **old: Any) -> Tensor:
    """The deprecated forerunner of Resize: asymmetric coordinates, floor for nearest."""
    return resize(
        x,
        None,
        old.get("scales") if scales is None else scales,
        coordinate_transformation_mode="asymmetric",
        mode=mode,
        nearest_mode="floor",
    )


_GRID_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def grid_sample(
    x: Tensor,
    grid: Tensor,
    *,
    align_corners: int = 0,
    mode: str = "linear",
    padding_mode: str = "zeros",
) -> Tensor:
    """Samples of [N, C, *spatial] at the normalised coordinates of `grid`."""
    return F.grid_sample(
        x,
        grid.to(x.dtype),
        mode=_GRID_MODES.get(mode, mode),
        padding_mode=padding_mode,
        align_corners=bool(align_corners),
    )


def affine_grid(theta: Tensor, size: Any, *, align_corners: int = 0) -> Tensor:
    return F.affine_grid(theta, whole_list(size), align_corners=bool(align_corners))


SPECS: tuple[OpSpec, ...] = (
    op("Resize", resize, pointwise_cost(4), since=11, static=(1, 2, 3)),
    op("Upsample", upsample, pointwise_cost(4), since=7, static=(1,)),
    op("GridSample", grid_sample, pointwise_cost(8), since=16),
    op("AffineGrid", affine_grid, pointwise_cost(8), since=20, static=(1,)),
)
