"""Offline memory planning: every temporary gets a place in one arena by its lifetime."""

from __future__ import annotations

from optcompiler.lowering.ir import Buffer, Load, Loop, Lowered, Step, walk

ALIGNMENT = 64

PAGE, STAGGER, LARGE = 4096, 1088, 32768
"""Loads wait for earlier stores whose addresses agree in their last 12 bits, so large buffers of
one another's sizes do not begin a whole number of pages apart."""


def plan(lowered: Lowered) -> None:
    """Fill in `first`, `last` and `offset` of every buffer, and `arena_bytes`.

    Greedy best fit, largest buffer first, 64-byte aligned (Pisarchyk and Lee, "Efficient Memory
    Management for Deep Neural Net Inference", 2020, §5.2). A pointwise step writes over an operand
    that dies with it when both have the same views, element for element.
    """
    for buffer in lowered.buffers:
        buffer.first = buffer.last = buffer.offset = -1
    for index, step in enumerate(lowered.steps):
        for view in (step.out, *step.reads()):
            if view.buffer.first < 0:
                view.buffer.first = index
            view.buffer.last = index
    roots = _in_place(lowered)
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
            max(size, _aligned(buffer.size_bytes)),
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
        lowered.arena_bytes = max(lowered.arena_bytes, where + size)


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
