"""Matrix products and convolutions: packed weights, register tiles, epilogues.

A contraction is rows of `a` against a packed panel of `b`. A row is a run of memory, or for a
convolution one run per line of the kernel (implicit GEMM over channels-last images). A tile keeps
`rows x vectors` accumulators in registers over the whole of K, starting from bias and zero-point
terms; its epilogue reads them from a small buffer on the stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from dataclasses import dataclass, replace

import numpy as np
from ml_dtypes import bfloat16

from optcompiler.lowering.build import view_array
from optcompiler.lowering.extents import c_long, largest
from optcompiler.lowering.ir import Conv, MatMul, View, loads, product
from optcompiler_cpu.amx import AMX, amx_rows, print_amx_tile
from optcompiler_cpu.code import KernelCode, Pointers, coordinates, indent, linear
from optcompiler_cpu.expressions import Place, VectorPrinter
from optcompiler_cpu.heights import (
    height_for,
    heights_for,
    rows_left,
    tile_count,
    total_tiles,
    with_tiles,
)
from optcompiler_cpu.isa import Isa, Tiling
from optcompiler_cpu.loops import HEADER


@dataclass(frozen=True)
class Kind:
    """A kind of register tile: C types of an activation, a weight and a sum, the prefix of vectors
    of sums, how many elements of K lie side by side in a panel, and the type weights have there.

    The length of a `ragged` tile's runs counts elements and not steps: what is left over is
    multiplied without reading on, since not every bit pattern times zero is zero. A tile takes
    `turn` off each activation that it reads.
    """

    item: str
    weight: str
    total: str
    vector: str
    step: int
    dtype: np.dtype
    ragged: bool = False
    turn: int = 0


KINDS = {
    "f32": Kind("float", "float", "float", "vf", 1, np.dtype(np.float32)),
    "bf16": Kind("uint16_t", "uint16_t", "float", "vf", 2, np.dtype(bfloat16), ragged=True),
    "u8": Kind("uint8_t", "int8_t", "int32_t", "vi", 4, np.dtype(np.int8)),
    "s8": Kind("uint8_t", "int8_t", "int32_t", "vi", 4, np.dtype(np.int8), turn=128),
    AMX: Kind("uint8_t", "int8_t", "int32_t", "vi", 4, np.dtype(np.int8)),
}


@dataclass(frozen=True)
class Block:
    """Columns [`n`, `n + vectors * lanes`) of one panel; `a` and `w` are element offsets."""

    n: int
    stop: int
    vectors: int
    rows: int
    tiles: int
    a: int
    w: int


@dataclass(frozen=True)
class Shape:
    """A contraction as the kernel sees it.

    Row `m` splits into coordinates of `dims`; `a_strides` gives its address. K is `outer` x `inner`
    runs of `length` elements, `outer_stride` and `inner_stride` apart. `dtype` is their type.
    """

    dims: tuple[int, ...]
    a: View
    a_strides: tuple[int, ...]
    outer: int
    outer_stride: int
    inner: int
    inner_stride: int
    length: int
    n: int
    groups: int
    group_stride: int
    dtype: str
    groups_of_rows: tuple[tuple[int, ...], ...] = ()

    @property
    def integer(self) -> bool:
        return self.dtype in {"UINT8", "INT8"}

    def merged(self, strides: tuple[int, ...]) -> tuple[int, ...]:
        """Strides along the joined row coordinates; see `merge_rows`."""
        if not self.groups_of_rows:
            return strides
        return tuple(strides[g[-1]] for g in self.groups_of_rows)


def column_blocks(n: int, isa: Isa, tiling: Tiling) -> list[tuple[int, int]]:
    """(first column, vectors) of panels of even width that cover `n` columns."""
    vectors = -(-n // isa.lanes)
    count = -(-vectors // tiling.widest)
    blocks: list[tuple[int, int]] = []
    start = 0
    for i in range(count):
        width = vectors // count + (1 if i < vectors % count else 0)
        blocks.append((start * isa.lanes, width))
        start += width
    return blocks


def pack(matrix: np.ndarray, blocks: list[tuple[int, int]], isa: Isa, kind: Kind) -> np.ndarray:
    """[K, N] as panels `[K / step][width][step]`; zeros fill up."""
    k, n = matrix.shape
    step = kind.step
    parts: list[np.ndarray] = []
    for start, vectors in blocks:
        width = vectors * isa.lanes
        panel = np.zeros((k, width), kind.dtype)
        stop = min(n, start + width)
        panel[:, : stop - start] = matrix[:, start:stop]
        parts.append(panel.reshape(k // step, step, width).swapaxes(1, 2).reshape(-1))
    return np.concatenate(parts)


def conv_shape(step: Conv) -> Shape:
    """A convolution whose input already has its halo (`pads` zero)."""
    n, c, _, _ = step.a.view.shape
    _, oc, oh, ow = step.out.shape
    _, group, kh, kw = step.b.view.shape
    sn, sc, sh, sw = step.a.view.strides
    merged = step.groups == 1 and step.dilations[1] == 1 and (sw == c or kw == 1)
    return Shape(
        dims=(n, oh, ow),
        a=step.a.view,
        a_strides=(sn, sh * step.strides[0], sw * step.strides[1]),
        outer=kh,
        outer_stride=sh * step.dilations[0],
        inner=1 if merged else kw,
        inner_stride=0 if merged else sw * step.dilations[1],
        length=kw * group if merged else group,
        n=oc // step.groups,
        groups=step.groups,
        group_stride=group * (sc or 1),
        dtype=step.a.view.dtype,
    )


def conv_matrix(step: Conv, shape: Shape, multiple: int) -> list[np.ndarray]:
    """Weights of each group as [outer * inner * padded length, N]."""
    weights = view_array(step.b.view)
    result: list[np.ndarray] = []
    for g in range(step.groups):
        part = weights[g * shape.n : (g + 1) * shape.n].transpose(2, 3, 1, 0)
        result.append(
            _padded(part.reshape(shape.outer * shape.inner, shape.length, shape.n), multiple)
        )
    return result


def _padded(runs: np.ndarray, multiple: int) -> np.ndarray:
    runs = np.pad(runs, ((0, 0), (0, -runs.shape[1] % multiple), (0, 0)))
    return runs.reshape(-1, runs.shape[-1])


def matmul_shape(step: MatMul) -> Shape:
    k = step.a.view.shape[-1]
    return Shape(
        dims=step.out.shape[:-1],
        a=step.a.view,
        a_strides=step.a.view.strides[:-1],
        outer=1, outer_stride=0, inner=1, inner_stride=0,
        length=k,
        n=step.out.shape[-1],
        groups=1,
        group_stride=0,
        dtype=step.a.view.dtype,
    )  # fmt: skip


def prepared(step: MatMul) -> bool:
    """Whether the second operand is one constant matrix, packed ahead of time."""
    view = step.b.view
    still = all(s == 0 or n == 1 for n, s in zip(view.shape[:-2], view.strides[:-2], strict=True))
    return view.buffer.array is not None and still


Tiles = Set[tuple[str, int, int]]
"""Kind, vectors and rows of each register tile."""

Ending = Callable[["Conv | MatMul", Shape, Pointers, Tiles], tuple[str, list[str]]]
"""Prints tiles that store their results themselves, and the row offsets these want."""


def print_contraction(step: Conv | MatMul, isa: Isa, ending: Ending | None = None) -> KernelCode:
    """Shared tiles, which leave sums to one function that stores them, or those of `ending`."""
    if isinstance(step, Conv):
        shape = conv_shape(step)
        tiling = isa.tiling(shape.dtype, product(shape.dims))
        matrices = conv_matrix(step, shape, tiling.step)
    else:
        shape = matmul_shape(step)
        tiling = isa.tiling(shape.dtype, product(shape.dims))
        array = view_array(step.b.view)
        matrix = array.reshape(-1, *array.shape[-2:])[0]
        matrices = [_padded(matrix[None], tiling.step)]
    shape = merge_rows(step, shape)
    pointers = Pointers()
    a = pointers.view(shape.a)
    rows = product(shape.dims)
    blocks, panels, starts = _panels(matrices, shape, rows, isa, tiling)
    kind = KINDS[tiling.kind]
    pointers.data("w", panels, kind.weight)
    pointers.data("init", _initial(step, matrices, blocks, isa, kind), kind.total)
    if shape.integer:
        pointers.data("scale", scales(step, isa), "float")
    total, counting = total_tiles([b.tiles for b in blocks], rows)
    table = ", ".join(
        f"{{{b.n}, {b.stop}, {b.vectors}, {b.rows}, {b.tiles}, {i}, {b.a}, {b.w}}}"
        for b, i in zip(blocks, starts, strict=True)
    )
    amx = tiling.kind == AMX
    tiles = {
        (tiling.kind, b.vectors, r)
        for b in blocks
        for r in ((b.rows,) if amx else heights_for(rows, b.rows))
    }
    if ending is None:
        epilogue, args = print_epilogue(step, shape, pointers, isa)
    else:
        epilogue, args = ending(step, shape, pointers, tiles)
    body = [
        f"static const struct oc_block blocks[] = {{{table}}};",
        "(void)scratch;",
        *([f"amx_begin({blocks[0].rows});"] if amx else []),
        *counting,
        "int t = 0;",
        f"const int first = (int)((long)part * {total} / parts);",
        f"const int last = (int)((long)(part + 1) * {total} / parts);",
        f"for (int b = 0; b < {len(blocks)}; ++b) {{",
        f"  const struct oc_block k = {with_tiles('blocks[b]', rows)};",
        "  for (int i = 0; i < k.tiles; ++i, ++t) {",
        "    if (t < first || t >= last) continue;",
        f"    const int m = i * k.rows, rows = {rows_left('m', rows)};",
        *(
            f"    {line}"
            for line in tile_call(
                shape, a, "k.w + w", "init + k.init", tiles, args, tiling, whole=ending is not None
            )
        ),
        "  }",
        "}",
        *(["amx_end();"] if amx else []),
    ]
    body = [*pointers.declarations(body), *body]
    text = f"{epilogue}\n{HEADER} {{\n{indent(body)}\n}}\n"
    return KernelCode(
        text, pointers.finish(), tiles=frozenset() if ending is not None else frozenset(tiles)
    )


def tile_call(
    shape: Shape, a: str, w: str, init: str, tiles: Tiles, args: list[str], tiling: Tiling,
    whole: bool = False,
) -> list[str]:  # fmt: skip
    """Row addresses, the tile by its size, and the epilogue. `m`, `rows` and `k` are in scope.

    A `whole` tile stores its results itself.
    """
    kind = KINDS[tiling.kind]
    tallest = max(r for _, _, r in tiles)
    room = max(v * r for _, v, r in tiles)
    names = [f"i{d}" for d in range(len(shape.dims))]
    length = shape.length if kind.ragged else -(-shape.length // tiling.step)
    offsets = "".join(f", r{i}" for i, _ in enumerate(args))
    numbers = f"{shape.outer}, {shape.outer_stride}, {shape.inner}, {shape.inner_stride}, {length}"
    room_for_sums = f"{kind.total} acc[{room} * VL] __attribute__((aligned(64)));"
    if whole:
        cases = _tile_by_size(tiles, f"{numbers}, {w}, {init}, k.n, q{offsets}", tiling, "@_")
    else:
        cases = [
            *_tile_by_size(tiles, f"{numbers}, {w}, {init}, acc", tiling),
            f"@_store(rows, k.n, k.stop, k.vectors * VL, acc, q{offsets});",
        ]
    return [
        f"const {kind.item} *at[{tallest}];",
        *(f"long r{i}[{tallest}];" for i, _ in enumerate(args)),
        *([] if whole else [room_for_sums]),
        "for (int r = 0; r < rows; ++r) {",
        "  const long row = m + r;",
        *(f"  {line}" for line in coordinates("row", shape.dims, names)),
        f"  at[r] = {a} + {linear(names, shape.a_strides, shape.a.offset)} + k.a;",
        *(f"  r{i}[r] = {text};" for i, text in enumerate(args)),
        "}",
        *cases,
    ]


def _tile_by_size(tiles: Tiles, numbers: str, tiling: Tiling, prefix: str = "") -> list[str]:
    if tiling.kind == AMX:  # one height, whose tile is told how many rows there are
        of, name = "k.vectors", "case {v}: {tile}(at, rows, {numbers}); break;"
    else:
        of, name = "k.vectors * 32 + rows", "case {size}: {tile}(at, {numbers}); break;"
    cases = (
        name.format(v=v, size=v * 32 + r, tile=prefix + tile_name(kind, v, r), numbers=numbers)
        for kind, v, r in sorted(tiles)
    )
    return [f"switch ({of}) {{", *(f"  {case}" for case in cases), "}"]


def _panels(
    matrices: list[np.ndarray], shape: Shape, rows: int, isa: Isa, tiling: Tiling
) -> tuple[list[Block], np.ndarray, list[int]]:
    blocks: list[Block] = []
    starts: list[int] = []
    packed: list[np.ndarray] = []
    at = column = 0
    for group, matrix in enumerate(matrices):
        columns = column_blocks(shape.n, isa, tiling)
        packed.append(pack(matrix, columns, isa, KINDS[tiling.kind]))
        for n, vectors in columns:
            if tiling.kind == AMX:
                line = largest(shape.dims[-1])
                height = amx_rows(largest(rows), line, tiling.heights[vectors])
            else:
                height = height_for(rows, vectors, tiling)
            width = vectors * isa.lanes
            first = group * shape.n + n
            stop = group * shape.n + min(shape.n, n + width)
            blocks.append(
                Block(
                    first,
                    stop,
                    vectors,
                    height,
                    tile_count(rows, height),
                    group * shape.group_stride,
                    at,
                )
            )
            starts.append(column)
            at += matrix.shape[0] * width
            column += width
    return blocks, np.concatenate(packed), starts


def _initial(
    step: Conv | MatMul, matrices: list[np.ndarray], blocks: list[Block], isa: Isa, kind: Kind
) -> np.ndarray:
    """Where the accumulators start, per packed column: bias, less zero point times column sum."""
    integer = step.a.quantization is not None
    per_group = len(blocks) // len(matrices)
    parts: list[np.ndarray] = []
    for i, block in enumerate(blocks):
        part = np.zeros(block.vectors * isa.lanes, np.int64 if integer else np.float32)
        width = block.stop - block.n
        if step.bias is not None:
            part[:width] = step.bias[block.n : block.stop]
        if step.a.quantization is not None:
            matrix = matrices[i // per_group]
            start = blocks[i - i % per_group].n
            sums = matrix.astype(np.int64).sum(axis=0)[block.n - start : block.stop - start]
            part[:width] -= (int(step.a.quantization.zero_point) - kind.turn) * sums
        parts.append(part)
    return np.concatenate(parts).astype(np.int32 if integer else np.float32)


def scales(step: Conv | MatMul, isa: Isa) -> np.ndarray:
    assert step.a.quantization is not None
    assert step.b.quantization is not None
    count = step.out.shape[1] if isinstance(step, Conv) else step.out.shape[-1]
    scale = np.zeros(largest(count) + isa.lanes, np.float32)
    scale[: largest(count)] = step.a.quantization.scale * step.b.quantization.scale
    return scale


def largest_sum(step: Conv | MatMul) -> float:
    """A bound of what a sum times its scale may be, infinite for sums that are not of integers."""
    a, b = step.a.quantization, step.b.quantization
    return math.inf if a is None or b is None else float(2.0**31 * (a.scale * b.scale).max())


def row_strides(step: Conv | MatMul, view: View) -> tuple[tuple[int, ...], int]:
    """Strides of a view of the output space along its rows' coordinates, and its columns'."""
    if isinstance(step, Conv):
        return (view.strides[0], view.strides[2], view.strides[3]), view.strides[1]
    return view.strides[:-1], view.strides[-1]


def merge_rows(step: Conv | MatMul, shape: Shape) -> Shape:
    """The shape with coordinates joined where every address moves evenly across them."""
    every = [shape.a_strides]
    for view in (step.out, *(load.view for load in loads(step.epilogue))):
        every.append(row_strides(step, view)[0])
    groups: list[list[int]] = []
    for d, size in enumerate(shape.dims):
        if size == 1:
            continue
        if groups and all(s[groups[-1][-1]] == s[d] * size for s in every):
            groups[-1].append(d)
        else:
            groups.append([d])
    joined = replace(shape, groups_of_rows=tuple(map(tuple, groups)) or ((0,),))
    dims = tuple(product(tuple(shape.dims[d] for d in g)) for g in joined.groups_of_rows)
    return replace(joined, dims=dims, a_strides=joined.merged(shape.a_strides))


def row_placer(
    step: Conv | MatMul, shape: Shape, pointers: Pointers, args: list[str], column: str, row: str
) -> Callable[[View], Place]:
    """Places loads and stores of an epilogue, by C terms of the column and of the row in its tile.

    The offsets that rows of a tile have are added to `args`, in terms of the row's coordinates.
    """
    names = [f"i{d}" for d in range(len(shape.dims))]

    def place(view: View) -> Place:
        strides, lane = row_strides(step, view)
        strides = shape.merged(strides)
        base = pointers.view(view)
        moving = any(s and n > 1 for s, n in zip(strides, shape.dims, strict=True))
        across = f" + {column}" if lane == 1 else f" + (long){column} * {lane}" if lane else ""
        if not moving:
            return Place(f"{base} + {c_long(view.offset)}{across}", lane, 1 if lane else 0)
        text = linear(names, strides, view.offset)
        if text not in args:
            args.append(text)
        return Place(f"{base} + r{args.index(text)}[{row}]{across}", lane, 2)

    return place


def print_epilogue(
    step: Conv | MatMul, shape: Shape, pointers: Pointers, isa: Isa
) -> tuple[str, list[str]]:
    """The function that stores a tile, and the row offsets it wants, in C terms of the row."""
    args: list[str] = []
    place = row_placer(step, shape, pointers, args, "j", "r")
    pointers.view(step.out, written=True)
    acc = "acc + (long)r * width + (j - n)"
    integer = shape.integer
    raw = f"vi_float(vi_load({acc}))"
    spelled = f"vf_mul({raw}, scales)" if integer else f"vf_load({acc})"
    factor = (raw, "scales") if integer else None
    pieces: list[str] = []
    columns = step.out.shape[1] if isinstance(step, Conv) else step.out.shape[-1]
    ragged = any((b % isa.lanes) for b in (columns, shape.n))
    for count in (None, "left") if ragged else (None,):
        printer = VectorPrinter(pointers.params, place, spelled, count, factor)
        target = place(step.out)
        printer.store(step.epilogue, target.pointer, target.stride)
        once, column, row = printer.lines
        if integer:
            column.insert(0, "const vf scales = vf_load(scale + j);")
        pieces += once if count is None else []
        fresh = [line for line in once if line not in pieces]
        head = "for (; j + VL <= stop; j += VL) {" if count is None else "if (j < stop) {"
        lines = [*fresh, *column, "for (int r = 0; r < rows; ++r) {", *(f"  {x}" for x in row), "}"]
        if count is not None:
            lines.insert(0, "const int left = stop - j;")
        pieces += [head, *(f"  {x}" for x in lines), "}"]
    ctype = "int32_t" if integer else "float"
    parameters = ", ".join(
        ["int rows", "int n", "int stop", "int width", f"const {ctype} *acc", "char *const *q",
         *(f"const long *r{i}" for i, _ in enumerate(args))]
    )  # fmt: skip
    body = [*pointers.declarations(pieces), "(void)width;", "int j = n;", *pieces]
    return f"static void @_store({parameters}) {{\n{indent(body)}\n}}\n", args


def print_tile(kind: str, vectors: int, rows: int) -> str:
    """A register tile: `rows x vectors` named accumulators over all of K."""
    if kind == AMX:
        return print_amx_tile(vectors, rows)
    of = KINDS[kind]
    lines = [
        *tile_sums(kind, vectors, rows),
        *(
            f"{of.vector}_store(acc + {r * vectors + j} * VL, c{r}_{j});"
            for r in range(rows)
            for j in range(vectors)
        ),
    ]
    signature = (
        f"{tile_name(kind, vectors, rows)}(const {of.item} *const *at, long outer, "
        f"long outer_stride, long inner, long inner_stride, long length, const {of.weight} *w, "
        f"const {of.total} *init, {of.total} *acc)"
    )
    return f"TILE void {signature} {{\n{indent(lines)}\n}}\n"


def tile_sums(kind: str, vectors: int, rows: int) -> list[str]:
    """Statements that sum products over all of K into variables `c{row}_{vector}`."""
    of = KINDS[kind]
    step, v = of.step, of.vector
    cells = [(r, j) for r in range(rows) for j in range(vectors)]
    scale = f" * {step}" if step > 1 else ""
    load = (
        "vf_load(w + {})" if kind == "f32" else "vi_load((const int32_t *)(const void *)(w + {}))"
    )
    kept = "vf" if kind == "f32" else "vi"
    dot = {
        "f32": "vf_fma(x{r}, w{j}, c{r}_{j})", "u8": "vi_dot(c{r}_{j}, x{r}, w{j})",
        "bf16": "vb_dot(c{r}_{j}, x{r}, w{j})", "s8": "vi_sdot(c{r}_{j}, w{j}, x{r}, {lane})",
    }[kind]  # fmt: skip

    def products(broadcast: str, lane: int = 0) -> list[str]:
        lines = [f"const {kept} w{j} = {load.format(f'{j} * VL{scale}')};" for j in range(vectors)]
        for r in range(rows):
            lines += [broadcast.format(r=r)] if broadcast else []
            lines += [f"c{r}_{j} = {dot.format(r=r, j=j, lane=lane)};" for j in range(vectors)]
        return [*lines, f"w += {vectors} * VL{scale};"]

    whole = (
        "const vf x{r} = vf_set(a{r}[i]);"
        if step == 1
        else "const int32_t x{r} = load32(a{r} + i);"
    )
    lines = [f"const {of.item} *a{r} = at[{r}];" for r in range(rows)]
    lines += [f"{v} c{r}_{j} = {v}_load(init + {j} * VL);" for r, j in cells]
    if of.ragged:
        loop = [
            "long i = start;",
            f"for (; i + {step} <= start + length; i += {step}) {{",
            *(f"  {line}" for line in products(whole)),
            "}",
            "if (i < start + length) {",
            *(f"  {line}" for line in products("const int32_t x{r} = a{r}[i];")),
            "}",
        ]
    elif kind == "s8":
        loop = [
            "long i = start;",
            "for (; i + 16 <= start + length * 4; i += 16) {",
            *(f"  const int8x16_t x{r} = vi_turned(a{r} + i);" for r in range(rows)),
            *(f"  {line}" for q in range(4) for line in ("{", *products("", q), "}")),
            "}",
            "for (; i < start + length * 4; i += 4) {",
            *(f"  {line}" for line in products("const int8x16_t x{r} = vi_turned1(a{r} + i);")),
            "}",
        ]
    else:
        loop = [
            f"for (long i = start; i < start + length * {step}; i += {step}) {{",
            *(f"  {line}" for line in products(whole)),
            "}",
        ]
    return [
        *lines,
        "for (long y = 0; y < outer; ++y)",
        "  for (long x = 0; x < inner; ++x) {",
        "    const long start = y * outer_stride + x * inner_stride;",
        *(f"    {line}" for line in loop),
        "  }",
    ]


def tile_name(kind: str, vectors: int, rows: int) -> str:
    return f"tile_{kind}_{rows}x{vectors}"
