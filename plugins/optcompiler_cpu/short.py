"""Contractions over a short K: the epilogue takes the sums from registers.

Where a sum is short, handing it over through memory costs as much as making it. These tiles are
printed with their epilogue, each for one kernel alone. Bytes are packed four vectors at a time:
those of one row, or with AVX-512 those of several rows, whose last vectors need not be whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from optcompiler.lowering.extents import is_run_time
from optcompiler.lowering.ir import Const, Conv, MatMul, Quantize, View, product, walk
from optcompiler_cpu.amx import AMX
from optcompiler_cpu.code import KernelCode, Pointers, indent
from optcompiler_cpu.contraction import (
    KINDS,
    Shape,
    Tiles,
    conv_shape,
    largest_sum,
    matmul_shape,
    prepared,
    print_contraction,
    row_placer,
    row_strides,
    tile_name,
    tile_sums,
)
from optcompiler_cpu.expressions import Place, VectorPrinter, is_packed
from optcompiler_cpu.isa import Isa, Tiling

MOST_STEPS = 64
"""Steps of K (four integers, two bfloat16, or one float) up to which a sum is short."""

JOINED = 16
"""Lanes of the vectors that rows of bytes are packed from several at a time."""

MOST_EXPRESSIONS = 16
"""Sub-expressions of an epilogue that is printed for every vector of a tile."""


def can_be_short(step: Conv | MatMul, isa: Isa) -> bool:
    """Whether tiles of the step can store their sums themselves."""
    if isinstance(step, MatMul) and not prepared(step):
        return False
    shape = conv_shape(step) if isinstance(step, Conv) else matmul_shape(step)
    tiling = isa.tiling(shape.dtype, product(shape.dims))
    return (
        tiling.kind != AMX
        and (shape.n % isa.lanes == 0 or _can_be_ragged(step, shape, isa, tiling))
        and sum(1 for _ in walk(step.epilogue)) <= MOST_EXPRESSIONS
    )


def _can_be_ragged(step: Conv | MatMul, shape: Shape, isa: Isa, tiling: Tiling) -> bool:
    """Whether the last vector of the only tile across may be stored in part."""
    return (
        isa.lanes == JOINED
        and not is_run_time(shape.n)
        and shape.groups == 1
        and shape.n < tiling.widest * isa.lanes
        and _is_packed(step)
    )


def _is_packed(step: Conv | MatMul) -> bool:
    """Whether the results are bytes in a row."""
    return is_packed(step.epilogue) and row_strides(step, step.out)[1] == 1


def is_short(step: Conv | MatMul, isa: Isa) -> bool:
    """Whether the step is a contraction over a short K."""
    if not can_be_short(step, isa):
        return False
    shape = conv_shape(step) if isinstance(step, Conv) else matmul_shape(step)
    tiling = isa.tiling(shape.dtype, product(shape.dims))
    return shape.outer * shape.inner * -(-shape.length // tiling.step) <= MOST_STEPS


def print_short(step: Conv | MatMul, isa: Isa) -> KernelCode:
    return print_contraction(step, isa, partial(print_whole_tiles, isa=isa))


def print_whole_tiles(
    step: Conv | MatMul, shape: Shape, pointers: Pointers, tiles: Tiles, isa: Isa
) -> tuple[str, list[str]]:
    """Functions `@_tile_…`, and the row offsets they want, in C terms of the row's coordinates."""
    args: list[str] = []
    pointers.view(step.out, written=True)
    places = [
        row_placer(step, shape, pointers, args, f"(n + {v} * VL)", "ROW")
        for v in range(max(vectors for _, vectors, _ in tiles))
    ]
    endings = {tile: _ending(step, shape, pointers, tile, places, isa) for tile in sorted(tiles)}
    kind = KINDS[min(tiles)[0]]
    offsets = "".join(f", const long *r{i}" for i, _ in enumerate(args))
    texts = [
        f"static void @_{tile_name(*tile)}(const {kind.item} *const *at, long outer, "
        f"long outer_stride, long inner, long inner_stride, long length, const {kind.weight} *w, "
        f"const {kind.total} *init, int n, char *const *q{offsets}) {{\n"
        f"{indent([*pointers.declarations(ending), *tile_sums(*tile), *ending])}\n}}\n"
        for tile, ending in endings.items()
    ]
    return "\n".join(texts), args


def _ending(
    step: Conv | MatMul,
    shape: Shape,
    pointers: Pointers,
    tile: tuple[str, int, int],
    places: Sequence[Callable[[View], Place]],
    isa: Isa,
) -> list[str]:
    """Statements that store what `tile_sums` has summed."""
    _, vectors, rows = tile
    joined = isa.lanes == JOINED and _is_packed(step)
    packed = joined or (_is_packed(step) and vectors > 1)
    ragged = shape.n % isa.lanes if joined else 0
    once: list[str] = []
    columns: list[str] = []
    row: list[str] = []
    results: list[str] = []
    for j, place in enumerate(places[:vectors]):
        spelled, factor = f"SUM_{j}", None
        if shape.integer:
            columns.append(f"const vf scales{j} = vf_load(scale + n + {j} * VL);")
            spelled = f"vf_mul(vi_float(SUM_{j}), scales{j})"
            factor = (f"vi_float(SUM_{j})", f"scales{j}")
        printer = VectorPrinter(
            pointers.params, place, spelled, str(ragged) if ragged and j + 1 == vectors else None,
            factor, prefix=f"t{j}_", largest=largest_sum(step),
        )  # fmt: skip
        if packed:
            assert isinstance(step.epilogue, Quantize)
            results.append(printer.unpacked(step.epilogue))
        else:
            target = place(step.out)
            printer.store(step.epilogue, target.pointer, target.stride)
        for into, lines in zip((once, columns, row), printer.lines, strict=True):
            into += lines
    lines = [*once, *columns]

    def of_row(r: int, statements: Sequence[str]) -> Iterator[str]:
        yield "{"
        yield from (
            f"  {line}".replace("SUM", f"c{r}").replace("[ROW]", f"[{r}]") for line in statements
        )
        yield "}"

    if not packed:
        return [*lines, *(line for r in range(rows) for line in of_row(r, row))]
    assert isinstance(step.epilogue, Quantize)
    assert isinstance(step.epilogue.zero_point, Const)
    zero = pointers.params.whole(int(step.epilogue.zero_point.value))
    kind = "u8" if step.epilogue.dtype == "UINT8" else "s8"
    to = places[0](step.out).pointer
    if not joined:
        four = ", ".join((results * 2)[:4])
        row.append(f"vi_join_{kind}({to}, {four}, {vectors}, {zero});")
        return [*lines, *(line for r in range(rows) for line in of_row(r, row))]
    live = (vectors - 1) * isa.lanes + ragged if ragged else vectors * isa.lanes
    together = 4 // vectors
    for first in range(0, rows, together):
        part = range(first, min(first + together, rows))
        lines += ["{", "vi y0, y1, y2, y3;"]
        for r in part:
            at = (r - first) * vectors
            lines += of_row(r, [*row, *(f"y{at + j} = {made};" for j, made in enumerate(results))])
        lines += [f"y{k} = y0;" for k in range(len(part) * vectors, 4)]
        lines.append(f"const vi bytes = vi_joined_{kind}(y0, y1, y2, y3, {zero});")
        for r in part:
            lines.append(f"vi_row_to({to}, bytes, {r - first}, {live});".replace("[ROW]", f"[{r}]"))
        lines.append("}")
    return lines
