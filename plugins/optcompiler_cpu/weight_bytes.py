"""Contractions of bytes with weights in blocks, or of nibbles: integers in each block, then floats.

The integers of a block are summed exactly and scaled when the block is complete, with one rounding
for each product and sum, so every instruction set gives the same numbers. Nibbles become bytes in
registers, next to the products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from optcompiler.lowering.extents import values
from optcompiler.lowering.ir import Conv, MatMul, product
from optcompiler_cpu.code import KernelCode, Pointers, coordinates, indent, linear
from optcompiler_cpu.contraction import (
    Shape,
    column_blocks,
    conv_shape,
    matmul_shape,
    merge_rows,
    prepared,
    print_epilogue,
    scales,
)
from optcompiler_cpu.heights import height_for
from optcompiler_cpu.isa import Isa, Tiling
from optcompiler_cpu.loops import HEADER
from optcompiler_cpu.weights import (
    NIBBLES,
    Weights,
    add_parameters,
    packed,
    spread_columns,
    weights_of,
)

FEW_ROWS = 4
"""Rows up to which weights of one scale a column stay nibbles: with more, products take longer than
reading them."""

MANY_WEIGHTS = 1 << 20
"""Weights from which on they are read from beyond the second-level cache."""


def is_nibble_product(step: Conv | MatMul) -> bool:
    """Whether integers meet nibbles that have a scale for each column."""
    q = step.b.quantization
    return step.a.quantization is not None and q is not None and not q.block and (
        step.b.view.dtype in NIBBLES
    )  # fmt: skip


def stays_nibbles(step: Conv | MatMul) -> bool:
    """Whether such weights are better read as nibbles than as bytes."""
    if isinstance(step, MatMul) and not prepared(step):
        return False
    shape = conv_shape(step) if isinstance(step, Conv) else matmul_shape(step)
    one_run = shape.outer * shape.inner == 1 and shape.groups == 1
    rows = product(shape.dims)
    return one_run and rows <= FEW_ROWS and shape.length * shape.n >= MANY_WEIGHTS


@dataclass(frozen=True)
class Plan:
    """What the tiles of one kernel share. `scaled` blocks are floats between one another."""

    weights: Weights
    shape: Shape
    zero_point: int
    scale: float
    scaled: bool
    scale_type: str

    @property
    def nibbles(self) -> bool:
        return self.weights.form.levels > 1

    @property
    def depth(self) -> int:
        """Elements of K that a vector of weights holds."""
        return 8 if self.nibbles else 4

    @property
    def vectors(self) -> int:
        """Vectors of weights in a column of vectors."""
        w = self.weights
        whole, rest = divmod(w.depth, w.block)
        return whole * -(-w.block // self.depth) + -(-rest // self.depth)

    @property
    def blocks(self) -> int:
        return -(-self.weights.depth // self.weights.block)


def tile_width(height: int, isa: Isa) -> int:
    if isa.lanes == 16:
        return 4 if height <= 2 else 2
    return 2 if height <= 2 else 1


def print_weight_bytes(step: Conv | MatMul, isa: Isa) -> KernelCode:
    """A contraction of bytes with such weights."""
    shape = conv_shape(step) if isinstance(step, Conv) else matmul_shape(step)
    shape = merge_rows(step, shape)
    rows = product(shape.dims)
    weights = weights_of(step)
    quantization = step.a.quantization
    assert quantization is not None
    assert step.b.quantization is not None
    scaled = step.b.quantization.block > 0
    height = height_for(rows, 1, Tiling("bytes", {1: FEW_ROWS}))
    widest = tile_width(height, isa)
    columns = column_blocks(shape.n, isa, Tiling("bytes", {widest: height}))
    pointers = Pointers()
    a = pointers.view(shape.a)
    shifts = (0, 8, 16, 24, 4, 12, 20, 28) if weights.form.levels > 1 else (0, 8, 16, 24)
    pointers.data("w", packed(weights, columns, isa, shifts), "int32_t")
    zero_point = int(quantization.zero_point)
    if scaled:
        scale_type = add_parameters(weights, columns, pointers, isa)
        start = np.zeros((1, shape.n), np.float32)
    else:
        scale_type = "float"
        pointers.data("scale", scales(step, isa), "float")
        start = np.zeros((1, shape.n), np.int64)
        start -= zero_point * weights.levels.astype(np.int64).sum(axis=0)
    if step.bias is not None:
        start += step.bias
    kind = "float" if scaled else "int32_t"
    start = start.astype(np.float32 if scaled else np.int32)
    pointers.data("init", spread_columns(start, columns, isa), kind)
    plan = Plan(weights, shape, zero_point, float(quantization.scale), scaled, scale_type)
    epilogue, args = print_epilogue(
        step, replace(shape, dtype="FLOAT") if scaled else shape, pointers, isa
    )
    ends = {(n - 1) % height + 1 for n in values(rows) or range(1, height + 1)}
    tiles = sorted({(v, r) for _, v in columns for r in {height, *ends}})
    count = -(-rows // height)
    total = len(columns) * count
    names = [f"i{d}" for d in range(len(shape.dims))]
    offsets = "".join(f", r{i}" for i, _ in enumerate(args))
    passed = ["at", f"w + n * {plan.vectors}L"]
    if scaled:
        passed.append(f"scale + n * {plan.blocks}L")
        passed.append(f"zero + n * {plan.blocks}L" if weights.zero_point is not None else "0")
    call = "case {size}: @_tile_{r}x{v}({passed}, init + n, acc); break;"
    cases = [call.format(size=v * 32 + r, r=r, v=v, passed=", ".join(passed)) for v, r in tiles]
    starts = ", ".join(f"{{{n}, {v}}}" for n, v in columns)
    body = [
        f"static const int panels[][2] = {{{starts}}};",
        "(void)scratch;",
        f"const int first = (int)((long)part * {total} / parts);",
        f"const int last = (int)((long)(part + 1) * {total} / parts);",
        "for (int t = first; t < last; ++t) {",
        f"  const int m = t % {count} * {height}, left = {rows} - m;",
        f"  const int n = panels[t / {count}][0], vectors = panels[t / {count}][1];",
        f"  const int rows = left < {height} ? left : {height};",
        f"  const int stop = n + vectors * VL < {shape.n} ? n + vectors * VL : {shape.n};",
        f"  const uint8_t *at[{height}];",
        *(f"  long r{i}[{height}];" for i, _ in enumerate(args)),
        f"  {kind} acc[{height * widest} * VL] __attribute__((aligned(64)));",
        "  for (int r = 0; r < rows; ++r) {",
        "    const long row = m + r;",
        *(f"    {line}" for line in coordinates("row", shape.dims, names)),
        f"    at[r] = {a} + {linear(names, shape.a_strides, shape.a.offset)};",
        *(f"    r{i}[r] = {text};" for i, text in enumerate(args)),
        "  }",
        "  switch (vectors * 32 + rows) {",
        *(f"    {case}" for case in cases),
        "  }",
        f"  @_store(rows, n, stop, vectors * VL, acc, q{offsets});",
        "}",
    ]
    body = [*pointers.declarations(body), *body]
    functions = [_tile(plan, v, r) for v, r in tiles]
    text = "\n".join([epilogue, *functions, f"{HEADER} {{\n{indent(body)}\n}}\n"])
    return KernelCode(text, pointers.finish())


def _tile(plan: Plan, vectors: int, rows: int) -> str:
    """The function that sums `rows` rows against one panel of `vectors` vectors."""
    across, down = range(vectors), range(rows)
    cells = [(r, j) for r in down for j in across]
    shape, weights = plan.shape, plan.weights
    shifted = plan.scaled and weights.zero_point is not None
    less_zero = plan.scaled and plan.zero_point != 0

    def group(of: str, at: str, ones: str) -> list[str]:
        """Products of four elements of every row with bytes `of`."""
        lines: list[str] = []
        for r in down:
            lines.append(f"const int32_t x{r} = load32(a{r} + {at});")
            lines += [f"c{r}_{j} = vi_dot(c{r}_{j}, x{r}, {of}{j});" for j in across]
            lines += [f"s{r} = vi_dot(s{r}, x{r}, {ones});"] if shifted else []
        if less_zero:
            lines += [
                f"z{j} = vi_dot(z{j}, {plan.zero_point} * 0x01010101, {of}{j});" for j in across
            ]
        return ["{", *(f"  {line}" for line in lines), "}"]

    load = [f"const vi w{j} = vi_load(w + {j} * VL);" for j in across]
    step = f"w += {vectors} * VL;"
    all_four = "vi_set(0x01010101)"
    some = "vi_set(weights_ones(stop - {at}))"
    if plan.nibbles:
        low = [f"const vi l{j} = weights_bytes(w{j});" for j in across]
        high = [f"const vi h{j} = weights_bytes(vi_shr(w{j}, 4));" for j in across]
        whole = [
            *load,
            step,
            *low,
            *high,
            *group("l", "i", all_four),
            *group("h", "i + 4", all_four),
        ]
        rest = [
            *load, step, *low, *group("l", "i", some.format(at="i")),
            "if (i + 4 < stop) {",
            *(f"  {x}" for x in (*high, *group("h", "i + 4", some.format(at="i - 4")))),
            "}",
        ]  # fmt: skip
    else:
        whole = [*load, step, *group("w", "i", all_four)]
        rest = [*load, step, *group("w", "i", some.format(at="i"))]
    loop = [
        f"for (; i + {plan.depth} <= stop; i += {plan.depth}) {{", *(f"  {x}" for x in whole), "}",
        "if (i < stop) {", *(f"  {x}" for x in rest), "  i = stop;", "}",
    ]  # fmt: skip
    parameters = ["const uint8_t *const *at", "const int32_t *w"]
    lines = [f"const uint8_t *a{r} = at[{r}];" for r in down]
    if not plan.scaled:
        parameters += ["const int32_t *init", "int32_t *acc"]
        lines += [
            *(f"vi c{r}_{j} = vi_load(init + {j} * VL);" for r, j in cells),
            f"const long stop = {weights.depth};",
            "long i = 0;",
            *loop,
            *(f"vi_store(acc + {r * vectors + j} * VL, c{r}_{j});" for r, j in cells),
        ]
    else:
        parameters += [f"const {plan.scale_type} *scale", "const int8_t *zero"]
        parameters += ["const float *init", "float *acc"]
        verb = "vf_load" if plan.scale_type == "float" else "vh_load"
        spelled = "vi_float(vi_sub(c{r}_{j}, z{j}))" if less_zero else "vi_float(c{r}_{j})"
        if shifted:
            spelled = f"vf_sub({spelled}, vf_mul(zero{{j}}, sum{{r}}))"
        add = "t{r}_{j} = vf_add(t{r}_{j}, vf_mul(" + spelled + ", scale{j}));"
        zeros = f"vi_set((int32_t)(stop - begin) * {plan.zero_point})"
        block = [
            "const long begin = i, end = i + " + str(weights.block) + ";",
            f"const long stop = end < start + {shape.length} ? end : start + {shape.length};",
            *(f"vi c{r}_{j} = vi_set(0);" for r, j in cells),
            *(f"vi z{j} = vi_set(0);" for j in across if less_zero),
            *(f"vi s{r} = vi_set(0);" for r in down if shifted),
            "(void)begin;",
            *loop,
            *(f"const vf scale{j} = {verb}(scale + {j} * VL);" for j in across),
            *(f"const vf zero{j} = vi_float(vi_s8(zero + {j} * VL));" for j in across if shifted),
            *(f"const vf sum{r} = vi_float(vi_sub(s{r}, {zeros}));" for r in down if shifted),
            *(add.format(r=r, j=j) for r, j in cells),
            f"scale += {vectors} * VL;",
            *([f"zero += {vectors} * VL;"] if shifted else []),
        ]
        result = (
            f"vf_add(vf_mul(t{{r}}_{{j}}, vf_set({plan.scale.hex()}f)), vf_load(init + {{j}} * VL))"
        )
        lines += [
            *([] if shifted else ["(void)zero;"]),
            *(f"vf t{r}_{j} = vf_set(0.0f);" for r, j in cells),
            f"for (long y = 0; y < {shape.outer}; ++y)",
            f"  for (long x = 0; x < {shape.inner}; ++x) {{",
            f"    const long start = y * {shape.outer_stride} + x * {shape.inner_stride};",
            "    long i = start;",
            f"    while (i < start + {shape.length}) {{",
            *(f"      {line}" for line in block),
            "    }",
            "  }",
            *(
                f"vf_store(acc + {r * vectors + j} * VL, {result.format(r=r, j=j)});"
                for r, j in cells
            ),
        ]
    signature = f"@_tile_{rows}x{vectors}({', '.join(parameters)})"
    return f"static TILE void {signature} {{\n{indent(lines)}\n}}\n"
