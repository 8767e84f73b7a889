"""Offline memory planning: every temporary gets a place in one arena by its lifetime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from optcompiler.lowering.extents import Extent, Symbol
from optcompiler.lowering.extents import symbols as symbols_of
from optcompiler.lowering.ir import Buffer, Load, Loop, Lowered, Step, itemsize, product, walk

ALIGNMENT = 64

PAGE, STAGGER, LARGE = 4096, 1088, 32768
"""Loads wait for earlier stores whose addresses agree in their last 12 bits, so large buffers of
one another's sizes do not begin a whole number of pages apart."""

ROOM = 1.1
"""How much more memory than a plan for the largest sizes one for all sizes may take."""


def plan(lowered: Lowered) -> None:
    """Fill in `first`, `last` and `offset` of every buffer, and `arena_bytes`.

    Greedy best fit, largest buffer first, 64-byte aligned (Pisarchyk and Lee, "Efficient Memory
    Management for Deep Neural Net Inference", 2020, §5.2). A pointwise step writes over an operand
    that dies with it when both have the same views, element for element.

    Where sizes are read at run time, offsets are to be multiplied by those in `arena_scale`, so
    that small sizes lie as densely in caches as if memory had been planned for them; it is empty
    where that would take more memory at the largest.
    """
    for buffer in lowered.buffers:
        buffer.first = buffer.last = buffer.offset = -1
    for index, step in enumerate(lowered.steps):
        for view in (step.out, *step.reads()):
            if view.buffer.first < 0:
                view.buffer.first = index
            view.buffer.last = index
    roots = _in_place(lowered)
    sizes = {b.index: b.size_bytes for b in lowered.buffers}
    most = _place(lowered, roots, sizes)
    lowered.arena_bytes, lowered.arena_scale = most, ()
    symbols = sorted({s for b in lowered.buffers for s in symbols_of(b.elements)})
    for scale in (tuple(symbols), *((s,) for s in symbols)):
        units = {b.index: _unit(b, scale) for b in lowered.buffers}
        if not scale or None in units.values():
            continue
        scaled = _place(lowered, roots, cast("dict[int, int]", units))
        scaled *= product(tuple(s.most for s in scale))
        if scaled <= ROOM * most:
            lowered.arena_bytes, lowered.arena_scale = scaled, scale
            return
    if symbols:
        _place(lowered, roots, sizes)


def _unit(buffer: Buffer, scale: tuple[Symbol, ...]) -> int | None:
    """Bytes that, times the sizes in `scale`, hold the buffer at every size; None where no number
    is known to."""
    if not isinstance(buffer.elements, Extent):
        least = product(tuple(s.least for s in scale))
        return -(-buffer.size_bytes // least)
    if not buffer.elements.sums_products:
        return None
    # a sum of products of powers from -1 to 1 is convex along every size, so greatest at the ends
    return max(
        -(
            -buffer.elements.at(at)
            * itemsize(buffer.dtype)
            // product(tuple(at[s.name] for s in scale))
        )
        for at in buffer.elements.corners({*scale})
    )


def _place(lowered: Lowered, roots: dict[int, Buffer], sizes: Mapping[int, int]) -> int:
    """Fill in the offsets for buffers of these sizes, and return what all of them take."""
    total = 0
    spans: dict[int, tuple[int, int, int]] = {}
    members: dict[int, list[Buffer]] = {}
    for buffer in lowered.buffers:
        if buffer.kind != "temp" or buffer.first < 0:
            continue
        root = _find(roots, buffer)
        first, last, size = spans.get(root.index, (buffer.first, buffer.last, 0))
        spans[root.index] = (
            min(first, buffer.first),
            max(last, buffer.last),
            max(size, _aligned(sizes[buffer.index])),
        )
        members.setdefault(root.index, []).append(buffer)
    placed: list[tuple[int, int, int, int]] = []
    for index in sorted(spans, key=lambda i: (-spans[i][2], i)):
        first, last, size = spans[index]
        taken = sorted((o, o + s) for f, l, s, o in placed if f <= last and l >= first)
        offset, best = 0, None
        for start, end in taken:
            if start - offset >= size and (best is None or start - offset < best[1]):
                best = (offset, start - offset)
            offset = max(offset, end)
        where = best[0] if best is not None else offset
        placed.append((first, last, size, where))
        for buffer in members[index]:
            buffer.offset = where
        total = max(total, where + size)
    return total


def _aligned(size: int) -> int:
    size = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
    return size if size < LARGE else size + (STAGGER - size) % PAGE


def _find(roots: dict[int, Buffer], buffer: Buffer) -> Buffer:
    while buffer.index in roots:
        buffer = roots[buffer.index]
    return buffer


def _in_place(lowered: Lowered) -> dict[int, Buffer]:
    """Buffer index → the buffer whose memory it takes over."""
    roots: dict[int, Buffer] = {}
    for index, step in enumerate(lowered.steps):
        target = step.out.buffer
        if type(step) is not Loop or target.kind != "temp" or target.first != index:
            continue
        for source in _dying(step, index):
            if source.size_bytes == target.size_bytes:
                roots[target.index] = source
                break
    return roots


def _dying(step: Step, index: int) -> list[Buffer]:
    """Temporaries that the step reads last, each element only where it is written."""
    views = [e.view for e in walk(step.epilogue) if isinstance(e, Load)]
    out = step.out
    result: list[Buffer] = []
    for view in views:
        same = [v for v in views if v.buffer is view.buffer]
        if (
            view.buffer.kind == "temp"
            and view.buffer.last == index
            and view.buffer.dtype == out.buffer.dtype
            and all((v.strides, v.offset) == (out.strides, out.offset) for v in same)
        ):
            result.append(view.buffer)
    return result
