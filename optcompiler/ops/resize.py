"""Resampling: Resize and Upsample, grid sampling, affine grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from optcompiler.ops.costs import pointwise_cost
from optcompiler.ops.declare import op
from optcompiler.ops.spec import OpSpec
from optcompiler.ops.taps import Resampling, Taps, taps_of
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
    attributes = {
        "antialias": antialias,
        "axes": axes,
        "coordinate_transformation_mode": coordinate_transformation_mode,
        "cubic_coeff_a": cubic_coeff_a,
        "exclude_outside": exclude_outside,
        "keep_aspect_ratio_policy": keep_aspect_ratio_policy,
        "mode": mode,
        "nearest_mode": nearest_mode,
    }
    factors = [float(s) for s in _list(scales)] or None
    targets = None if factors else whole_list(sizes)
    y = x if x.is_floating_point() else x.double()
    for axis, plan in Resampling.of(x.shape, _list(roi), factors, targets, attributes):
        y = _resample(y, axis, extrapolation_value, taps_of(plan))
    return y if x.is_floating_point() else torch.round(y).to(x.dtype)


def _list(value: Any) -> list[Any]:
    return [] if value is None else numbers(value)


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
