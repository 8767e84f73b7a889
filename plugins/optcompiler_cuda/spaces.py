"""Laying the axes of a step's space over the dimensions of a kernel's tile."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from optcompiler.lowering.ir import Expr, Index, View, product, walk
from optcompiler_cuda.text import Axis, KernelText, Lane, blocks, power_of_two

PROGRAMS = 256
"""Programs that fill a large GPU about twice: beyond it a program takes more elements."""

FEWEST = 128
"""Elements below which a program wastes lanes."""


@dataclass(frozen=True)
class Printed:
    """A kernel ready to be named: `kind` begins its name, `grid` counts its programs."""

    kind: str
    text: KernelText
    grid: int
    num_warps: int = 4
    num_stages: int = 3


def indexed_axes(*exprs: Expr) -> frozenset[int]:
    """Axes whose index is itself a value in one of the expressions."""
    seen: set[int] = set()
    return frozenset(e.axis for expr in exprs for e in walk(expr, seen) if isinstance(e, Index))


def memory_order(view: View) -> list[int]:
    """The axes of `view` from the slowest in memory to the fastest."""
    return sorted(range(len(view.shape)), key=lambda d: (-abs(view.strides[d]), d))


def spread(
    kernel: KernelText,
    flat: str,
    order: Sequence[int],
    shape: Sequence[int],
    *,
    prefix: str,
    lane: Lane | None = None,
    views: Sequence[View] = (),
    apart: Collection[int] = (),
) -> dict[int, Axis]:
    """Split the index `flat`, which runs over the axes of `order` (slowest first), into axes.

    Neighbours that every one of `views` walks as one axis stay one: the fastest of them carries
    the joint index and the others stand at 0. Axes in `apart` are never joined.
    """
    axes = {d: Axis("0") for d in order}
    groups: list[list[int]] = []
    for d in order:
        if shape[d] == 1:
            continue
        if groups and _one_axis(groups[-1][-1], d, shape, views, apart):
            groups[-1].append(d)
        else:
            groups.append([d])
    rest = flat
    for position, group in reversed(list(enumerate(groups))):
        inner = group[-1]
        if position == 0:
            axes[inner] = Axis(rest, lane)
            break
        size = kernel.number(f"{prefix.upper()}{inner}", product(tuple(shape[d] for d in group)))
        kernel.line(f"{prefix}{inner} = {rest} % {size}")
        outer = f"{prefix}{groups[position - 1][-1]}" if position == 1 else f"{prefix}_rest"
        kernel.line(f"{outer} = {rest} // {size}")
        axes[inner], rest = Axis(f"{prefix}{inner}", lane), outer
    return axes


def _one_axis(
    outer: int, inner: int, shape: Sequence[int], views: Sequence[View], apart: Collection[int]
) -> bool:
    if outer in apart or inner in apart or not views:
        return False
    return all(v.strides[outer] == v.strides[inner] * shape[inner] for v in views)


def flat_lane(kernel: KernelText, total: int, block: int) -> tuple[Lane, int]:
    """Begin a kernel over `total` elements: `i` and its mask; the lane and the grid."""
    size = kernel.number("BLOCK", block)
    kernel.line(f"i = tl.program_id(0) * {size} + tl.arange(0, {size})")
    mask = None
    if total % block:
        kernel.line(f"exists = i < {kernel.number('TOTAL', total)}")
        mask = "exists"
    return Lane(mask), blocks(total, block)


def flat_block(total: int, largest: int = 1024) -> int:
    """Elements per program: enough programs to fill the device before programs grow."""
    return max(FEWEST, min(largest, power_of_two(blocks(total, PROGRAMS))))


def row_tile(total_rows: int, total_columns: int, widest: int) -> tuple[int, int]:
    """Rows and columns of a tile: whole rows up to `widest`, several when short or many."""
    columns = min(power_of_two(total_columns), widest)
    many = min(2048 // columns, power_of_two(blocks(total_rows, PROGRAMS)), 64)
    rows = max(1, FEWEST // columns, many)
    return min(rows, power_of_two(total_rows)), columns


def warps(elements: int) -> int:
    """Warps for a tile of that many elements."""
    return 1 if elements <= 128 else 2 if elements <= 512 else 4 if elements <= 4096 else 8
