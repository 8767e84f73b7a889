"""Operators that move, cut or repeat elements and compute nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from optcompiler.ops.costs import free_cost, movement_cost
from optcompiler.ops.declare import op, output_count
from optcompiler.ops.spec import OpSpec
from optcompiler.ops.types import first, whole_list

Tensor = torch.Tensor
Ints = Tensor | Sequence[int]


def reshape(x: Tensor, shape: Ints, *, allowzero: int = 0) -> Tensor:
    """-1 is inferred; 0 keeps the input's dimension unless `allowzero` is 1."""
    wanted = whole_list(shape)
    if not allowzero:
        wanted = [x.shape[i] if d == 0 else d for i, d in enumerate(wanted)]
    if -1 in wanted and x.numel() == 0:
        # torch calls the inferred dimension of an empty tensor ambiguous; ONNX makes it 0.
        wanted = [0 if d == -1 else d for d in wanted]
    return torch.reshape(x, wanted)


def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return torch.permute(x, list(perm) if perm is not None else list(range(x.dim()))[::-1])


def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    if axes is None:
        return torch.squeeze(x)
    return torch.squeeze(x, tuple(whole_list(axes)))


def unsqueeze(x: Tensor, axes: Ints) -> Tensor:
    dims = whole_list(axes)
    rank = x.dim() + len(dims)
    for axis in sorted(a % rank for a in dims):
        x = torch.unsqueeze(x, axis)
    return x


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """[product of axes before `axis`, product of the rest]."""
    split = axis % x.dim() if axis < 0 else axis
    rows = 1
    for size in x.shape[:split]:
        rows *= size
    columns = 1
    for size in x.shape[split:]:
        columns *= size
    return torch.reshape(x, (rows, columns))


def concat(*parts: Tensor, axis: int) -> Tensor:
    return torch.cat(parts, dim=axis)


def split(
    x: Tensor,
    sizes: Ints | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    split: Sequence[int] | None = None,
    outputs: int,
) -> Tensor | tuple[Tensor, ...]:
    """Consecutive parts along `axis`: of the given sizes, or equal with a smaller last one."""
    lengths = split if sizes is None else whole_list(sizes)
    if lengths is None:
        each = -(-x.shape[axis] // outputs)
        whole_parts = x.shape[axis] // each if each else 0
        lengths = [each] * whole_parts + [x.shape[axis] - each * whole_parts]
        lengths = (lengths + [0] * outputs)[:outputs]
    parts = torch.split(x, list(lengths), dim=axis)
    return parts[0] if outputs == 1 else parts


def slice_(
    x: Tensor,
    starts: Ints | None = None,
    ends: Ints | None = None,
    axes: Ints | None = None,
    steps: Ints | None = None,
) -> Tensor:
    """Python slices along the given axes; a negative step walks backwards."""
    if starts is None or ends is None:
        return x
    begins, stops = whole_list(starts), whole_list(ends)
    dims = whole_list(axes) if axes is not None else list(range(len(begins)))
    strides = whole_list(steps) if steps is not None else [1] * len(begins)
    for start, end, axis, step in zip(begins, stops, dims, strides, strict=True):
        size = x.shape[axis]
        low, high, _ = slice(start, end, step).indices(size) if step > 0 else (0, 0, 0)
        if step > 0:
            index = [slice(None)] * (axis % x.dim()) + [slice(low, max(low, high), step)]
            x = x[tuple(index)]
            continue
        picked = range(size)[_backward(start, size) : _stop(end, size) : step]
        x = torch.index_select(
            x, axis, torch.tensor(list(picked), dtype=torch.int64, device=x.device)
        )
    return x


def _backward(start: int, size: int) -> int:
    return min(start, size - 1) if start >= 0 else start


def _stop(end: int, size: int) -> int | None:
    """The end of a backward slice; before the first element is None in Python."""
    return None if end < -size else end


def expand(x: Tensor, shape: Ints) -> Tensor:
    """Broadcast to the common shape of `x` and `shape`."""
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(whole_list(shape))))


def tile(x: Tensor, repeats: Ints) -> Tensor:
    return torch.tile(x, tuple(whole_list(repeats)))


def pad(
    x: Tensor,
    pads: Ints | None = None,
    value: Tensor | float | None = None,
    axes: Ints | None = None,
    *,
    mode: str = "constant",
    **_: Any,
) -> Tensor:
    """Pad (or, for negative amounts, crop): "constant", "reflect", "edge" or "wrap"."""
    amounts = whole_list(pads) if pads is not None else []
    dims = [a % x.dim() for a in whole_list(axes)] if axes is not None else list(range(x.dim()))
    begins, ends = amounts[: len(dims)], amounts[len(dims) :]
    if mode == "constant":
        fill = 0 if value is None else first(value)
        pairs = dict(zip(dims, zip(begins, ends, strict=True), strict=True))
        flat = [n for axis in reversed(range(x.dim())) for n in pairs.get(axis, (0, 0))]
        if x.dtype == torch.bool:
            return F.pad(x.to(torch.uint8), flat, value=int(fill)).to(torch.bool)
        return F.pad(x, flat, value=fill)
    for axis, begin, end in zip(dims, begins, ends, strict=True):
        index = _padded_index(x.shape[axis], begin, end, mode)
        x = torch.index_select(x, axis, torch.tensor(index, device=x.device, dtype=torch.int64))
    return x


def _padded_index(size: int, begin: int, end: int, mode: str) -> list[int]:
    """Which source element each position of a padded axis shows."""
    positions = range(-begin, size + end)
    if mode == "edge":
        return [min(max(i, 0), size - 1) for i in positions]
    if mode == "wrap":
        return [i % size for i in positions]
    period = max(2 * (size - 1), 1)
    return [min(i % period, period - i % period) if size > 1 else 0 for i in positions]


def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """[N, C, H, W] to [N, C / b², H * b, W * b]."""
    n, c, h, w = x.shape
    b = blocksize
    if mode == "DCR":
        y = x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(n, c // (b * b), h * b, w * b)


def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """[N, C, H, W] to [N, C * b², H / b, W / b]."""
    n, c, h, w = x.shape
    b = blocksize
    y = x.reshape(n, c, h // b, b, w // b, b)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return y.permute(*order).reshape(n, c * b * b, h // b, w // b)


def trilu(x: Tensor, k: Any = None, *, upper: int = 1) -> Tensor:
    """The upper (or lower) triangle of the last two axes, from the `k`-th diagonal."""
    diagonal = 0 if k is None else whole_list(k)[0]
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def reverse_sequence(
    x: Tensor, lengths: Ints, *, batch_axis: int = 1, time_axis: int = 0
) -> Tensor:
    """Reverse the first `lengths[b]` steps of every batch element."""
    moved = x.movedim((batch_axis, time_axis), (0, 1))
    steps = torch.arange(moved.shape[1], device=x.device)
    length = torch.as_tensor(whole_list(lengths), device=x.device).unsqueeze(1)
    index = torch.where(steps < length, length - 1 - steps, steps)
    rows = torch.arange(moved.shape[0], device=x.device).unsqueeze(1)
    return moved[rows, index].movedim((0, 1), (batch_axis, time_axis))


def center_crop_pad(x: Tensor, shape: Ints, *, axes: Sequence[int] | None = None) -> Tensor:
    """Crop or zero-pad around the centre to the given sizes."""
    dims = list(axes) if axes is not None else list(range(x.dim()))
    for axis, want in zip(dims, whole_list(shape), strict=True):
        have = x.shape[axis]
        if want < have:
            x = x.narrow(axis, (have - want) // 2, want)
        elif want > have:
            before = (want - have) // 2
            x = pad(x, [before, want - have - before], None, [axis])
    return x


def col_to_im(
    x: Tensor,
    image_shape: Ints,
    block_shape: Ints,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Sum the columns of blocks, [N, C * prod(block), L], into images."""
    image, block = whole_list(image_shape), whole_list(block_shape)
    rank = len(image)
    dilations = dilations or [1] * rank
    strides = strides or [1] * rank
    pads = pads or [0] * (2 * rank)
    full = [size + pads[i] + pads[i + rank] for i, size in enumerate(image)]
    index = torch.zeros([1] * (2 * rank), dtype=torch.int64, device=x.device)
    for i in range(rank):
        count = (full[i] - dilations[i] * (block[i] - 1) - 1) // strides[i] + 1
        taps = torch.arange(block[i], device=x.device) * dilations[i]
        places = torch.arange(count, device=x.device) * strides[i]
        shape = [1] * (2 * rank)
        shape[i], shape[rank + i] = block[i], count
        index = index * full[i] + (taps[:, None] + places[None, :]).reshape(shape)
    channels = x.shape[1] // index[(...,) + (0,) * rank].numel()
    columns = x.reshape(x.shape[0], channels, -1)
    flat = index.expand(index.shape).reshape(1, 1, -1).expand(columns.shape)
    size = 1
    for length in full:
        size *= length
    y = torch.zeros((x.shape[0], channels, size), dtype=x.dtype, device=x.device)
    y = y.scatter_add(2, flat, columns).reshape(x.shape[0], channels, *full)
    crop = [n for i in reversed(range(rank)) for n in (-pads[i], -pads[i + rank])]
    return F.pad(y, crop)


SPECS: tuple[OpSpec, ...] = (
    op("Reshape", reshape, free_cost, since=5, static=(1,), levels="moves"),
    op("Transpose", transpose, movement_cost, levels="moves"),
    op("Squeeze", squeeze, free_cost, static=(1,), levels="moves"),
    op("Unsqueeze", unsqueeze, free_cost, static=(1,), levels="moves"),
    op("Flatten", flatten, free_cost, since=9, levels="moves"),
    op("Concat", concat, movement_cost, since=4, levels="moves"),
    op("Split", split, movement_cost, since=2, static=(1,), facts=output_count, levels="moves"),
    op("Slice", slice_, movement_cost, static=(1, 2, 3, 4), levels="moves"),
    op("Expand", expand, movement_cost, since=8, static=(1,), levels="moves"),
    op("Tile", tile, movement_cost, since=6, static=(1,), levels="moves"),
    op("Pad", pad, movement_cost, since=2, static=(1, 2, 3), levels="moves"),
    op("DepthToSpace", depth_to_space, movement_cost, levels="moves"),
    op("SpaceToDepth", space_to_depth, movement_cost, levels="moves"),
    op("Trilu", trilu, movement_cost, since=14, static=(1,)),
    op("ReverseSequence", reverse_sequence, movement_cost, since=10, static=(1,)),
    op("CenterCropPad", center_crop_pad, movement_cost, since=18, static=(1,)),
    op("Col2Im", col_to_im, movement_cost, since=18, static=(1, 2)),
)
