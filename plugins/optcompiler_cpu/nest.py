"""Loop nests over a step's space: axes in memory order, merged where every view allows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optcompiler.lowering.extents import c_long, is_run_time
from optcompiler.lowering.ir import Expr, Index, View, loads, product, walk
from optcompiler_cpu.code import Pointers, coordinates, linear
from optcompiler_cpu.expressions import Place

SERIAL_ELEMENTS = 8192
"""Steps of fewer elements run on one thread: a barrier costs more than they do."""


@dataclass(frozen=True)
class Nest:
    """`axes[d]` are the space's axes that loop `d` runs over as one; `sizes[d]` its length."""

    axes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]

    def strides(self, view: View) -> tuple[int, ...]:
        """The view's stride along each loop."""
        return tuple(
            next((view.strides[a] for a in reversed(group) if view.shape[a] != 1), 0)
            for group in self.axes
        )


def nest_of(shape: Sequence[int], views: Sequence[View], lead: View, keep: bool = False) -> Nest:
    """Loops over `shape` in the memory order of `lead`, merged for all `views` unless `keep`."""
    axes = [a for a in range(len(shape)) if shape[a] != 1]
    if keep:
        every = tuple(range(len(shape)))
        return Nest(tuple((a,) for a in every), tuple(shape))
    axes.sort(key=lambda a: (-abs(lead.strides[a]), a))
    groups: list[list[int]] = []
    for axis in axes:
        if groups and all(
            v.strides[groups[-1][-1]] == v.strides[axis] * shape[axis] for v in views
        ):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    if not groups:
        groups = [[]]
    sizes = tuple(product(tuple(shape[a] for a in g)) for g in groups)
    return Nest(tuple(tuple(g) for g in groups), sizes)


def expression_views(*exprs: Expr) -> list[View]:
    return [load.view for load in loads(*exprs)]


def has_index(*exprs: Expr) -> bool:
    return any(isinstance(e, Index) for expr in exprs for e in walk(expr))


def placer(pointers: Pointers, nest: Nest, lane: int, column: str = "j") -> Callable[[View], Place]:
    """Places loads at loop variables `i0`, `i1`, … with `column` along loop `lane`."""
    names = [f"i{d}" for d in range(len(nest.sizes))]

    def place(view: View) -> Place:
        strides = list(nest.strides(view))
        step = strides[lane]
        strides[lane] = 0
        base = pointers.view(view)
        moving = any(s and n > 1 for s, n in zip(strides, nest.sizes, strict=True))
        text = f"{base} + {linear(names, strides, view.offset)}"
        if step:
            text += f" + {column}" if step == 1 else f" + {column} * {c_long(step)}"
        return Place(text, step, 2 if moving or step else 0)

    return place


def outer_loops(nest: Nest, skip: Sequence[int], body: list[str], parallel: bool) -> list[str]:
    """`body` inside a loop per axis of the nest but `skip`; the first divided among threads."""
    order = [d for d in range(len(nest.sizes)) if d not in skip]
    if parallel and len(order) > 1 and is_run_time(nest.sizes[order[0]]):
        return shared_loop(nest, order[:2], outer_loops(nest, [*skip, *order[:2]], body, False))
    lines = body
    for place, d in reversed(list(enumerate(order))):
        low, high = "0", str(nest.sizes[d])
        if place == 0 and parallel:
            low, high = f"(long)part * {high} / parts", f"(long)(part + 1) * {high} / parts"
        lines = [
            f"for (long i{d} = {low}; i{d} < {high}; ++i{d}) {{",
            *(f"  {x}" for x in lines),
            "}",
        ]
    if not order and parallel:
        lines = ["if (part == 0) {", *(f"  {x}" for x in lines), "}"]
    return lines


def shared_loop(nest: Nest, dims: Sequence[int], body: list[str]) -> list[str]:
    """`body` in one loop over all indices of some loops of the nest, divided among threads.

    A single loop whose length is known at run time alone may be too short to divide.
    """
    sizes = tuple(nest.sizes[d] for d in dims)
    size = product(sizes)
    places = coordinates("place", sizes, [f"i{d}" for d in dims])
    return [
        f"const long end = (long)(part + 1) * {size} / parts;",
        f"for (long place = (long)part * {size} / parts; place < end; ++place) {{",
        *(f"  {x}" for x in (*places, *body)),
        "}",
    ]


def vector_loop(
    length: int, lanes: int, emit: Callable[[str | None], list[str]], low: str = "0", high: str = ""
) -> list[str]:
    """A loop of whole vectors over `j` and one partial vector; `emit(count)` prints the body."""
    end = high or str(length)
    lines = [f"long j = {low};"]
    if length >= lanes or high:
        lines += [f"for (; j + VL <= {end}; j += VL) {{", *(f"  {x}" for x in emit(None)), "}"]
    if length % lanes or high:
        tail = [f"const int left = (int)({end} - j);", *emit("left")]
        lines += [f"if (j < {end}) {{", *(f"  {x}" for x in tail), "}"]
    return lines
