"""Pooling over windows."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F

from optcompiler.ops.costs import pooling_cost, reading_cost
from optcompiler.ops.declare import op, output_count
from optcompiler.ops.spec import OpSpec
from optcompiler.ops.types import whole_list
from optcompiler.ops.windows import pad_spatial, resolve_pads

Tensor = torch.Tensor
Ints = Sequence[int]


def _geometry(
    x: Tensor,
    kernel: Ints,
    strides: Ints | None,
    dilations: Ints | None,
    pads: Ints | None,
    auto_pad: str,
    ceil_mode: int,
) -> tuple[list[int], list[int], list[tuple[int, int]], list[int]]:
    """Strides, dilations, (begin, end) pads and output sizes of a pooling."""
    rank = x.dim() - 2
    strides = list(strides or [1] * rank)
    dilations = list(dilations or [1] * rank)
    pairs = resolve_pads(x.shape[2:], kernel, strides, dilations, pads, auto_pad)
    sizes: list[int] = []
    for size, taps, stride, dilation, (begin, end) in zip(
        x.shape[2:], kernel, strides, dilations, pairs, strict=True
    ):
        span = size + begin + end - (taps - 1) * dilation - 1
        out = (-(-span // stride) if ceil_mode else span // stride) + 1
        if ceil_mode and (out - 1) * stride >= size + begin:
            out -= 1
        sizes.append(out)
    return strides, dilations, pairs, sizes


def _reach(
    x: Tensor,
    kernel: Ints,
    strides: Ints,
    dilations: Ints,
    pairs: Sequence[tuple[int, int]],
    sizes: Ints,
) -> list[tuple[int, int]]:
    """The pads, their ends moved so that exactly the wanted windows fit."""
    return [
        (begin, (out - 1) * stride + (taps - 1) * dilation + 1 - size - begin)
        for size, taps, stride, dilation, (begin, _), out in zip(
            x.shape[2:], kernel, strides, dilations, pairs, sizes, strict=True
        )
    ]  # fmt: skip


def max_pool(
    x: Tensor,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    storage_order: int = 0,
    strides: Ints | None = None,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """Largest element of each window; with a second output, its flat index in the whole input."""
    rank = x.dim() - 2
    step, gap, pairs, sizes = _geometry(
        x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode
    )
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
    reach = _reach(x, kernel_shape, step, gap, pairs, sizes)
    wide = x if x.is_floating_point() else x.double()
    if outputs == 1:
        if all(b == e and b <= k // 2 for (b, e), k in zip(reach, kernel_shape, strict=True)):
            y = pool(wide, list(kernel_shape), step, [b for b, _ in reach], gap)
        else:
            y = pool(pad_spatial(wide, reach, float("-inf")), list(kernel_shape), step, 0, gap)
        return y.to(x.dtype)
    padded = pad_spatial(wide, reach, float("-inf"))
    y, local = pool(padded, list(kernel_shape), step, 0, gap, return_indices=True)
    return y.to(x.dtype), _flat_index(local, padded.shape, x.shape, reach, storage_order)


def _flat_index(
    local: Tensor,
    padded: Ints,
    shape: Ints,
    pairs: Sequence[tuple[int, int]],
    storage_order: int,
) -> Tensor:
    """Indices into one padded plane as indices into the whole unpadded tensor."""
    places: list[Tensor] = []
    rest = local
    for size, (begin, _) in reversed(list(zip(padded[2:], pairs, strict=True))):
        places.insert(0, rest % size - begin)
        rest = torch.div(rest, size, rounding_mode="floor")
    spatial = list(shape[2:])
    order = range(len(spatial)) if not storage_order else reversed(range(len(spatial)))
    flat = torch.zeros_like(local)
    for axis in order:
        flat = flat * spatial[axis] + places[axis]
    plane = torch.arange(shape[0] * shape[1], device=local.device)
    return flat + plane.reshape([shape[0], shape[1]] + [1] * len(spatial)) * prod(spatial)


def average_pool(
    x: Tensor,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """Mean of each window, over real elements, or over pads too when `count_include_pad` is 1."""
    step, gap, pairs, sizes = _geometry(
        x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode
    )
    reach = _reach(x, kernel_shape, step, gap, pairs, sizes)
    rank = x.dim() - 2
    plain = all(d == 1 for d in gap) and rank <= 3
    if plain and all(b == e and b <= k // 2 for (b, e), k in zip(reach, kernel_shape, strict=True)):
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
        same = [b for b, _ in reach] == [b for b, _ in pairs]
        if same and (count_include_pad == 0 or [e for _, e in pairs] == [e for _, e in reach]):
            return pool(
                x, list(kernel_shape), step, [b for b, _ in reach], False, bool(count_include_pad)
            )
    sums = _window_sum(pad_spatial(x, reach), kernel_shape, step, gap)
    ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if count_include_pad:
        ones = pad_spatial(ones, pairs, 1.0)
        reach = [(0, all_ - b - e) for (b, e), all_ in zip(
            pairs, (b + e for b, e in reach), strict=True
        )]  # fmt: skip
    counts = _window_sum(pad_spatial(ones, reach), kernel_shape, step, gap)
    return sums / counts


def _window_sum(x: Tensor, kernel: Ints, strides: Ints, dilations: Ints) -> Tensor:
    """Sum of each window of [N, C, *spatial]."""
    rank = len(kernel)
    weight = torch.ones((1, 1, *kernel), dtype=x.dtype, device=x.device)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    planes = x.reshape(-1, 1, *x.shape[2:])
    y = convolve(planes, weight, None, list(strides), 0, list(dilations))
    return y.reshape(*x.shape[:2], *y.shape[2:])


def lp_pool(
    x: Tensor,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints | None = None,
    p: int = 2,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """p-norm of each window."""
    step, gap, pairs, sizes = _geometry(
        x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode
    )
    reach = _reach(x, kernel_shape, step, gap, pairs, sizes)
    powers = torch.pow(torch.abs(x), p)
    return torch.pow(_window_sum(pad_spatial(powers, reach), kernel_shape, step, gap), 1.0 / p)


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


def global_average_pool(x: Tensor) -> Tensor:
    return torch.mean(x, dim=_spatial(x), keepdim=True)


def global_max_pool(x: Tensor) -> Tensor:
    return torch.amax(x, dim=_spatial(x), keepdim=True)


def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    powers = torch.sum(torch.pow(torch.abs(x), p), dim=_spatial(x), keepdim=True)
    return torch.pow(powers, 1.0 / p)


def max_unpool(
    x: Tensor,
    indices: Tensor,
    output_shape: Tensor | Ints | None = None,
    *,
    kernel_shape: Ints,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """Put each pooled element back where its flat index says; zero elsewhere."""
    rank = x.dim() - 2
    strides = strides or [1] * rank
    pads = pads or [0] * (2 * rank)
    natural = [*x.shape[:2]] + [
        (size - 1) * stride + taps - begin - end
        for size, stride, taps, begin, end in zip(
            x.shape[2:], strides, kernel_shape, pads[:rank], pads[rank:], strict=True
        )
    ]
    flat = torch.zeros(prod(natural), dtype=x.dtype, device=x.device)
    y = flat.scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(natural)
    if output_shape is None:
        return y
    wanted = whole_list(output_shape)
    grow = [(0, want - have) for want, have in zip(wanted[2:], natural[2:], strict=True)]
    return pad_spatial(y, grow)


SPECS: tuple[OpSpec, ...] = (
    op("MaxPool", max_pool, pooling_cost, facts=output_count, levels="moves"),
    op("AveragePool", average_pool, pooling_cost, since=7),
    op("LpPool", lp_pool, pooling_cost, since=2),
    op("GlobalAveragePool", global_average_pool, reading_cost()),
    op("GlobalMaxPool", global_max_pool, reading_cost()),
    op("GlobalLpPool", global_lp_pool, reading_cost(3), since=2),
    op("MaxUnpool", max_unpool, reading_cost(), since=9, static=(2,)),
)
