"""Matrix products of two computed operands: each panel of the second is packed before its tiles.

The work is divided by rows, in slices that whole tiles of every panel fill, so that what a thread
computes the softmax between two products finds in the same thread's cache. A part packs every panel
that it needs, so with as many matrices as parts each goes to one.
"""

from __future__ import annotations

import math

import numpy as np

from optcompiler.lowering.ir import MatMul, product
from optcompiler_cpu.code import KernelCode, Pointers, coordinates, indent, linear
from optcompiler_cpu.contraction import (
    KINDS,
    Block,
    column_blocks,
    matmul_shape,
    print_epilogue,
    scales,
    tile_call,
    tile_rows,
)
from optcompiler_cpu.isa import Isa
from optcompiler_cpu.loops import HEADER


def print_dynamic(step: MatMul, isa: Isa) -> KernelCode:
    """`[*batch, M, K] @ [*batch, K, N]`; integers where `step.b` is symmetric around its middle."""
    shape = matmul_shape(step)
    integer = shape.integer
    tiling = isa.integers[-1] if integer else isa.tiling(shape.dtype, 0)
    kind = KINDS[tiling.kind]
    pointers = Pointers()
    a = pointers.view(shape.a)
    *batch, m = shape.dims
    units = product(tuple(batch))
    columns = column_blocks(shape.n, isa, tiling)
    height = {v: tile_rows(m, v, tiling) for _, v in columns}
    blocks = [
        Block(n, min(shape.n, n + v * isa.lanes), v, height[v], -(-m // height[v]), 0, 0)
        for n, v in columns
    ]
    widest = tiling.widest * isa.lanes
    room = widest if step.bias is None else columns[-1][0] + widest
    init = np.zeros(room, np.int32 if integer else np.float32)
    if step.bias is not None:
        init[: shape.n] = step.bias
    pointers.data("init", init, kind.total)
    if integer:
        pointers.data("scale", scales(step, isa), "float")
    b = pointers.view(step.b.view)
    *b_batch, sk, sn = step.b.view.strides
    tiles = {
        (tiling.kind, c.vectors, r) for c in blocks for r in (c.rows, m - (c.tiles - 1) * c.rows)
    }
    epilogue, args = print_epilogue(step, shape, pointers, isa)
    table = ", ".join(
        f"{{{c.n}, {c.stop}, {c.vectors}, {c.rows}, {c.tiles}, "
        f"{c.n if step.bias is not None else 0}, 0, 0}}"
        for c in blocks
    )
    names = [f"u{d}" for d in range(len(batch))]
    source = f"{b} + {linear(names, b_batch, step.b.view.offset)} + k.n * {sn}L"
    place = f"{shape.length}, k.stop - k.n, k.vectors * VL, {sk}, {sn}"
    steps = -(-shape.length // kind.step)
    if integer:
        assert step.a.quantization is not None
        turn = 128 if step.b.view.dtype == "UINT8" else 0
        zero = int(step.a.quantization.zero_point)
        scratch = (steps + 1) * widest * 4
        memory = [
            "int32_t *const start = (int32_t *)scratch;",
            f"int32_t *const panel = start + {widest};",
        ]
        packing = f"pack_i8(panel, start, init + k.init, {source}, {place}, {turn}, {zero});"
        weights, first_sums = "(const int8_t *)panel", "start"
    else:
        scratch = steps * kind.step * widest * kind.dtype.itemsize
        memory = [f"{kind.weight} *const panel = ({kind.weight} *)scratch;"]
        packing = f"pack_{tiling.kind}(panel, {source}, {place});"
        weights, first_sums = "panel", "init + k.init"
    slice_rows = math.lcm(*(c.rows for c in blocks))
    slices = -(-m // slice_rows)
    body = [
        f"static const struct oc_block blocks[] = {{{table}}};",
        *memory,
        f"const int whole = {units} >= parts ? {slices} : 1;",
        f"const int first = (int)((long)part * {units * slices} / whole / parts) * whole;",
        f"const int last = (int)((long)(part + 1) * {units * slices} / whole / parts) * whole;",
        "for (int t = first, next; t < last; t = next) {",
        f"  const long unit = t / {slices};",
        f"  next = (int)(unit + 1) * {slices} < last ? (int)(unit + 1) * {slices} : last;",
        f"  const int low = t % {slices} * {slice_rows}, end = low + (next - t) * {slice_rows};",
        f"  const int high = end < {m} ? end : {m};",
        *(f"  {line}" for line in coordinates("unit", batch, names)),
        f"  for (int b = 0; b < {len(blocks)}; ++b) {{",
        "    const struct oc_block k = blocks[b];",
        f"    {packing}",
        "    for (int inside = low; inside < high; inside += k.rows) {",
        "      const int rows = inside + k.rows <= high ? k.rows : high - inside;",
        f"      const long m = unit * {m} + inside;",
        *(f"      {x}" for x in tile_call(shape, a, weights, first_sums, tiles, args, tiling)),
        "    }",
        "  }",
        "}",
    ]
    body = [*pointers.declarations(body), *body]
    text = f"{epilogue}\n{HEADER} {{\n{indent(body)}\n}}\n"
    return KernelCode(text, pointers.finish(), scratch_bytes=scratch, tiles=frozenset(tiles))
