"""Matrix products of two computed operands: each panel of the second is packed before its tiles.

The work is divided by rows, in slices that whole tiles of every panel fill, so that what a thread
computes the softmax between two products finds in the same thread's cache. A part packs every panel
that it needs, so with as many matrices as parts each goes to one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from optcompiler.lowering.extents import c_long, is_run_time, largest, values
from optcompiler.lowering.ir import MatMul, product
from optcompiler_cpu.code import (
    KernelCode,
    Pointers,
    coordinates,
    declared_sizes,
    indent,
    linear,
)
from optcompiler_cpu.contraction import (
    KINDS,
    column_blocks,
    matmul_shape,
    print_epilogue,
    scales,
    tile_call,
)
from optcompiler_cpu.heights import height_for
from optcompiler_cpu.isa import Isa, Tiling
from optcompiler_cpu.loops import HEADER

SLICE_ROWS = 48
"""Rows of a slice, which the usual heights of tiles divide."""


@dataclass(frozen=True)
class Product:
    """Functions for one panel `k` of columns, [`units`] matrices of `rows` rows.

    `@_pack(k, unit, q, panels)` packs it to its place in `panels`, `@_rows(k, unit, low, high, q,
    panels)` computes rows `low` to `high`, of which `low` begins a slice. `code` holds all of them,
    and as scratch the room for panels. There are `count` panels, panel `b` is `block`, both in C,
    of the pointers `Q`.
    """

    code: KernelCode
    units: int
    rows: int
    count: str
    block: str

    def each(self, call: str, q: str = "q") -> list[str]:
        """A loop over the panels that calls functions; `{k}` stands for the panel, `{q}` for the
        pointers."""
        count, block = self.count.replace("Q", q), self.block.replace("Q", q)
        return [f"for (int b = 0; b < {count}; ++b)", f"  {call.format(k=block, q=q)}"]


def print_dynamic(step: MatMul, isa: Isa) -> KernelCode:
    """`[*batch, M, K] @ [*batch, K, N]`; integers where `step.b` is symmetric around its middle."""
    of = product_of(step, isa)
    body = over_slices(
        of.units,
        of.rows,
        [
            f"for (int b = 0; b < {of.count.replace('Q', 'q')}; ++b) {{",
            f"  @_pack({of.block.replace('Q', 'q')}, unit, q, scratch);",
            f"  @_rows({of.block.replace('Q', 'q')}, unit, low, high, q, scratch);",
            "}",
        ],
    )
    body = [*declared_sizes(body, of.code.pointers), *body]
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
    if not is_run_time(rows) and rows <= SLICE_ROWS:
        return height_for(rows, vectors, tiling)
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
    columns = column_blocks(largest(shape.n), isa, tiling)
    each = values(shape.n) or range(1, tiling.widest * isa.lanes + 1)
    widths = {v for n in each for _, v in column_blocks(n, isa, tiling)}
    heights = {v: _height(m, v, tiling) for v in sorted(widths)}
    counts = values(m) or range(1, SLICE_ROWS + 1)
    ends = {end for n in counts for end in (n % SLICE_ROWS, min(n, SLICE_ROWS))} - {0}
    tiles = {
        (tiling.kind, v, min(h, rows - i))
        for v, h in heights.items()
        for rows in ends
        for i in range(0, rows, h)
    }
    padded = columns[-1][0] + columns[-1][1] * isa.lanes
    room = padded if together else max(widths) * isa.lanes
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
    source = f"{b} + {linear(names, b_batch, step.b.view.offset)} + k.n * {c_long(sn)}"
    sizes = f"{shape.length}, k.stop - k.n, k.vectors * VL, {sk}, {sn}"
    depth = -(-shape.length // kind.step) * kind.step
    panel = f"{kind.weight} *const panel = ({kind.weight} *)(void *)panels"
    if integer:
        assert step.a.quantization is not None
        turn = 128 if step.b.view.dtype == "UINT8" else 0
        zero = int(step.a.quantization.zero_point) - kind.turn
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
    if is_run_time(shape.n) or (together and is_run_time(depth)):
        count, block, blocks = _blocks_at_run_time(
            shape.n, depth if together else None, heights, tiling, isa, pointers
        )
    else:
        count, block = str(len(columns)), "@_blocks[b]"
        table = ", ".join(
            f"{{{n}, {min(shape.n, n + v * isa.lanes)}, {v}, {heights[v]}, 0, "
            + (f"{n}, 0, {n * depth}}}" if together else "0, 0, 0}")
            for n, v in columns
        )
        blocks = f"static const struct oc_block @_blocks[] = {{{table}}};\n"
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
        f"{blocks}\n"
        "static void @_pack(struct oc_block k, long unit, char *const *q, char *panels) {\n"
        f"{indent(packs)}\n}}\n\n"
        "static void @_rows(struct oc_block k, long unit, int low, int high, char *const *q, "
        f"char *panels) {{\n{indent(rows)}\n}}\n\n"
    )
    scratch = room * (largest(depth) * kind.dtype.itemsize + (4 if integer else 0))
    code = KernelCode(text, pointers.finish(), scratch_bytes=scratch, tiles=frozenset(tiles))
    return Product(code, product(tuple(batch)), m, count, block)


def _blocks_at_run_time(
    n: int, depth: int | None, heights: Mapping[int, int], tiling: Tiling, isa: Isa,
    pointers: Pointers,
) -> tuple[str, str, str]:  # fmt: skip
    """`Product.count` and `Product.block`, and the functions behind them; with `depth`, panels of
    so many elements a column have places of their own."""
    tallest = ", ".join(str(heights.get(v, 0)) for v in range(1, tiling.widest + 1))
    counting = [f"return {-(-n // (tiling.widest * isa.lanes))};"]
    placing = [
        f"static const int tallest[] = {{0, {tallest}}};",
        f"struct oc_block k = oc_panel(b, @_count(q), {n}, VL, tallest);",
        *([] if depth is None else ["k.init = k.n;", f"k.w = k.n * {c_long(depth)};"]),
        "return k;",
    ]
    counting, placing = ([*pointers.declarations(x), *x] for x in (counting, placing))
    text = (
        "static long @_count(char *const *q) {\n"
        f"{indent(['(void)q;', *counting])}\n}}\n\n"
        "static struct oc_block @_block(int b, char *const *q) {\n"
        f"{indent(placing)}\n}}\n"
    )
    return "@_count(Q)", "@_block(b, Q)", text
