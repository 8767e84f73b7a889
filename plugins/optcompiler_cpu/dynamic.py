"""Matrix products of two computed operands: each panel of the second is packed before its tiles."""

from __future__ import annotations

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
    total = units * len(blocks)
    body = [
        f"static const struct oc_block blocks[] = {{{table}}};",
        *memory,
        f"const int first = (int)((long)part * {total} / parts);",
        f"const int last = (int)((long)(part + 1) * {total} / parts);",
        "for (int t = first; t < last; ++t) {",
        f"  const long unit = t / {len(blocks)};",
        f"  const struct oc_block k = blocks[t % {len(blocks)}];",
        *(f"  {line}" for line in coordinates("unit", batch, names)),
        f"  {packing}",
        "  for (int i = 0; i < k.tiles; ++i) {",
        "    const int inside = i * k.rows;",
        f"    const int rows = inside + k.rows <= {m} ? k.rows : {m} - inside;",
        f"    const long m = unit * {m} + inside;",
        *(f"    {line}" for line in tile_call(shape, a, weights, first_sums, tiles, args, tiling)),
        "  }",
        "}",
    ]
    body = [*pointers.declarations(body), *body]
    text = f"{epilogue}\n{HEADER} {{\n{indent(body)}\n}}\n"
    return KernelCode(text, pointers.finish(), scratch_bytes=scratch, tiles=frozenset(tiles))
