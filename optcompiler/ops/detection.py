"""Operators of object detection: suppression of boxes, pooled regions, deformable convolution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from optcompiler.ops.costs import conv_cost, reading_cost
from optcompiler.ops.declare import op
from optcompiler.ops.spec import OpSpec
from optcompiler.ops.types import first

Tensor = torch.Tensor


def non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    most: Any = 0,
    iou_threshold: Any = 0.0,
    score_threshold: Any = None,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """`[K, 3]` int64: batch, class and box of what is kept, best first within a batch and class.

    boxes `[B, N, 4]`: two corners (y, x), or centre, width and height; scores `[B, C, N]`. A box
    goes when it overlaps a better one by more than `iou_threshold` of their union.
    """
    limit = int(first(most))
    overlap = float(first(iou_threshold))
    kept: list[tuple[int, int, int]] = []
    for batch, kind in itertools.product(range(scores.shape[0]), range(scores.shape[1])):
        shares = _intersections_over_unions(boxes[batch].double(), bool(center_point_box))
        values = scores[batch, kind]
        order = torch.argsort(values, descending=True, stable=True).tolist()
        if score_threshold is not None:
            order = [i for i in order if float(values[i]) > float(first(score_threshold))]
        chosen: list[int] = []
        for index in order:
            if len(chosen) >= limit:
                break
            if all(float(shares[index, other]) <= overlap for other in chosen):
                chosen.append(index)
        kept += [(batch, kind, index) for index in chosen]
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


def _intersections_over_unions(boxes: Tensor, centred: bool) -> Tensor:
    """`[N, N]`; 0 where a box has no area."""
    if centred:
        low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    else:
        low = torch.minimum(boxes[:, :2], boxes[:, 2:])
        high = torch.maximum(boxes[:, :2], boxes[:, 2:])
    sides = torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)
    shared = sides.clamp(min=0).prod(-1)
    areas = (high - low).prod(-1)
    whole = areas[:, None] + areas - shared
    return torch.where((areas > 0) & (areas[:, None] > 0), shared / whole, 0.0)


def _corners(x: Tensor, places: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The 2ⁿ elements around each place and their weights; elements outside of `x` are 0.

    x `[C, *spatial]`, one tensor of any shape S for each spatial axis; each result `[C, *S]`, `S`.
    """
    found: list[tuple[Tensor, Tensor]] = []
    lows = [place.floor() for place in places]
    for offsets in itertools.product((0, 1), repeat=len(places)):
        weight = torch.ones_like(places[0])
        inside = torch.ones_like(places[0], dtype=torch.bool)
        index: list[Tensor] = []
        for place, low, offset, size in zip(places, lows, offsets, x.shape[1:], strict=True):
            corner = low + offset
            weight = weight * (place - low if offset else 1 - (place - low))
            inside = inside & (corner >= 0) & (corner < size)
            index.append(corner.clamp(0, size - 1).long())
        found.append((torch.where(inside, x[(slice(None), *index)], 0.0), weight))
    return found


def roi_align(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    coordinate_transformation_mode: str = "output_half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """`[R, C, output_height, output_width]` of x `[N, C, H, W]`: regions `[R, 4]` (x, y, x, y),
    each cell the mean (or the largest) of bilinear samples. Mask R-CNN (He et al. 2017), §3."""
    aligned = coordinate_transformation_mode == "half_pixel"
    cells: list[Tensor] = []
    for roi, batch in zip(rois, batch_indices.tolist(), strict=True):
        left, top, right, bottom = (roi * spatial_scale - (0.5 if aligned else 0.0)).tolist()
        width, height = right - left, bottom - top
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        ys, rows = _samples(top, height, output_height, sampling_ratio, x)
        xs, columns = _samples(left, width, output_width, sampling_ratio, x)
        grid = torch.meshgrid(ys, xs, indexing="ij")
        outside = [(g < -1) | (g > size) for g, size in zip(grid, x.shape[2:], strict=True)]
        places = [
            g.clamp(0, size - 1) for g, size in zip(grid, x.shape[2:], strict=True)
        ]  # fmt: skip
        parts = torch.stack([v * w for v, w in _corners(x[batch], places)])
        parts = torch.where(outside[0] | outside[1], 0.0, parts)
        samples = parts.sum(0) if mode == "avg" else parts.amax(0)
        blocks = samples.reshape(x.shape[1], output_height, rows, output_width, columns)
        cells.append(blocks.mean((2, 4)) if mode == "avg" else blocks.amax((2, 4)))
    empty = x.new_zeros((0, x.shape[1], output_height, output_width))
    return torch.stack(cells).to(x.dtype) if cells else empty


def _samples(
    start: float, extent: float, cells: int, ratio: int, like: Tensor
) -> tuple[Tensor, int]:
    """Where samples lie along one axis, and how many there are in a cell."""
    each = ratio if ratio > 0 else max(math.ceil(extent / cells), 1)
    steps = torch.arange(cells * each, dtype=like.dtype, device=like.device) + 0.5
    return start + steps * (extent / (cells * each)), each


def deform_conv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    offset_group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Convolution whose taps are moved by `offset`, read bilinearly and scaled by `mask`.

    Deformable ConvNets v2 (Zhu et al. 2019), equation 1. x `[N, C, *spatial]`, offset
    `[N, offset_group * taps * rank, *out]`, mask `[N, offset_group * taps, *out]`.
    """
    rank, kernel, out = x.dim() - 2, tuple(weight.shape[2:]), tuple(offset.shape[2:])
    taps = math.prod(kernel)
    spread = tuple(dilations or [1] * rank)
    moves = offset.reshape(x.shape[0], offset_group, taps, rank, *out)
    scale = None if mask is None else mask.reshape(x.shape[0], offset_group, 1, taps, *out)
    axes = [
        torch.arange(o, device=x.device) * s - p
        for o, s, p in zip(out, strides or [1] * rank, pads or [0] * rank, strict=False)
    ]
    origin = torch.meshgrid(*axes, indexing="ij")
    steps = itertools.product(*map(range, kernel))
    taken = torch.stack([torch.tensor(step, device=x.device) for step in steps])  # [taps, rank]
    images: list[Tensor] = []
    for image in range(x.shape[0]):
        parts = x[image].reshape(offset_group, -1, *x.shape[2:])
        read: list[Tensor] = []
        for part in range(offset_group):
            places = [
                origin[a] + moves[image, part, :, a]
                + (taken[:, a] * spread[a]).reshape(-1, *[1] * rank)
                for a in range(rank)
            ]  # fmt: skip
            values = torch.stack([v * w for v, w in _corners(parts[part], places)]).sum(0)
            read.append(values if scale is None else values * scale[image, part])
        images.append(torch.cat(read))
    columns = torch.stack(images).reshape(x.shape[0], group, -1, taps, math.prod(out))
    kernels = weight.reshape(group, -1, weight.shape[1], taps)
    result = torch.einsum("ngctp,gkct->ngkp", columns.to(weight.dtype), kernels)
    result = result.reshape(x.shape[0], weight.shape[0], *out)
    return result if bias is None else result + bias.reshape(-1, *[1] * rank)


SPECS: tuple[OpSpec, ...] = (
    op("NonMaxSuppression", non_max_suppression, reading_cost(8), since=10, static=(2, 3, 4)),
    op("RoiAlign", roi_align, reading_cost(8), since=10),
    op("DeformConv", deform_conv, conv_cost, since=19),
)
