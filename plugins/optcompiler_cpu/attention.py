"""Attention in one step: scores and their softmax stay in cache, some rows at a time.

The scores of a whole matrix go to memory and come back twice when each product and the softmax is
a step of its own, and with several threads half of them from another core's cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from optcompiler.backend import Kernel
from optcompiler.lowering.build import map_views
from optcompiler.lowering.ir import (
    Buffer,
    Expr,
    MatMul,
    Softmax,
    Step,
    View,
    itemsize,
    loads,
    product,
)
from optcompiler.lowering.kernels import kernel_of, touched
from optcompiler_cpu.code import KernelCode, declared_sizes, indent
from optcompiler_cpu.contraction import prepared
from optcompiler_cpu.dynamic import SLICE_ROWS, over_slices, product_of
from optcompiler_cpu.expressions import vectorisable
from optcompiler_cpu.isa import Isa
from optcompiler_cpu.rows import softmax_of_rows

PANEL_BYTES = 1 << 20
"""What the packed second operands of one matrix may take: a second-level cache."""

ROW_ALIGNMENT = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class Attention(Step):
    """`values(softmax(scores(q, k)), v)`: each of the three as a step of its own would be.

    What `scores` and `softmax` write is not in memory: those views are of buffers that stand for
    rows of scratch, and repeat along every axis but the last two.
    """

    scores: MatMul
    softmax: Softmax
    values: MatMul

    def operand_views(self) -> tuple[View, ...]:
        return (*self.scores.operand_views(), self.values.b.view)

    def reads(self) -> tuple[View, ...]:
        inner = {self.scores.out.buffer, self.softmax.out.buffer}
        every = [*self.operand_views(), *(e.view for e in loads(*self.expressions()))]
        return tuple(view for view in every if view.buffer not in inner)

    def expressions(self) -> tuple[Expr, ...]:
        return (self.scores.epilogue, self.softmax.value, self.softmax.epilogue, self.epilogue)


Uses = Mapping[int, Sequence[tuple[Step, View]]]
"""Index of a buffer → the steps that write or read it, in order, and their views."""


def fused(steps: Sequence[Step]) -> list[Step]:
    """The steps with every product, softmax of it and product with that as one, where the last of
    the three was."""
    uses: dict[int, list[tuple[Step, View]]] = {}
    for step in steps:
        for view in (step.out, *step.reads()):
            uses.setdefault(view.buffer.index, []).append((step, view))
    made: dict[Step, Attention] = {}
    gone: set[Step] = set()
    for step in steps:
        found = _attention(step, uses) if isinstance(step, MatMul) else None
        if found is not None:
            scores, softmax, made[step] = found
            gone |= {scores, softmax}
    return [made.get(step, step) for step in steps if step not in gone]


def _attention(values: MatMul, uses: Uses) -> tuple[MatMul, Softmax, Attention] | None:
    softmax = _writer(values.a.view, uses)
    if not isinstance(softmax, Softmax):
        return None
    products = (_writer(load.view, uses) for load in loads(softmax.value))
    scores = next((p for p in products if isinstance(p, MatMul)), None)
    if (
        scores is None
        or prepared(scores)
        or prepared(values)
        or softmax.axis != len(softmax.out.shape) - 1
        or not vectorisable(scores.epilogue, softmax.value, softmax.epilogue)
        or _panel_bytes(scores) + _panel_bytes(values) > PANEL_BYTES
        or not _between(scores, softmax, uses)
        or not _between(softmax, values, uses)
        or softmax.out.shape != scores.out.shape
        or values.a.view.dtype == "INT8"
    ):
        return None
    rows, weights = _rows(scores.out, -1), _rows(softmax.out, -2)

    def change(view: View) -> View:
        for old, new in ((scores.out, rows), (softmax.out, weights)):
            if view.buffer is old.buffer:
                return new
        return view

    one = Attention(
        name=f"{values.name}_attention",
        nodes=tuple(dict.fromkeys(n for s in (scores, softmax, values) for n in s.nodes)),
        out=values.out,
        epilogue=values.epilogue,
        scores=replace(scores, out=rows),
        softmax=replace(
            softmax, out=weights, value=map_views(softmax.value, change),
            epilogue=map_views(softmax.epilogue, change),
        ),
        values=replace(values, a=replace(values.a, view=weights)),
    )  # fmt: skip
    return scores, softmax, one


def _writer(view: View, uses: Uses) -> Step | None:
    """The only step that writes the view's buffer."""
    writers = [s for s, v in uses[view.buffer.index] if s.out is v]
    return writers[0] if len(writers) == 1 else None


def _between(first: Step, second: Step, uses: Uses) -> bool:
    """Whether what `first` writes goes to `second` alone, element for element."""
    out = first.out
    return out.buffer.kind == "temp" and all(
        step in (first, second) and view.shape == out.shape and _address(view) == _address(out)
        for step, view in uses[out.buffer.index]
    )


def _address(view: View) -> tuple[int, ...]:
    moving = (s for n, s in zip(view.shape, view.strides, strict=True) if n != 1)
    return (view.offset, *moving)


def _panel_bytes(step: MatMul) -> int:
    return product(step.b.view.shape[-2:]) * itemsize(step.b.view.dtype)


def _rows(view: View, index: int) -> View:
    """A view of rows in scratch with the shape of `view`."""
    *batch, m, n = view.shape
    step = -(-n // ROW_ALIGNMENT) * ROW_ALIGNMENT
    buffer = Buffer(index, view.dtype, step * min(m, SLICE_ROWS), "temp", view.buffer.source)
    buffer.offset = 0
    return View(buffer, view.shape, (*(0 for _ in batch), step, 1))


def kernel_of_attention(step: Attention) -> Kernel:
    """What it costs: the arithmetic of all three, and memory for what is read and written."""
    parts = [kernel_of(s) for s in (step.scores, step.softmax, step.values)]
    views = {(v.buffer.index, v.offset): v for v in (step.out, *step.reads())}.values()
    batch, m, n, k = parts[0].shape
    return replace(
        parts[2],
        name=step.name,
        nodes=step.nodes,
        macs=parts[0].macs + parts[2].macs,
        flops=sum(p.flops for p in parts),
        bytes_moved=sum(touched(v) * itemsize(v.dtype) for v in views),
        weight_bytes=0,
        shape=(batch, m, n, k, *parts[2].shape[-2:]),
    )


def _of(name: str, lines: Sequence[str]) -> list[str]:
    """Lines that name functions of one of the three parts."""
    return [line.replace("@_", f"@_{name}_") for line in lines]


def print_attention(step: Attention, isa: Isa) -> KernelCode:
    first, last = (product_of(s, isa, together=True) for s in (step.scores, step.values))
    middle = softmax_of_rows(step.softmax, isa)
    parts = (("scores", first.code), ("softmax", middle), ("values", last.code))
    texts = [code.text.replace("@_", f"@_{name}_") for name, code in parts]
    pointers = [pointer for _, code in parts for pointer in code.pointers]
    starts = [0, len(first.code.pointers), len(first.code.pointers) + len(middle.pointers)]
    memory: list[str] = []
    size = 0

    def area(name: str, room: int) -> None:
        nonlocal size
        memory.append(f"char *const {name} = scratch + {size};")
        size += -(-(room + ROW_ALIGNMENT) // ROW_ALIGNMENT) * ROW_ALIGNMENT

    area("keys", first.code.scratch_bytes)
    area("panels", last.code.scratch_bytes)
    area("sums", middle.scratch_bytes)
    placed: list[str] = []
    for name, view in (("rows", step.scores.out), ("weights", step.softmax.out)):
        area(name, view.buffer.size_bytes)
        row_bytes = view.strides[-2] * itemsize(view.dtype)
        entries = [i for i, p in enumerate(pointers) if p.buffer is view.buffer]
        places = " = ".join(f"q[{i}]" for i in entries)
        placed.append(f"{places} = (char *)((uintptr_t){name} - (uintptr_t)from * {row_bytes});")
    own = f"q + {starts[2]}"
    scored = first.each("@_rows({k}, unit, from, to, {q}, keys);")
    valued = last.each("@_rows({k}, unit, from, to, {q}, panels);", own)
    slices = over_slices(
        first.units,
        first.rows,
        [
            *_of("scores", first.each("@_pack({k}, unit, {q}, keys);")),
            *_of("values", last.each("@_pack({k}, unit, {q}, panels);", own)),
            f"for (int from = low; from < high; from += {SLICE_ROWS}) {{",
            f"  const int to = from + {SLICE_ROWS} < high ? from + {SLICE_ROWS} : high;",
            "  /* rows go by their number in the whole matrix */",
            *(f"  {line}" for line in placed),
            *(f"  {line}" for line in _of("scores", scored)),
            f"  @_softmax_rows(unit, from, to, q + {starts[1]}, sums);",
            *(f"  {line}" for line in _of("values", valued)),
            "}",
        ],
    )
    sizes = declared_sizes(slices, pointers, "given")
    body = [
        f"char *q[{len(pointers)}];",
        "memcpy(q, given, sizeof q);",
        *sizes,
        *memory,
        *slices,
    ]
    header = "void @(int part, int parts, char *const *given, char *scratch)"
    text = "\n".join([*texts, f"{header} {{\n{indent(body)}\n}}\n"])
    return KernelCode(text, pointers, scratch_bytes=size, tiles=first.code.tiles | last.code.tiles)
