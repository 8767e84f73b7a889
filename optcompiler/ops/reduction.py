"""Reductions over axes, arg-reductions, cumulative sums, TopK and softmaxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from optcompiler.ops.costs import DIVISION, TRANSCENDENTAL, reading_cost
from optcompiler.ops.declare import op, output_count
from optcompiler.ops.spec import OpSpec
from optcompiler.ops.types import whole_list

Tensor = torch.Tensor
_torch: Any = torch
Axes = Tensor | Sequence[int] | None


def _axes(x: Tensor, axes: Axes, noop: int) -> list[int] | None:
    """The axes to reduce, or None when nothing is reduced."""
    found = [] if axes is None else whole_list(axes)
    if not found:
        return None if noop else list(range(x.dim()))
    return sorted({a % max(x.dim(), 1) for a in found})


def _several(x: Tensor, axes: Sequence[int], keepdims: bool, one: Callable[..., Tensor]) -> Tensor:
    """A reduction that torch has for one axis only, applied from the last axis to the first."""
    for axis in reversed(axes):
        x = one(x, dim=axis, keepdim=keepdims)
    return x


def reduce_sum(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    dims = _axes(x, axes, noop_with_empty_axes)
    if dims is None or x.dim() == 0:
        return x
    return torch.sum(x, dim=dims, keepdim=bool(keepdims), dtype=x.dtype)


def reduce_mean(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Mean over the axes; integers divide with truncation."""
    dims = _axes(x, axes, noop_with_empty_axes)
    if dims is None or x.dim() == 0:
        return x
    if x.is_floating_point():
        return torch.mean(x, dim=dims, keepdim=bool(keepdims))
    count = 1
    for axis in dims:
        count *= x.shape[axis]
    total = torch.sum(x, dim=dims, keepdim=bool(keepdims))
    return torch.div(total, count, rounding_mode="trunc").to(x.dtype)


def reduce_max(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Largest element; of nothing, the lowest value of the type."""
    return _extreme(x, _axes(x, axes, noop_with_empty_axes), bool(keepdims), torch.amax, True)


def reduce_min(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Smallest element; of nothing, the highest value of the type."""
    return _extreme(x, _axes(x, axes, noop_with_empty_axes), bool(keepdims), torch.amin, False)


def _extreme(
    x: Tensor, axes: list[int] | None, keepdims: bool, extreme: Callable[..., Tensor], low: bool
) -> Tensor:
    if axes is None or x.dim() == 0:
        return x
    if x.numel():
        return extreme(x, dim=axes, keepdim=keepdims)
    if x.is_floating_point():
        fill: Any = float("-inf") if low else float("inf")
    elif x.dtype == torch.bool:
        fill = not low
    else:
        fill = torch.iinfo(x.dtype).min if low else torch.iinfo(x.dtype).max
    shape = torch.sum(x, dim=axes, keepdim=keepdims).shape
    return torch.full(shape, fill, dtype=x.dtype, device=x.device)


def reduce_prod(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    dims = _axes(x, axes, noop_with_empty_axes)
    if dims is None or x.dim() == 0:
        return x
    return _several(x, dims, bool(keepdims), torch.prod).to(x.dtype)


def reduce_l1(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    return reduce_sum(
        torch.abs(x), axes, keepdims=keepdims, noop_with_empty_axes=noop_with_empty_axes
    )


def reduce_l2(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    squares = reduce_sum(x * x, axes, keepdims=keepdims, noop_with_empty_axes=noop_with_empty_axes)
    return torch.sqrt(squares).to(x.dtype)


def reduce_sum_square(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    return reduce_sum(x * x, axes, keepdims=keepdims, noop_with_empty_axes=noop_with_empty_axes)


def reduce_log_sum(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    total = reduce_sum(x, axes, keepdims=keepdims, noop_with_empty_axes=noop_with_empty_axes)
    return torch.log(total).to(x.dtype)


def reduce_log_sum_exp(
    x: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    dims = _axes(x, axes, noop_with_empty_axes)
    if dims is None or x.dim() == 0:
        return x
    return torch.logsumexp(x, dim=dims, keepdim=bool(keepdims)).to(x.dtype)


def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Index of the largest element: the first of equals, or the last."""
    return _arg(x, axis, bool(keepdims), bool(select_last_index), torch.argmax)


def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Index of the smallest element: the first of equals, or the last."""
    return _arg(x, axis, bool(keepdims), bool(select_last_index), torch.argmin)


def _arg(x: Tensor, axis: int, keepdims: bool, last: bool, choose: Callable[..., Tensor]) -> Tensor:
    if not last:
        return choose(x, dim=axis, keepdim=keepdims)
    return x.shape[axis] - 1 - choose(torch.flip(x, [axis]), dim=axis, keepdim=keepdims)


def top_k(
    x: Tensor, k: Tensor | Sequence[int], *, axis: int = -1, largest: int = 1, sorted: int = 1
) -> tuple[Tensor, Tensor]:
    """The `k` largest (or smallest) values along `axis` and their indices; ties by lower index."""
    count = whole_list(k)[0]
    # torch.topk does not say which of equal elements it returns; a stable sort does.
    values, indices = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.softmax(x, dim=axis)


def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.log_softmax(x, dim=axis)


def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """1 at the first largest element along `axis`, 0 elsewhere."""
    best = torch.argmax(x, dim=axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, best, 1)


def _scan(
    x: Tensor, axis: Any, exclusive: int, reverse: int, run: Callable[..., Tensor], first: float
) -> Tensor:
    dim = whole_list(axis)[0] % x.dim()
    x = torch.flip(x, [dim]) if reverse else x
    if exclusive:
        start = torch.full_like(x.narrow(dim, 0, min(1, x.shape[dim])), first)
        x = torch.cat([start, x.narrow(dim, 0, max(x.shape[dim] - 1, 0))], dim)
    y = run(x, dim=dim).to(x.dtype)
    return torch.flip(y, [dim]) if reverse else y


def cum_sum(x: Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Running sums along `axis`."""
    return _scan(x, axis, exclusive, reverse, torch.cumsum, 0)


def cum_prod(x: Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Running products along `axis`."""
    return _scan(x, axis, exclusive, reverse, torch.cumprod, 1)


def det(x: Tensor) -> Tensor:
    return torch.det(x)


def unique(
    x: Tensor, *, axis: int | None = None, sorted: int = 1, outputs: int = 4
) -> Tensor | tuple[Tensor, ...]:
    """Distinct elements (or slices along `axis`), first positions, inverse and counts.

    Sorted, or in order of first occurrence.
    """
    dim = 0 if axis is None else axis
    source = x.reshape(-1) if axis is None else x
    values, inverse, counts = cast(
        "tuple[Tensor, Tensor, Tensor]",
        _torch.unique(source, sorted=True, return_inverse=True, return_counts=True, dim=dim),
    )
    positions = torch.arange(inverse.numel(), device=x.device)
    first = torch.full((counts.numel(),), inverse.numel(), device=x.device)
    first = first.scatter_reduce(0, inverse, positions, "amin")
    if not sorted:
        order = torch.argsort(first)
        place = torch.argsort(order)
        values = values.index_select(dim, order)
        first, counts, inverse = first[order], counts[order], place[inverse]
    return (values, first, inverse, counts)[:outputs] if outputs > 1 else values


def _reduction(op_type: str, meaning: Any, weight: int = 1, since: int = 1) -> OpSpec:
    return op(op_type, meaning, reading_cost(weight), since=since, static=(1,))


SPECS: tuple[OpSpec, ...] = (
    _reduction("ReduceSum", reduce_sum),
    _reduction("ReduceMean", reduce_mean),
    _reduction("ReduceMax", reduce_max),
    _reduction("ReduceMin", reduce_min),
    _reduction("ReduceProd", reduce_prod),
    _reduction("ReduceL1", reduce_l1, 2),
    _reduction("ReduceL2", reduce_l2, 2),
    _reduction("ReduceSumSquare", reduce_sum_square, 2),
    _reduction("ReduceLogSum", reduce_log_sum),
    _reduction("ReduceLogSumExp", reduce_log_sum_exp, TRANSCENDENTAL),
    op("ArgMax", arg_max, reading_cost()),
    op("ArgMin", arg_min, reading_cost()),
    op("TopK", top_k, reading_cost(4), since=10, static=(1,)),
    op("Softmax", softmax, reading_cost(TRANSCENDENTAL + DIVISION), since=13),
    op("LogSoftmax", log_softmax, reading_cost(TRANSCENDENTAL + 2), since=13),
    op("Hardmax", hardmax, reading_cost(2), since=13),
    op("CumSum", cum_sum, reading_cost(), since=11, static=(1,)),
    op("CumProd", cum_prod, reading_cost(), since=26, static=(1,)),
    op("Det", det, reading_cost(4), since=11),
    op("Unique", unique, reading_cost(8), since=11, facts=output_count),
)
