"""Other kernels for the same contraction: how they are summed, and how wide their tiles are.

Which one a step gets follows from rules (`is_winograd`, `is_short`, the widest tiles). Those that
an estimate finds next best are worth a measurement where somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from optcompiler.lowering.extents import symbols
from optcompiler.lowering.ir import Conv, MatMul, Step, product
from optcompiler_cpu.amx import AMX
from optcompiler_cpu.code import KernelCode
from optcompiler_cpu.contraction import (
    column_blocks,
    conv_shape,
    matmul_shape,
    prepared,
    print_contraction,
)
from optcompiler_cpu.depthwise import is_direct
from optcompiler_cpu.heights import even_height
from optcompiler_cpu.isa import Isa, Tiling
from optcompiler_cpu.short import can_be_short, is_short, print_short
from optcompiler_cpu.weights import is_compressed
from optcompiler_cpu.winograd import (
    can_be_winograd,
    cycles,
    is_winograd,
    print_winograd,
    tile_counts,
)

PRINTERS: Mapping[str, Callable[..., KernelCode]] = {
    "winograd": print_winograd, "short": print_short, "direct": print_contraction,
}  # fmt: skip

CALL_CYCLES = 40
"""What a tile costs beside its products: addresses of its rows, a call, its first sums."""

SHORT_SAVES = 2
"""Cycles per vector of results that a tile which stores its own sums saves."""


def variants_of(step: Step, isa: Isa) -> list[str]:
    """Names of kernels for the step, the one that the rules choose first, then by estimate.

    Empty where there is no choice.
    """
    if not isinstance(step, (Conv, MatMul)) or not _chooses(step, isa):
        return []
    first = _usual(step, isa)
    tiling = isa.tiling(step.a.view.dtype, product(_rows(step)))
    names = [
        f"{method} {width}"
        for method in _methods(step, isa)
        for width in range(tiling.widest, 0, -1)
        if width <= -(-_columns(step) // isa.lanes)
        and (method != "short" or can_be_short(step, narrowed(isa, width)))
    ]
    # tiles of one width that come out the same are one kernel
    by_blocks = {(n.split()[0], _blocks(step, isa, n)): n for n in reversed(names)}
    found = sorted(by_blocks.values(), key=lambda n: (_cycles(step, isa, n), n))
    same = {n for n in found if (n.split()[0], _blocks(step, isa, n)) ==
            (first.split()[0], _blocks(step, isa, first))}  # fmt: skip
    others = [n for n in found if n not in same]
    return [first, *others] if others else []


def print_other(step: Conv | MatMul, isa: Isa, name: str) -> KernelCode:
    method, width = name.split()
    return PRINTERS[method](step, narrowed(isa, int(width)))


def narrowed(isa: Isa, widest: int) -> Isa:
    """The instruction set with tiles of no more than `widest` vectors across."""

    def narrow(tiling: Tiling) -> Tiling:
        if tiling.kind == AMX or tiling.widest <= widest:
            return tiling
        kept = {w: h for w, h in tiling.heights.items() if w <= widest}
        return replace(tiling, heights=kept)

    return replace(
        isa, floats=narrow(isa.floats), halves=narrow(isa.halves),
        integers=tuple(map(narrow, isa.integers)),
    )  # fmt: skip


def _chooses(step: Conv | MatMul, isa: Isa) -> bool:
    if isinstance(step, MatMul) and not prepared(step):
        return False
    if isinstance(step, Conv) and is_direct(step):
        return False
    views = (step.out, *step.reads())
    if any(symbols(n) for view in views for n in view.shape) or is_compressed(step):
        return False
    return isa.tiling(step.a.view.dtype, product(_rows(step))).kind != AMX


def _usual(step: Conv | MatMul, isa: Isa) -> str:
    widest = isa.tiling(step.a.view.dtype, product(_rows(step))).widest
    if isinstance(step, Conv) and is_winograd(step, isa):
        return f"winograd {widest}"
    return f"{'short' if is_short(step, isa) else 'direct'} {widest}"


def _methods(step: Conv | MatMul, isa: Isa) -> list[str]:
    found = ["direct"]
    if can_be_short(step, isa):
        found.append("short")
    if isinstance(step, Conv) and can_be_winograd(step, isa):
        found.append("winograd")
    return found


def _rows(step: Conv | MatMul) -> tuple[int, ...]:
    return (conv_shape(step) if isinstance(step, Conv) else matmul_shape(step)).dims


def _columns(step: Conv | MatMul) -> int:
    return (conv_shape(step) if isinstance(step, Conv) else matmul_shape(step)).n


def _blocks(step: Conv | MatMul, isa: Isa, name: str) -> tuple[tuple[int, int], ...]:
    """The panels of columns, (first column, vectors)."""
    narrow = narrowed(isa, int(name.split()[1]))
    tiling = narrow.tiling(step.a.view.dtype, product(_rows(step)))
    return tuple(column_blocks(_columns(step), isa, tiling))


def _cycles(step: Conv | MatMul, isa: Isa, name: str) -> float:
    """An estimate: of every step of K two vectors are multiplied, or two loaded, in a cycle."""
    method, width = name.split()
    narrow = narrowed(isa, int(width))
    if method == "winograd":
        assert isinstance(step, Conv)
        return cycles(step, narrow, product(tile_counts(step)))
    shape = conv_shape(step) if isinstance(step, Conv) else matmul_shape(step)
    rows = product(shape.dims)
    tiling = narrow.tiling(shape.dtype, rows)
    depth = shape.outer * shape.inner * -(-shape.length // tiling.step)
    total = 0.0
    for _, vectors in column_blocks(shape.n, isa, tiling):
        height = even_height(rows, tiling.heights[vectors])
        for count, high in ((rows // height, height), (1, rows % height)):
            if high:
                step_cycles = max(vectors * high, vectors + high, 8) / 2
                save = SHORT_SAVES * vectors * high if method == "short" else 0
                total += count * (depth * step_cycles + CALL_CYCLES - save)
    return total * shape.groups
