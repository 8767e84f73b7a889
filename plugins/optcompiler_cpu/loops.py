"""Pointwise steps, gathering and running sums."""

from __future__ import annotations

import re
from collections.abc import Callable

from optcompiler.lowering.extents import c_long, is_run_time
from optcompiler.lowering.ir import CumSum, Gather, Loop, View
from optcompiler_cpu.code import KernelCode, Pointers, indent, linear
from optcompiler_cpu.expressions import PREFIXES, WIDENED, Place, VectorPrinter, vectorisable
from optcompiler_cpu.isa import Isa
from optcompiler_cpu.nest import (
    SERIAL_ELEMENTS,
    Nest,
    expression_views,
    has_index,
    nest_of,
    outer_loops,
    placer,
    vector_loop,
)
from optcompiler_cpu.scalars import ScalarPrinter, c_type, loaded, stored

HEADER = "void @(int part, int parts, char *const *q, char *scratch)"


def function(pointers: Pointers, lines: list[str], parallel: bool, scratch: int = 0) -> KernelCode:
    """A kernel of the given body."""
    unused = "(void)part, (void)parts, (void)scratch;"
    text = f"{HEADER} {{\n{indent([*pointers.declarations(lines), unused, *lines])}\n}}\n"
    return KernelCode(text, pointers.finish(), parallel=parallel, scratch_bytes=scratch)


def print_loop(step: Loop, isa: Isa) -> KernelCode:
    views = [step.out, *expression_views(step.epilogue)]
    parallel = step.out.elements >= SERIAL_ELEMENTS
    if has_index(step.epilogue) or not vectorisable(step.epilogue):
        return _scalar_loop(step, views, parallel)
    nest = nest_of(step.out.shape, views, step.out)
    lane = _lane(nest, views, isa)
    pointers = Pointers()
    pointers.view(step.out, written=True)
    place = placer(pointers, nest, lane)

    def plain(count: str | None) -> list[str]:
        printer = VectorPrinter(pointers.params, place, "", count)
        target = place(step.out)
        printer.store(step.epilogue, target.pointer, target.stride)
        return [line for level in printer.lines for line in level]

    emit: Callable[[str | None], list[str]] = plain
    length, inner = nest.sizes[lane], [lane]
    planes = _planes(nest, step.out, lane)
    if planes is not None:
        emit = _weaver(step, nest, planes, pointers, place)
        inner.append(planes)
    if len(nest.sizes) == len(inner) and parallel:
        chunks = -(-length // 64)
        low, high = (
            f"(long)part * {chunks} / parts * 64",
            f"(long)(part + 1) * {chunks} / parts * 64",
        )
        lines = [f"const long stop = {high} < {length} ? {high} : {length};"]
        lines += vector_loop(length, isa.lanes, emit, low, "stop")
    else:
        lines = outer_loops(nest, inner, vector_loop(length, isa.lanes, emit), parallel)
    return function(pointers, lines, parallel)


def _planes(nest: Nest, out: View, lane: int) -> int | None:
    """The loop over few byte planes that are stored interleaved along the loop `lane`."""
    strides = nest.strides(out)
    for d, size in enumerate(nest.sizes):
        if (
            d != lane
            and not is_run_time(size)
            and 2 <= size <= 4
            and strides[d] == 1
            and strides[lane] == size
        ):
            return d if out.dtype in {"UINT8", "INT8"} else None
    return None


def _weaver(
    step: Loop, nest: Nest, planes: int, pointers: Pointers, place: Callable[[View], Place]
) -> Callable[[str | None], list[str]]:
    count = nest.sizes[planes]

    def emit(left: str | None) -> list[str]:
        lines: list[str] = []
        names: list[str] = []
        for plane in range(count):
            printer = VectorPrinter(pointers.params, place, "", left, prefix=f"t{plane}_")
            names.append(printer.print(step.epilogue))
            for line in (line for level in printer.lines for line in level):
                lines.append(re.sub(rf"\bi{planes}\b", str(plane), line))
        target = re.sub(rf"\bi{planes}\b", "0", place(step.out).pointer)
        four = ", ".join((names * 2)[:4])
        return [*lines, f"vi_weave({target}, {four}, {count}, {left or 'VL'});"]

    return emit


def _lane(nest: Nest, views: list[View], isa: Isa) -> int:
    """The loop to vectorise: the innermost, unless another is longer and reads in order."""
    last = len(nest.sizes) - 1
    if nest.sizes[last] >= isa.lanes:
        return last

    def order(d: int) -> tuple[bool, int]:
        near = sum(nest.strides(v)[d] == 1 for v in views)
        return (nest.sizes[d] >= isa.lanes and near > 0, near)

    best = max(range(last + 1), key=lambda d: (*order(d), d))
    return best if order(best)[0] else last


def element(pointers: Pointers, nest: Nest, view: View, written: bool = False) -> str:
    names = [f"i{d}" for d in range(len(nest.sizes))]
    base = pointers.view(view, written)
    return f"{base}[{linear(names, nest.strides(view), view.offset)}]"


def _scalar_loop(step: Loop, views: list[View], parallel: bool) -> KernelCode:
    nest = nest_of(step.out.shape, views, step.out, keep=has_index(step.epilogue))
    pointers = Pointers()
    target = element(pointers, nest, step.out, written=True)
    printer = scalar_printer(pointers, nest)
    name = printer.print(step.epilogue)
    lines = outer_loops(
        nest, [], [*printer.lines, f"{target} = {stored(step.out.dtype, name)};"], parallel
    )
    return function(pointers, lines, parallel)


def scalar_printer(pointers: Pointers, nest: Nest, accumulator: str = "") -> ScalarPrinter:
    return ScalarPrinter(
        lambda view: element(pointers, nest, view), lambda axis: f"i{axis}", accumulator
    )


def print_gather(step: Gather, isa: Isa) -> KernelCode:
    """One row of `data` per index; the trailing axes are the vectors."""
    rank, axis = len(step.out.shape), step.axis
    middle = len(step.indices.shape)
    shape = step.out.shape
    nest = nest_of(shape, [step.out], step.out, keep=True)
    pointers = Pointers()
    pointers.view(step.out, written=True)
    data, indices = pointers.view(step.data), pointers.view(step.indices)
    names = [f"i{d}" for d in range(rank)]
    before, after = names[:axis], names[axis + middle :]
    limit = step.data.shape[axis]
    inside = linear(names[axis : axis + middle], step.indices.strides, step.indices.offset)
    index = f"{indices}[{inside}]"
    found = [f"long at = (long){index};", f"at = at < 0 ? at + {limit} : at;",
             f"at = at < 0 ? 0 : at >= {limit} ? {limit - 1} : at;"]  # fmt: skip
    tail = step.data.strides[axis + 1 :]
    head = linear(before, step.data.strides[:axis], step.data.offset)
    start = f"{data} + {head} + at * {c_long(step.data.strides[axis])}"
    parallel = step.out.elements >= SERIAL_ELEMENTS
    simple = vectorisable(step.epilogue) and step.data.dtype in WIDENED and bool(after)
    if not simple:
        text = loaded(step.data.dtype, f"({start})[{linear(after, tail)}]")
        printer = scalar_printer(pointers, nest, text)
        name = printer.print(step.epilogue)
        target = element(pointers, nest, step.out, written=True)
        body = [*found, *printer.lines, f"{target} = {stored(step.out.dtype, name)};"]
        return function(pointers, outer_loops(nest, [], body, parallel), parallel)
    lane = rank - 1
    place = placer(pointers, nest, lane)
    inner = linear([*after[:-1], "j"], tail)

    def emit(count: str | None) -> list[str]:
        lanes = count or "VL"
        verb = f"{PREFIXES[step.data.dtype]}_load"
        spelled = f"{verb}s({start} + {inner}, {tail[-1]}, {lanes})"
        if tail[-1] == 1:
            spelled = f"{verb}n({start} + {inner}, {lanes})"
        printer = VectorPrinter(pointers.params, place, spelled, count)
        target = place(step.out)
        printer.store(step.epilogue, target.pointer, target.stride)
        return [line for level in printer.lines for line in level]

    body = [*found, *vector_loop(shape[lane], isa.lanes, emit)]
    return function(pointers, outer_loops(nest, [lane], body, parallel), parallel)


def print_cumsum(step: CumSum, isa: Isa) -> KernelCode:
    nest = nest_of(step.out.shape, [step.out], step.out, keep=True)
    pointers = Pointers()
    target = element(pointers, nest, step.out, written=True)
    value = scalar_printer(pointers, nest)
    name = value.print(step.value)
    after = scalar_printer(pointers, nest, "total")
    size, axis = step.out.shape[step.axis], step.axis
    result = after.print(step.epilogue)
    product = step.op == "prod"
    add = [f"total {'*' if product else '+'}= {name};"]
    use = [
        "{",
        *(f"  {x}" for x in after.lines),
        f"  {target} = {stored(step.out.dtype, result)};",
        "}",
    ]
    body = [*value.lines, *(use + add if step.exclusive else add + use)]
    position = f"{size - 1} - at" if step.reverse else "at"
    lines = [
        f"{c_type(step.value.dtype)} total = {int(product)};",
        f"for (long at = 0; at < {size}; ++at) {{",
        f"  const long i{axis} = {position};",
        *(f"  {x}" for x in body),
        "}",
    ]
    return function(pointers, outer_loops(nest, [axis], lines, False), False)
