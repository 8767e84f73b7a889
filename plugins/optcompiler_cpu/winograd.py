"""3×3 convolutions of floats by Winograd's F(4×4, 3×3): a quarter of the products of a direct sum.

A block of output tiles (4×4 pixels each) is worked on at a time: every 6×6 piece of the input is
transformed into scratch as `[36][tiles][C]`, 36 products with the transformed weights `[C, OC]`
give `[36][tiles][columns]` for one panel of columns after another, and these are transformed back,
four by four pixels, into the rows that the epilogue takes. All of it stays in the second-level
cache.
"""

from __future__ import annotations

import numpy as np

from optcompiler.lowering.build import view_array
from optcompiler.lowering.extents import is_run_time, largest, values
from optcompiler.lowering.ir import Conv, product
from optcompiler_cpu.code import KernelCode, Pointers, coordinates, indent, linear
from optcompiler_cpu.contraction import (
    KINDS,
    column_blocks,
    conv_shape,
    pack,
    print_epilogue,
    tile_name,
)
from optcompiler_cpu.heights import height_for
from optcompiler_cpu.isa import Isa
from optcompiler_cpu.loops import HEADER

POINTS = np.array([0, 0.75, -0.75, 1.5, -1.5])
"""The finite points; the sixth is infinity. The header `winograd.h` holds the other transforms."""

TILE_BYTES = 36 * 4
"""Bytes that one input channel of one tile takes when transformed."""

CACHE_BYTES = 384 * 1024
"""What the transformed input of a block of tiles may take of the second-level cache."""

OVERHEAD = 420
"""Cycles to transform 6×6 pixels of one vector of channels in and as many out."""

PRODUCTS = 1.4
"""How much longer a multiply-accumulate takes here than in the direct kernel: short sums, and
products that pass through memory."""

STREAM_BYTES = 16
"""Bytes of weights that come from beyond the second-level cache in one cycle."""

MANY_BLOCKS = 16
"""Every piece transforms the input of its blocks; with fewer blocks than this a thread has one."""

WORTH = 0.85
"""Winograd is taken where its estimate is below this share of the direct kernel's."""


def weight_transform() -> np.ndarray:
    """G, [6, 3]: `transformed = G @ kernel @ G.T`."""
    rows = [POINTS[j] ** np.arange(3) / np.prod(np.delete(POINTS[j] - POINTS, j)) for j in range(5)]
    return np.array([*rows, [0, 0, 1]])


def tile_counts(step: Conv) -> tuple[int, int, int]:
    n, _, oh, ow = step.out.shape
    return n, -(-oh // 4), -(-ow // 4)


def block_of_tiles(step: Conv, isa: Isa) -> int:
    """How many tiles are worked on at a time: whole register tiles, evenly many in each block."""
    tiles = largest(product(tile_counts(step)))
    height = isa.floats.heights[column_blocks(step.out.shape[1], isa, isa.floats)[0][1]]
    most = max(CACHE_BYTES // (TILE_BYTES * step.b.view.shape[1]) // height, 1) * height
    even = -(-tiles // -(-tiles // most))
    return min(-(-even // height) * height, tiles)


def multiplications(step: Conv) -> int:
    """Multiply-accumulates of the transformed convolution."""
    oc, c = step.b.view.shape[:2]
    return 36 * product(tile_counts(step)) * oc * c


def can_be_winograd(step: Conv, isa: Isa) -> bool:
    """Whether the step can be computed so."""
    _, c, kh, kw = step.b.view.shape
    return (
        step.a.quantization is None
        and (kh, kw) == (3, 3)
        and step.strides == (1, 1)
        and step.dilations == (1, 1)
        and step.groups == 1
        and c % isa.lanes == 0
        and step.a.view.strides[1] in (0, 1)
        and step.a.view.dtype == step.b.view.dtype == "FLOAT"
    )


def is_winograd(step: Conv, isa: Isa) -> bool:
    """Whether the step can be computed so, and is estimated to be faster."""
    return can_be_winograd(step, isa) and _pays(step, isa, largest(product(tile_counts(step))))


def least_tiles(step: Conv, isa: Isa) -> int:
    """From how many tiles on such a step is faster so, where it is for the most there can be; 0
    where it always is, as for a number that is known."""
    _, down, across = tile_counts(step)
    tiles = product(tile_counts(step))
    every = values(tiles)
    if every is None or is_run_time(down) or is_run_time(across):
        return 0
    direct = [n for n in every if not _pays(step, isa, n)]
    return max(direct) + 1 if direct else 0


def _pays(step: Conv, isa: Isa, tiles: int) -> bool:
    """Whether so many tiles are estimated to take less time than a direct sum."""
    oc, c = step.b.view.shape[:2]
    _, down, across = map(largest, tile_counts(step))
    _, _, oh, ow = map(largest, step.out.shape)
    direct = tiles // (down * across) * oc * oh * ow * 9 * c / (2 * isa.lanes)
    return cycles(step, isa, tiles) < WORTH * direct


def cycles(step: Conv, isa: Isa, tiles: int) -> float:
    """An estimate of what so many tiles take."""
    oc, c = step.b.view.shape[:2]
    blocks = -(-tiles // block_of_tiles(step, isa))
    products = PRODUCTS * 36 * tiles * oc * c / (2 * isa.lanes)
    transforms = tiles * (c + oc) / isa.lanes * OVERHEAD / 2
    streaming = blocks * 36 * c * oc * 4 / STREAM_BYTES
    return max(products, streaming) + transforms


def _weights(step: Conv, blocks: list[tuple[int, int]], isa: Isa) -> np.ndarray:
    """[column block][36][C][width]."""
    g = weight_transform()
    kernel = view_array(step.b.view).astype(np.float64)
    moved = np.einsum("iy,ocyx,jx->ijco", g, kernel, g, optimize=True)
    points = moved.reshape(36, *moved.shape[2:]).astype(np.float32)
    parts = [
        pack(points[p][:, n : n + vectors * isa.lanes], [(0, vectors)], isa, KINDS["f32"])
        for n, vectors in blocks
        for p in range(36)
    ]
    return np.concatenate(parts)


def _block_sizes(total: int, block: int) -> set[int]:
    """How many of `total` tiles a block of at most `block` has, whatever `total` is at run time."""
    every = values(total)
    if every is None:
        return set(range(1, block + 1))
    return {size for n in every for size in (min(n, block), (n - 1) % block + 1)}


def print_winograd(step: Conv, isa: Isa) -> KernelCode:
    shape = conv_shape(step)
    _, c, height, width = step.a.view.shape
    _, oc, oh, ow = step.out.shape
    images, down, across = tile_counts(step)
    total, block = images * down * across, block_of_tiles(step, isa)
    groups = -(-total // block)
    columns = column_blocks(oc, isa, isa.floats)
    pointers = Pointers()
    a = pointers.view(step.a.view)
    pointers.data("w", _weights(step, columns, isa), "float")
    bias = np.zeros(columns[-1][0] + isa.floats.widest * isa.lanes, np.float32)
    if step.bias is not None:
        bias[:oc] = step.bias
    pointers.data("init", bias, "float")
    pointers.data("zeros", np.zeros(isa.floats.widest * isa.lanes, np.float32), "float")
    epilogue, args = print_epilogue(step, shape, pointers, isa)
    tiles: set[tuple[str, int, int]] = set()
    table: list[str] = []
    at = 0
    for n, vectors in columns:
        rows = height_for(block, vectors, isa.floats)
        tiles |= {
            ("f32", vectors, r)
            for size in _block_sizes(total, block)
            for r in (min(rows, size), (size - 1) % rows + 1)
        }
        stop = min(oc, n + vectors * isa.lanes)
        table.append(f"{{{n}, {stop}, {vectors}, {rows}, 0, {n}, 0, {at}}}")
        at += 36 * c * vectors * isa.lanes
    sn, _, sh, sw = step.a.view.strides
    offsets = "".join(f", r{i}" for i, _ in enumerate(args))
    widest = max(v for _, v in columns) * isa.lanes
    body = [
        f"static const struct oc_block blocks[] = {{{', '.join(table)}}};",
        "float *const v = (float *)scratch;",
        f"float *const products = v + {36 * block * c};",
        f"const int first = (int)((long)part * {groups * len(columns)} / parts);",
        f"const int last = (int)((long)(part + 1) * {groups * len(columns)} / parts);",
        "int ready = -1;",
        "for (int unit = first; unit < last; ++unit) {",
        f"  const int group = unit / {len(columns)}, from = group * {block};",
        f"  const int tiles = from + {block} <= {total} ? {block} : {total} - from;",
        f"  const struct oc_block k = blocks[unit % {len(columns)}];",
        "  const int width = k.vectors * VL;",
        f"  if (group != ready) @_input(from, tiles, {a}, v);",
        "  ready = group;",
        "  for (int q6 = 0; q6 < 36; ++q6)",
        "    for (int t = 0; t < tiles; t += k.rows) {",
        "      const int rows = t + k.rows <= tiles ? k.rows : tiles - t;",
        f"      const float *at[{max(r for _, _, r in tiles)}];",
        "      for (int r = 0; r < rows; ++r)",
        f"        at[r] = v + ((long)q6 * tiles + t + r) * {c};",
        "      float *const to = products + ((long)q6 * tiles + t) * width;",
        f"      const float *const panel = w + k.w + (long)q6 * {c} * width;",
        "      switch (k.vectors * 32 + rows) {",
        *(
            f"        case {v * 32 + r}: {tile_name('f32', v, r)}(at, 1, 0, 1, 0, {c}, panel, "
            f"zeros, to); break;"
            for _, v, r in sorted(tiles)
        ),
        "      }",
        "    }",
        "  for (int t = 0; t < tiles; ++t) {",
        "    const long tile = from + t;",
        *(f"    {x}" for x in coordinates("tile", (images, down, across), ["i0", "ty", "tx"])),
        f"    const int high = ty * 4 + 4 <= {oh} ? 4 : (int)({oh} - ty * 4);",
        f"    const int wide = tx * 4 + 4 <= {ow} ? 4 : (int)({ow} - tx * 4);",
        f"    float acc[16 * {widest}] __attribute__((aligned(64)));",
        *(f"    long r{i}[16];" for i, _ in enumerate(args)),
        "    for (int j = 0; j < width; j += VL) {",
        "      vf m[36], y[24];",
        "      for (int q6 = 0; q6 < 36; ++q6)",
        "        m[q6] = vf_load(products + ((long)q6 * tiles + t) * width + j);",
        "      const vf bias = vf_load(init + k.n + j);",
        "      for (int x = 0; x < 6; ++x) winograd_output(m + x, 6, y + x, 6);",
        "      for (int r = 0; r < high; ++r) {",
        "        vf out[4];",
        "        winograd_output(y + r * 6, 1, out, 1);",
        "        for (int x = 0; x < wide; ++x)",
        "          vf_store(acc + (long)(r * wide + x) * width + j, vf_add(out[x], bias));",
        "      }",
        "    }",
        "    for (int r = 0; r < high * wide; ++r) {",
        "      const long i1 = ty * 4 + r / wide, i2 = tx * 4 + r % wide;",
        "      (void)i1;",
        "      (void)i2;",
        *(f"      r{i}[r] = {text};" for i, text in enumerate(args)),
        "    }",
        f"    @_store(high * wide, k.n, k.stop, width, acc, q{offsets});",
        "  }",
        "}",
    ]
    body = [*pointers.declarations(body), *body]
    pixel = linear(["i0", "y", "x"], (sn, sh, sw), step.a.view.offset)
    reading = [
        "for (int t = 0; t < tiles; ++t) {",
        "  const long tile = from + t;",
        *(f"  {x}" for x in coordinates("tile", (images, down, across), ["i0", "ty", "tx"])),
        "  const float *at[36];",
        "  for (int p = 0; p < 36; ++p) {",
        "    const long y = ty * 4 + p / 6, x = tx * 4 + p % 6;",
        f"    at[p] = y < {height} && x < {width} ? a + {pixel} : 0;",
        "  }",
        f"  for (int c = 0; c < {c}; c += VL) {{",
        "    vf d[36];",
        "    for (int p = 0; p < 36; ++p) d[p] = at[p] ? vf_load(at[p] + c) : vf_set(0);",
        "    for (int x = 0; x < 6; ++x) winograd_input(d + x, 6);",
        "    for (int y = 0; y < 6; ++y) winograd_input(d + y * 6, 1);",
        f"    for (int p = 0; p < 36; ++p) vf_store(v + ((long)p * tiles + t) * {c} + c, d[p]);",
        "  }",
        "}",
    ]
    text = (
        f"static void @_input(int from, int tiles, const float *a, float *v) {{\n"
        f"{indent(reading)}\n}}\n\n{epilogue}\n{HEADER} {{\n{indent(body)}\n}}\n"
    )
    scratch = 36 * block * (c + widest) * 4
    pieces = KernelCode.pieces if largest(groups) >= MANY_BLOCKS else 1
    return KernelCode(
        text, pointers.finish(), pieces=pieces, scratch_bytes=scratch, tiles=frozenset(tiles)
    )
