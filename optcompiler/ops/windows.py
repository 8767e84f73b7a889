"""Padding arithmetic that convolutions and poolings share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def sides(pads: Sequence[int]) -> list[tuple[int, int]]:
    """ONNX pads (all begins, then all ends) as (begin, end) for each axis."""
    half = len(pads) // 2
    return list(zip(pads[:half], pads[half:], strict=True))


def resolve_pads(
    spatial: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int] | None,
    auto_pad: str,
) -> list[tuple[int, int]]:
    """(begin, end) padding for each spatial axis, `auto_pad` worked out from the sizes."""
    if auto_pad == "VALID":
        return [(0, 0)] * len(spatial)
    if auto_pad in ("", "NOTSET"):
        return sides(pads) if pads else [(0, 0)] * len(spatial)
    found: list[tuple[int, int]] = []
    for size, taps, stride, dilation in zip(spatial, kernel, strides, dilations, strict=True):
        out = -(-size // stride)
        needed = max((out - 1) * stride + (taps - 1) * dilation + 1 - size, 0)
        small, large = needed // 2, needed - needed // 2
        found.append((small, large) if auto_pad == "SAME_UPPER" else (large, small))
    return found


def symmetric(pads: Sequence[tuple[int, int]]) -> bool:
    return all(begin == end for begin, end in pads)


def pad_spatial(
    x: torch.Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0
) -> torch.Tensor:
    """`x` with its last axes padded by (begin, end) pairs, given in axis order."""
    if all(pair == (0, 0) for pair in pads):
        return x
    flat = [amount for pair in reversed(pads) for amount in pair]
    return F.pad(x, flat, value=value)
