"""Matrix products of two computed operands: each panel of the second is packed before its tiles.

The work is divided by rows, in slices that whole tiles of every panel fill, so that what a thread
computes the softmax between two products finds in the same thread's cache. A part packs every panel
that it needs, so with as many matrices as parts each goes to one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optcompiler.lowering.ir import MatMul, product
from optcompiler_cpu.code import KernelCode, Pointers, coordinates, indent, linear
from optcompiler_cpu.contraction import (
    KINDS,
    column_blocks,
    matmul_shape,
    print_epilogue,
    scales,
    tile_call,
    tile_rows,
)
from optcompiler_cpu.isa import Isa, Tiling
from optcompiler_cpu.loops import HEADER

SLICE_ROWS = 48
"""Rows of a slice, which the usual heights of tiles divide."""


@dataclass(frozen=True)
class Product:
    """Functions for one panel `k` of `@_blocks`, [`units`] matrices of `rows` rows.

    `@_pack(k, unit, q, panels)` packs it to its place in `panels`, `@_rows(k, unit, low, high, q,
    panels)` computes rows `low` to `high`, of which `low` begins a slice. `code` holds all of them,
    and as scratch the room for panels.
    """

    code: KernelCode
    units: int
    rows: int
    blocks: int


def print_dynamic(step: MatMul, isa: Isa) -> KernelCode:
    """`[*batch, M, K] @ [*batch, K, N]`; integers where `step.b` is symmetric around its middle."""
    of = product_of(step, isa)
    body = over_slices(
        of.units,
        of.rows,
        [
            f"for (int b = 0; b < {of.blocks}; ++b) {{",
            "  @_pack(@_blocks[b], unit, q, scratch);",
            "  @_rows(@_blocks[b], unit, low, high, q, scratch);",
            "}",
        ],
    )
    of.code.text += f"{HEADER} {{\n{indent(body)}\n}}\n"
    return of.code


def over_slices(units: int, rows: int, body: list[str]) -> list[str]:
    """`body` for the rows `low` to `high` of each matrix `unit` that this part has some of."""
    slices = -(-rows // SLICE_ROWS)
    total = units * slices
    return [
        f"const int whole = {units} >= parts ? {slices} : 1;",
        f"const int first = (int)((long)part * {total} / whole / parts) * whole;",
        f"const int last = (int)((long)(part + 1) * {total} / whole / parts) * whole;",
        "for (int t = first, next; t < last; t = next) {",
        f"  const int unit = t / {slices};",
        f"  next = (unit + 1) * {slices} < last ? (unit + 1) * {slices} : last;",
        f"  const int low = t % {slices} * {SLICE_ROWS}, end = low + (next - t) * {SLICE_ROWS};",
        f"  const int high = end < {rows} ? end : {rows};",
        *(f"  {line}" for line in body),
        "}",
    ]


def _height(rows: int, vectors: int, tiling: Tiling) -> int:
    """The tile height that divides `rows`, or the slices they make, most evenly."""
    if rows <= SLICE_ROWS:
        return tile_rows(rows, vectors, tiling)
    most = tiling.heights[vectors]
    return next(h for h in range(most, 0, -1) if SLICE_ROWS % h == 0)


def product_of(step: MatMul, isa: Isa, *, together: bool = False) -> Product:
    """The functions of a product; `together` each panel has a place of its own in `panels`."""
    shape = matmul_shape(step)
    integer = shape.integer
    tiling = isa.integers[-1] if integer else isa.tiling(shape.dtype, 0)
    kind = KINDS[tiling.kind]
    pointers = Pointers()
    a = pointers.view(shape.a)
    *batch, m = shape.dims
    columns = column_blocks(shape.n, isa, tiling)
    heights = [_height(m, v, tiling) for _, v in columns]
    ends = {m % SLICE_ROWS, min(m, SLICE_ROWS)} - {0}
    tiles = {
        (tiling.kind, v, min(h, rows - i))
        for (_, v), h in zip(columns, heights, strict=True)
        for rows in ends
        for i in range(0, rows, h)
    }
    padded = columns[-1][0] + columns[-1][1] * isa.lanes
    room = padded if together else max(v for _, v in columns) * isa.lanes
    init = np.zeros(padded, np.int32 if integer else np.float32)
    if step.bias is not None:
        init[: shape.n] = step.bias
    pointers.data("init", init, kind.total)
    if integer:
        pointers.data("scale", scales(step, isa), "float")
    b = pointers.view(step.b.view)
    *b_batch, sk, sn = step.b.view.strides
    epilogue, args = print_epilogue(step, shape, pointers, isa)
    names = [f"u{d}" for d in range(len(batch))]
    place = coordinates("unit", batch, names)
    source = f"{b} + {linear(names, b_batch, step.b.view.offset)} + k.n * {sn}L"
    sizes = f"{shape.length}, k.stop - k.n, k.vectors * VL, {sk}, {sn}"
    depth = -(-shape.length // kind.step) * kind.step
    panel = f"{kind.weight} *const panel = ({kind.weight} *)(void *)panels"
    if integer:
        assert step.a.quantization is not None
        turn = 128 if step.b.view.dtype == "UINT8" else 0
        zero = int(step.a.quantization.zero_point)
        start = "int32_t *const start = (int32_t *)(void *)panels + k.init;"
        panel += f" + {4 * room} + k.w;"
        packing = (
            f"pack_i8((int32_t *)(void *)panel, start, init + k.n, {source}, {sizes}, {turn}, "
            f"{zero});"
        )
        memory, first_sums = [start, panel], "start"
    else:
        memory, first_sums = [f"{panel} + k.w;"], "init + k.n"
        packing = f"pack_{tiling.kind}(panel, {source}, {sizes});"
    table = ", ".join(
        f"{{{n}, {min(shape.n, n + v * isa.lanes)}, {v}, {h}, 0, "
        + (f"{n}, 0, {n * depth}}}" if together else "0, 0, 0}")
        for (n, v), h in zip(columns, heights, strict=True)
    )
    packs = [*memory, "(void)unit;", *place, packing]
    rows = [
        *memory,
        "for (int inside = low; inside < high; inside += k.rows) {",
        "  const int rows = inside + k.rows <= high ? k.rows : high - inside;",
        f"  const long m = unit * {m} + inside;",
        *(f"  {x}" for x in tile_call(shape, a, "panel", first_sums, tiles, args, tiling)),
        "}",
    ]
    packs, rows = ([*pointers.declarations(x), *x] for x in (packs, rows))
    text = (
        f"{epilogue}\n"
        f"static const struct oc_block @_blocks[] = {{{table}}};\n\n"
        "static void @_pack(struct oc_block k, long unit, char *const *q, char *panels) {\n"
        f"{indent(packs)}\n}}\n\n"
        "static void @_rows(struct oc_block k, long unit, int low, int high, char *const *q, "
        f"char *panels) {{\n{indent(rows)}\n}}\n\n"
    )
    scratch = room * (depth * kind.dtype.itemsize + (4 if integer else 0))
    code = KernelCode(text, pointers.finish(), scratch_bytes=scratch, tiles=frozenset(tiles))
    return Product(code, product(tuple(batch)), m, len(columns))
