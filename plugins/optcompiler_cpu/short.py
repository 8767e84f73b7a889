"""Contractions over a short K: the epilogue takes the sums from registers.

Where a sum is short, handing it over through memory costs as much as making it. These tiles are
printed with their epilogue, each for one kernel alone; rows of bytes are stored vectors at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    tile_name,
    tile_sums,
)
from optcompiler_cpu.expressions import Place, VectorPrinter, is_packed
from optcompiler_cpu.isa import Isa

MOST_STEPS = 64
"""Steps of K (four integers, two bfloat16, or one float) up to which a sum is short."""

MOST_EXPRESSIONS = 16
"""Sub-expressions of an epilogue that is printed for every vector of a tile."""


def can_be_short(step: Conv | MatMul, isa: Isa) -> bool:
    """Whether tiles of the step can store their sums themselves: they have whole vectors."""
    if isinstance(step, MatMul) and not prepared(step):
        return False
    shape = conv_shape(step) if isinstance(step, Conv) else matmul_shape(step)
    return (
        isa.tiling(shape.dtype, product(shape.dims)).kind != AMX
        and shape.n % isa.lanes == 0
        and sum(1 for _ in walk(step.epilogue)) <= MOST_EXPRESSIONS
    )


def is_short(step: Conv | MatMul, isa: Isa) -> bool:
    """Whether the step is a contraction over a short K, of whole vectors of columns."""
    if not can_be_short(step, isa):
        return False
    shape = conv_shape(step) if isinstance(step, Conv) else matmul_shape(step)
    tiling = isa.tiling(shape.dtype, product(shape.dims))
    return shape.outer * shape.inner * -(-shape.length // tiling.step) <= MOST_STEPS


def print_short(step: Conv | MatMul, isa: Isa) -> KernelCode:
    return print_contraction(step, isa, print_whole_tiles)


def print_whole_tiles(
    step: Conv | MatMul, shape: Shape, pointers: Pointers, tiles: Tiles
) -> tuple[str, list[str]]:
    """Functions `@_tile_…`, and the row offsets they want, in C terms of the row's coordinates."""
    args: list[str] = []
    pointers.view(step.out, written=True)
    places = [
        row_placer(step, shape, pointers, args, f"(n + {v} * VL)", "ROW")
        for v in range(max(vectors for _, vectors, _ in tiles))
    ]
    endings = {tile: _ending(step, shape, pointers, tile, places) for tile in sorted(tiles)}
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
) -> list[str]:
    """Statements that store what `tile_sums` has summed."""
    _, vectors, rows = tile
    target = places[0](step.out)
    packed = is_packed(step.epilogue) and target.stride == 1 and vectors > 1
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
            pointers.params, place, spelled, factor=factor, prefix=f"t{j}_",
            largest=largest_sum(step),
        )  # fmt: skip
        if packed:
            assert isinstance(step.epilogue, Quantize)
            results.append(printer.unpacked(step.epilogue))
        else:
            target = place(step.out)
            printer.store(step.epilogue, target.pointer, target.stride)
        for into, lines in zip((once, columns, row), printer.lines, strict=True):
            into += lines
    if packed:
        assert isinstance(step.epilogue, Quantize)
        assert isinstance(step.epilogue.zero_point, Const)
        verb = "vi_join_u8" if step.epilogue.dtype == "UINT8" else "vi_join_s8"
        four = ", ".join((results * 2)[:4])
        zero = pointers.params.whole(int(step.epilogue.zero_point.value))
        row.append(f"{verb}({target.pointer}, {four}, {vectors}, {zero});")
    lines = [*once, *columns]
    for r in range(rows):
        lines.append("{")
        lines += (f"  {line}".replace("SUM", f"c{r}").replace("[ROW]", f"[{r}]") for line in row)
        lines.append("}")
    return lines
