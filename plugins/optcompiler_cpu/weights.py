"""Contractions whose weights are stored in few bits: nibbles or bytes with scales, or half floats.

Of few rows (a language model that generates) the weights are read once and multiplied once: time
goes with their bytes, so they become numbers in registers, next to the product. The sum over a
block of K is made of bare levels, and scaled when it is complete. Of many rows, a panel becomes
floats in scratch, and the tiles of float weights multiply it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from optcompiler.lowering.build import view_array
from optcompiler.lowering.extents import is_run_time, largest, values
from optcompiler.lowering.ir import Conv, MatMul, product
from optcompiler_cpu.choosing import from_on
from optcompiler_cpu.code import KernelCode, Pointers, coordinates, indent, linear
from optcompiler_cpu.contraction import (
    Block,
    Shape,
    column_blocks,
    conv_shape,
    matmul_shape,
    merge_rows,
    prepared,
    print_epilogue,
    tile_call,
)
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

NIBBLES = frozenset({"INT4", "UINT4"})
HALVES = frozenset({"FLOAT16", "BFLOAT16"})
SHARED_ROWS = 2
"""Rows up to which tiles of registers have the panels that tiles of floats have, so that a kernel
for any number of rows holds its weights once."""

STORED = NIBBLES | HALVES | {"INT8", "UINT8"}
"""Types of weights that are multiplied with floats as they are stored."""


@dataclass(frozen=True)
class Form:
    """How weights lie in a panel: the C type of what is loaded, the levels in it, and a name."""

    name: str
    ctype: str
    levels: int = 1


FORMS: Mapping[str, Form] = {
    "INT4": Form("q4", "int32_t", 8), "UINT4": Form("q4", "int32_t", 8),
    "INT8": Form("q8", "int8_t"), "UINT8": Form("q8", "int8_t"),
    "FLOAT16": Form("f16", "uint16_t"), "BFLOAT16": Form("bf16", "uint16_t"),
}  # fmt: skip


def is_compressed(step: Conv | MatMul) -> bool:
    """Whether the weights are other than what they are multiplied with."""
    if isinstance(step, MatMul) and not prepared(step):
        return False
    q = step.b.quantization
    if step.a.quantization is None:
        return q is not None or step.b.view.dtype != step.a.view.dtype
    return q is not None and q.block > 0


@dataclass(frozen=True)
class Weights:
    """A constant second operand as kernels read it.

    `levels` is [K, N], signed integers or bits of half floats. `scale` and `zero_point` are
    [blocks, N], of `block` elements of K; None for half floats, and for zero points of 0 alone.
    """

    form: Form
    levels: np.ndarray
    scale: np.ndarray | None
    zero_point: np.ndarray | None
    block: int

    @property
    def depth(self) -> int:
        return self.levels.shape[0]


def weights_of(step: Conv | MatMul) -> Weights:
    view = step.b.view
    array = view_array(view)
    if isinstance(step, Conv):
        matrix = array.transpose(2, 3, 1, 0).reshape(-1, view.shape[0])
    else:
        matrix = array[(0,) * (array.ndim - 2)]
    form, quantization = FORMS[view.dtype], step.b.quantization
    if quantization is None:
        return Weights(form, matrix.view(np.uint16), None, None, max(len(matrix), 1))
    middle = {"UINT4": 8, "UINT8": 128}.get(view.dtype, 0)
    levels = (matrix.astype(np.int16) - middle).astype(np.int8)
    shape = (quantization.scale.shape[0] if quantization.block else 1, matrix.shape[1])
    scale = np.broadcast_to(quantization.scale, shape)
    zero = np.broadcast_to(quantization.zero_point - middle, shape)
    block = quantization.block or max(len(matrix), 1)
    return Weights(form, levels, scale, zero if zero.any() else None, block)


def floats_of(step: Conv) -> np.ndarray:
    """Weights of a convolution, [OC, C, KH, KW], in float32."""
    q = step.b.quantization
    values = view_array(step.b.view).astype(np.float32)
    if q is None:
        return values
    out, channels, *taps = values.shape
    matrix = values.transpose(2, 3, 1, 0).reshape(-1, out)

    def rows(parameter: np.ndarray) -> np.ndarray:
        spread = np.repeat(parameter, q.block, 0) if q.block else parameter
        return spread[: len(matrix)] if q.block else spread

    matrix = (matrix - rows(q.zero_point)) * rows(q.scale)
    wide = matrix.reshape(*taps, channels, out).transpose(3, 2, 0, 1)
    return np.ascontiguousarray(wide, np.float32)


def packed(
    weights: Weights, columns: list[tuple[int, int]], isa: Isa, shifts: Sequence[int]
) -> np.ndarray:
    """Panels of levels, one after another: `[K][width]`, or `[K / n][width]` lanes of 32 bits with
    the level of place i, of n, moved up by `shifts[i]`. Blocks begin a new lane; zeros fill up.
    """
    levels, per = weights.levels, len(shifts)
    if per > 1:
        mask = 15 if weights.form.levels == 8 else 255
        whole = weights.depth // weights.block * weights.block
        parts = [levels[:whole].reshape(-1, weights.block, levels.shape[1]), levels[None, whole:]]
        fill = [((0, 0), (0, -part.shape[1] % per), (0, 0)) for part in parts]
        even = [
            np.pad(part, f).reshape(-1, part.shape[2]) for part, f in zip(parts, fill, strict=True)
        ]
        few = np.concatenate(even).astype(np.uint32).reshape(-1, per, levels.shape[1]) & mask
        levels = np.zeros(few.shape[::2], np.uint32)
        for place, shift in enumerate(shifts):
            levels |= few[:, place] << np.uint32(shift)
    return spread_columns(levels, columns, isa)


def spread_columns(matrix: np.ndarray, columns: list[tuple[int, int]], isa: Isa) -> np.ndarray:
    """[rows, N] as `[rows][width]` for each panel, with zeros after the last column."""
    parts: list[np.ndarray] = []
    for start, vectors in columns:
        part = matrix[:, start : start + vectors * isa.lanes]
        parts.append(np.pad(part, ((0, 0), (0, vectors * isa.lanes - part.shape[1]))).reshape(-1))
    return np.concatenate(parts)


def print_weights(step: Conv | MatMul, isa: Isa) -> KernelCode:
    """A contraction of floats with weights that are not."""
    shape = conv_shape(step) if isinstance(step, Conv) else matmul_shape(step)
    shape = merge_rows(step, shape)
    rows = product(shape.dims)
    one_run = shape.outer * shape.inner == 1
    if is_run_time(rows) and one_run and min(values(rows) or {1}) <= SHARED_ROWS:
        few = _print_few(step, shape, rows, isa)
        if largest(rows) <= SHARED_ROWS:
            return few
        return from_on(rows, SHARED_ROWS + 1, _print_many(step, shape, rows, isa), few)
    fits = not is_run_time(rows) and rows <= few_rows(isa)
    return (_print_few if fits and one_run else _print_many)(step, shape, rows, isa)


@dataclass(frozen=True)
class Panels:
    """Names of the pointers to weights, and how far their panels are apart, in C terms of `k`."""

    weights: Weights
    columns: list[tuple[int, int]]
    scale_type: str

    @property
    def scale_load(self) -> str:
        return "vf_load" if self.scale_type == "float" else "vh_load"

    @property
    def blocks(self) -> int:
        return -(-self.weights.depth // self.weights.block)

    @property
    def words(self) -> int:
        """Vectors of weights in a column."""
        w = self.weights
        whole, rest = divmod(w.depth, w.block)
        return whole * -(-w.block // w.form.levels) + -(-rest // w.form.levels)

    def arguments(self) -> str:
        """Where a panel's weights, scales and zero points begin: `k` is its block."""
        scale = f"scale + k.init * {self.blocks}L" if self.weights.scale is not None else ""
        zero = f"zero + k.init * {self.blocks}L" if self.weights.zero_point is not None else "0"
        return ", ".join([f"w + k.init * {self.words}L", *([scale, zero] if scale else [])])


def add_parameters(
    weights: Weights, columns: list[tuple[int, int]], pointers: Pointers, isa: Isa
) -> str:
    """Add pointers `scale` and `zero`, where there are such; the C type of the scales."""
    scale_type = "float"
    if weights.scale is not None:
        scale = np.ascontiguousarray(weights.scale, np.float32)
        half = scale.astype(np.float16)
        if (half.astype(np.float32) == scale).all():
            scale, scale_type = half, "uint16_t"
        pointers.data("scale", spread_columns(scale, columns, isa), scale_type)
    if weights.zero_point is not None:
        zero = weights.zero_point.astype(np.int8)
        pointers.data("zero", spread_columns(zero, columns, isa), "int8_t")
    return scale_type


def _panels(
    weights: Weights, columns: list[tuple[int, int]], pointers: Pointers, isa: Isa
) -> Panels:
    shifts = [4 * i for i in range(weights.form.levels)]
    pointers.data("w", packed(weights, columns, isa, shifts), weights.form.ctype)
    return Panels(weights, columns, add_parameters(weights, columns, pointers, isa))


def _table(
    columns: list[tuple[int, int]], n: int, rows: int, height: Mapping[int, int], isa: Isa
) -> list[Block]:
    return [
        Block(start, min(n, start + v * isa.lanes), v, height[v], tile_count(rows, height[v]), 0, 0)
        for start, v in columns
    ]


def _start(step: Conv | MatMul, columns: list[tuple[int, int]], isa: Isa) -> np.ndarray:
    start = np.zeros(sum(v for _, v in columns) * isa.lanes, np.float32)
    if step.bias is not None:
        start[: len(step.bias)] = step.bias
    return start


def _text(blocks: list[Block]) -> str:
    rows = ", ".join(
        f"{{{b.n}, {b.stop}, {b.vectors}, {b.rows}, {b.tiles}, {b.n}, 0, 0}}" for b in blocks
    )
    return f"static const struct oc_block blocks[] = {{{rows}}};"


def _print_many(step: Conv | MatMul, shape: Shape, rows: int, isa: Isa) -> KernelCode:
    """A panel of floats in scratch for each panel of weights, then the tiles of floats."""
    tiling = isa.floats
    weights = weights_of(step)
    columns = column_blocks(shape.n, isa, tiling)
    pointers = Pointers()
    a = pointers.view(shape.a)
    panels = _panels(weights, columns, pointers, isa)
    pointers.data("init", _start(step, columns, isa), "float")
    height = {v: height_for(rows, v, tiling) for _, v in columns}
    blocks = _table(columns, shape.n, rows, height, isa)
    tiles = {(tiling.kind, b.vectors, r) for b in blocks for r in heights_for(rows, b.rows)}
    epilogue, args = print_epilogue(step, shape, pointers, isa)
    total, counting = total_tiles([b.tiles for b in blocks], rows)
    if weights.scale is None:
        expand = (
            f"weights_expand_{weights.form.name}(panel, {panels.arguments()}, "
            f"{weights.depth}L * k.vectors * VL);"
        )
    else:
        kind = "f32" if panels.scale_type == "float" else "f16"
        expand = (
            f"weights_expand_{weights.form.name}_{kind}(panel, {panels.arguments()}, "
            f"{weights.depth}, {weights.block}, k.vectors * VL);"
        )
    body = [
        _text(blocks),
        "float *const panel = (float *)scratch;",
        *counting,
        "int t = 0;",
        f"const int first = (int)((long)part * {total} / parts);",
        f"const int last = (int)((long)(part + 1) * {total} / parts);",
        f"for (int b = 0; b < {len(blocks)}; ++b) {{",
        f"  const struct oc_block k = {with_tiles('blocks[b]', rows)};",
        "  if (t < last && t + k.tiles > first) {",
        f"    {expand}",
        "  }",
        "  for (int i = 0; i < k.tiles; ++i, ++t) {",
        "    if (t < first || t >= last) continue;",
        f"    const int m = i * k.rows, rows = {rows_left('m', rows)};",
        *(
            f"    {line}"
            for line in tile_call(shape, a, "panel", "init + k.init", tiles, args, tiling)
        ),
        "  }",
        "}",
    ]
    body = [*pointers.declarations(body), *body]
    text = f"{epilogue}\n{HEADER} {{\n{indent(body)}\n}}\n"
    scratch = weights.depth * max(v for _, v in columns) * isa.lanes * 4
    return KernelCode(text, pointers.finish(), scratch_bytes=scratch, tiles=frozenset(tiles))


def few_rows(isa: Isa) -> int:
    """Rows up to which weights become floats in registers rather than in scratch."""
    return 24 if isa.lanes == 16 else 4


def register_tile(rows: int, scaled: bool, isa: Isa) -> tuple[int, int]:
    """(rows, vectors) of a tile for so many rows. A sum that is scaled takes two registers."""
    if isa.lanes != 16:
        return rows, {1: 4, 2: isa.floats.widest, 3: 1, 4: 1}[rows]
    height = height_for(rows, 1, Tiling("registers", {1: 12}))
    return height, 4 if height <= 2 else 2 if height <= 4 or not scaled else 1


def _print_few(step: Conv | MatMul, shape: Shape, rows: int, isa: Isa) -> KernelCode:
    """Rows against one panel after another, whose weights become floats in registers."""
    weights = weights_of(step)
    most = SHARED_ROWS if is_run_time(rows) else rows
    height, widest = register_tile(most, weights.scale is not None, isa)
    columns = column_blocks(shape.n, isa, Tiling("registers", {widest: height}))
    pointers = Pointers()
    a = pointers.view(shape.a)
    panels = _panels(weights, columns, pointers, isa)
    pointers.data("init", _start(step, columns, isa), "float")
    blocks = _table(columns, shape.n, rows, {v: height for _, v in columns}, isa)
    epilogue, args = print_epilogue(step, shape, pointers, isa)
    ends = range(1, height + 1) if is_run_time(rows) else (height, (rows - 1) % height + 1)
    tiles = sorted({(v, r) for _, v in columns for r in ends})
    sums = weights.zero_point is not None
    depth = weights.depth
    names = [f"i{d}" for d in range(len(shape.dims))]
    offsets = "".join(f", r{i} + m" for i, _ in enumerate(args))
    passed = ["at + m", panels.arguments(), "init + k.init"]
    if sums:
        passed.append(f"sums + m * {panels.blocks}")
    call = "case {size}: @_tile_{r}x{v}({passed}, acc); break;"
    cases = [call.format(size=v * 32 + r, r=r, v=v, passed=", ".join(passed)) for v, r in tiles]
    body = [
        _text(blocks),
        "(void)scratch;",
        f"const float *at[{most}];",
        *(f"long r{i}[{most}];" for i, _ in enumerate(args)),
        f"for (int r = 0; r < {rows}; ++r) {{",
        "  const long row = r;",
        *(f"  {line}" for line in coordinates("row", shape.dims, names)),
        f"  at[r] = {a} + {linear(names, shape.a_strides, shape.a.offset)};",
        *(f"  r{i}[r] = {text};" for i, text in enumerate(args)),
        "}",
        *(
            ["float *const sums = (float *)scratch;", f"for (int r = 0; r < {rows}; ++r)",
             f"  weights_sums(sums + r * {panels.blocks}, at[r], {depth}, {weights.block});"]
            if sums else []
        ),
        f"const int first = (int)((long)part * {len(blocks)} / parts);",
        f"const int last = (int)((long)(part + 1) * {len(blocks)} / parts);",
        "for (int b = first; b < last; ++b) {",
        "  const struct oc_block k = blocks[b];",
        f"  for (int m = 0; m < {rows}; m += k.rows) {{",
        f"    const int rows = {rows_left('m', rows)};",
        f"    float acc[{height * widest} * VL] __attribute__((aligned(64)));",
        "    switch (k.vectors * 32 + rows) {",
        *(f"      {case}" for case in cases),
        "    }",
        f"    @_store(rows, k.n, k.stop, k.vectors * VL, acc, q{offsets});",
        "  }",
        "}",
    ]  # fmt: skip
    body = [*pointers.declarations(body), *body]
    functions = [_few_tile(panels, v, r) for v, r in tiles]
    text = "\n".join([epilogue, *functions, f"{HEADER} {{\n{indent(body)}\n}}\n"])
    scratch = most * panels.blocks * 4 if sums else 0
    return KernelCode(text, pointers.finish(), scratch_bytes=scratch)


def _few_tile(panels: Panels, vectors: int, rows: int) -> str:
    """The function that sums `rows` rows against one panel of `vectors` vectors."""
    weights, form = panels.weights, panels.weights.form
    cells = [(r, j) for r in range(rows) for j in range(vectors)]
    across, down = range(vectors), range(rows)
    scaled, shifted = weights.scale is not None, weights.zero_point is not None

    def products(levels: str, at: str) -> list[str]:
        lines = [f"const vf q{j} = {levels.format(j=j)};" for j in across]
        for r in down:
            lines.append(f"const vf x{r} = vf_set(a{r}[{at}]);")
            lines += [f"c{r}_{j} = vf_fma(x{r}, q{j}, c{r}_{j});" for j in across]
        return lines

    next_words = f"w += {vectors} * VL;"
    words = [f"vi w{j} = vi_load(w + {j} * VL);" for j in across]
    if form.levels > 1:
        loop = ["for (; i + 8 <= stop; i += 8) {", *(f"  {line}" for line in (*words, next_words))]
        for d in range(8):
            loop += [
                "  {",
                *(f"    {x}" for x in products(f"weights_nibble(w{{j}}, {d})", f"i + {d}")),
                "  }",
            ]
        loop.append("}")
        if weights.block % 8 or weights.depth % weights.block % 8:
            loop += [
                "if (i < stop) {",
                *(f"  {line}" for line in (*words, next_words)),
                "  for (; i < stop; ++i) {",
                *(f"    {x}" for x in products("weights_nibble(w{j}, 0)", "i")),
                *(f"    w{j} = vi_shr(w{j}, 4);" for j in across),
                "  }",
                "}",
            ]
    else:
        load = {
            "q8": "vi_float(vi_s8(w + {j} * VL))",
            "f16": "vh_load(w + {j} * VL)",
            "bf16": "vb_load(w + {j} * VL)",
        }
        loop = [
            "for (; i < stop; ++i) {",
            *(f"  {x}" for x in products(load[form.name], "i")),
            f"  {next_words}",
            "}",
        ]
    parameters = ["const float *const *at", f"const {form.ctype} *w"]
    lines = [f"const float *a{r} = at[{r}];" for r in down]
    if scaled:
        parameters += [f"const {panels.scale_type} *scale", "const int8_t *zero"]
        start = (
            "vf_mul(z{j}, vf_set(-sums[{r} * " + str(panels.blocks) + " + g]))"
            if shifted
            else "vf_set(0.0f)"
        )
        shift = (
            [f"const vf z{j} = vi_float(vi_s8(zero + {j} * VL));" for j in across]
            if shifted
            else []
        )
        lines += [
            *([] if shifted else ["(void)zero;"]),
            *(f"vf t{r}_{j} = vf_load(init + {j} * VL);" for r, j in cells),
            "long i = 0;",
            f"for (int g = 0; g < {panels.blocks}; ++g) {{",
            f"  const long end = (g + 1) * {weights.block}L;",
            f"  const long stop = end < {weights.depth} ? end : {weights.depth};",
            *(f"  {line}" for line in shift),
            *(f"  vf c{r}_{j} = {start.format(r=r, j=j)};" for r, j in cells),
            *(f"  {line}" for line in loop),
            *(f"  const vf s{j} = {panels.scale_load}(scale + {j} * VL);" for j in across),
            *(f"  t{r}_{j} = vf_fma(c{r}_{j}, s{j}, t{r}_{j});" for r, j in cells),
            f"  scale += {vectors} * VL;",
            *([f"  zero += {vectors} * VL;"] if shifted else []),
            "}",
        ]
    else:
        lines += [
            *(f"vf c{r}_{j} = vf_load(init + {j} * VL);" for r, j in cells),
            "long i = 0;",
            f"const long stop = {weights.depth};",
            *loop,
        ]
    kept = "t" if scaled else "c"
    lines += [f"vf_store(acc + {r * vectors + j} * VL, {kept}{r}_{j});" for r, j in cells]
    parameters += ["const float *init", *(["const float *sums"] if shifted else []), "float *acc"]
    signature = f"@_tile_{rows}x{vectors}({', '.join(parameters)})"
    return f"static TILE void {signature} {{\n{indent(lines)}\n}}\n"
