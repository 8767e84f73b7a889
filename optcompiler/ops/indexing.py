"""Gathers, scatters and other operators driven by indices."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from optcompiler.ops.costs import movement_cost, pointwise_cost, reading_cost
from optcompiler.ops.declare import op
from optcompiler.ops.spec import OpSpec
from optcompiler.ops.types import whole_list

Tensor = torch.Tensor


def _positive(indices: Tensor, size: int) -> Tensor:
    """Indices counted from the end made to count from the start."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


def gather(data: Tensor, indices: Tensor | int | list[int], *, axis: int = 0) -> Tensor:
    """Slices of `data` along `axis`; the indices' shape takes the axis's place."""
    axis %= data.dim()
    if isinstance(indices, int):
        return torch.select(data, axis, indices)
    where = torch.as_tensor(indices, device=data.device)
    if data.dim() == 2 and axis == 0 and data.is_floating_point() and where.dim() > 0:
        return F.embedding(_positive(where, data.shape[0]), data)
    flat = torch.index_select(data, axis, _positive(where, data.shape[axis]).reshape(-1))
    return flat.reshape((*data.shape[:axis], *where.shape, *data.shape[axis + 1 :]))


def gather_elements(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(data, axis, _positive(indices, data.shape[axis]))


def _points(data: Tensor, indices: Tensor, first: int) -> tuple[Tensor, ...]:
    """The last axis of `indices` as one index tensor for each axis of `data` from `first` on."""
    parts = indices.to(torch.int64).unbind(-1)
    return tuple(_positive(part, data.shape[first + i]) for i, part in enumerate(parts))


def gather_nd(data: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Slices of `data` at the points in the last axis of `indices`."""
    parts = _points(data, indices, batch_dims)
    batch: list[Tensor] = []
    for axis in range(batch_dims):
        shape = [1] * (indices.dim() - 1)
        shape[axis] = data.shape[axis]
        batch.append(torch.arange(data.shape[axis], device=data.device).reshape(shape))
    return data[(*batch, *parts)]


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def scatter_elements(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """A copy of `data` with `updates` written (or combined) at `indices` along `axis`."""
    where = _positive(indices, data.shape[axis])
    if reduction == "none":
        return torch.scatter(data, axis, where, updates)
    return torch.scatter_reduce(data, axis, where, updates, _REDUCE[reduction], include_self=True)


def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none"
) -> Tensor:
    """A copy of `data` with slices written (or combined) at the points of `indices`."""
    parts = _points(data, indices, 0)
    if reduction == "none":
        return data.index_put(parts, updates)
    if reduction == "add":
        return data.index_put(parts, updates, accumulate=True)
    depth = indices.shape[-1]
    flat = torch.zeros_like(parts[0])
    for size, part in zip(data.shape[:depth], parts, strict=True):
        flat = flat * size + part
    rows = data.reshape(-1, *data.shape[depth:])
    slices = updates.reshape(-1, *data.shape[depth:])
    index = flat.reshape(-1, *[1] * (slices.dim() - 1)).expand(slices.shape)
    y = torch.scatter_reduce(rows, 0, index, slices, _REDUCE[reduction], include_self=True)
    return y.reshape(data.shape)


def tensor_scatter(
    past: Tensor,
    update: Tensor,
    write_indices: Tensor | None = None,
    *,
    axis: int = -2,
    mode: str = "linear",
) -> Tensor:
    """Write `update` into a cache along `axis`, from each batch element's write index on."""
    axis %= past.dim()
    length = update.shape[axis]
    start = torch.zeros(past.shape[0], dtype=torch.int64, device=past.device)
    start = start if write_indices is None else write_indices.to(torch.int64)
    index = start.unsqueeze(1) + torch.arange(length, device=past.device)
    index = index % past.shape[axis] if mode == "circular" else index
    shape = [1] * past.dim()
    shape[0], shape[axis] = past.shape[0], length
    return torch.scatter(past, axis, index.reshape(shape).expand(update.shape), update)


def one_hot(indices: Tensor, depth: Any, values: Tensor, *, axis: int = -1) -> Tensor:
    """`values[1]` at each index along a new `axis` of length `depth`, `values[0]` elsewhere."""
    count = whole_list(depth)[0]
    classes = torch.arange(count, device=indices.device)
    axis = axis % (indices.dim() + 1)
    found = (
        torch.remainder(indices.to(torch.int64), count)
        if indices.is_floating_point()
        else (indices.to(torch.int64))
    )
    inside = (found >= -count) & (found < count)
    found = torch.where(inside, torch.remainder(found, count), torch.full_like(found, -1))
    shape = [1] * (indices.dim() + 1)
    shape[axis] = count
    hot = found.unsqueeze(axis) == classes.reshape(shape)
    return torch.where(hot, values[1], values[0])


def non_zero(x: Tensor) -> Tensor:
    """[rank, count] indices of the elements that are not zero."""
    return torch.nonzero(x if x.dim() else x.reshape(1)).t()


def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """Slices along `axis` (elements, when absent) where the condition holds."""
    where = torch.nonzero(condition).reshape(-1)
    if axis is None:
        return torch.index_select(x.reshape(-1), 0, where)
    return torch.index_select(x, axis, where)


SPECS: tuple[OpSpec, ...] = (
    op("Gather", gather, movement_cost, levels="moves"),
    op("GatherElements", gather_elements, movement_cost, since=11, levels="moves"),
    op("GatherND", gather_nd, movement_cost, since=11, levels="moves"),
    op("ScatterElements", scatter_elements, movement_cost, since=11),
    op("Scatter", scatter_elements, movement_cost, since=9),
    op("ScatterND", scatter_nd, movement_cost, since=11),
    op("TensorScatter", tensor_scatter, movement_cost, since=24),
    op("OneHot", one_hot, pointwise_cost(), since=9, static=(1,)),
    op("NonZero", non_zero, reading_cost(), since=9),
    op("Compress", compress, movement_cost, since=9),
)
