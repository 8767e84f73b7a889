"""Tiles of AMX: integer products in registers of 16 rows by 64 bytes.

A tile of the kind `amx` has two by two accumulators of 16 x 16: up to 32 rows of `a`, in halves
that need not be full, by up to two vectors of columns. Weights are packed as for VNNI,
`[K / 4][columns][4]`, which is what TDPBUSD wants of its second operand. A half of the rows is
loaded straight from the activations where its rows lie evenly apart; elsewhere, at the ends of a
picture's lines, they are gathered first. (Intel 64 and IA-32 Architectures SDM, volume 1, chapter
18.)
"""

from __future__ import annotations

from optcompiler_cpu.code import indent

AMX = "amx"

FULL = 16
"""Rows of a register."""

BEGIN_AND_END = 12
"""What a tile costs beside its products, in rows."""

GATHERED = 0.7
"""What gathering a row costs, in rows of products."""


def halves(rows: int) -> tuple[int, int]:
    """Rows of the first and the second pair of accumulators."""
    return (rows, 0) if rows <= FULL else (-(-rows // 2), rows // 2)


def amx_rows(rows: int, line: int, tallest: int) -> int:
    """The tile height that costs least for `rows` rows, of which every `line` lie evenly apart."""

    def cost(height: int) -> tuple[float, int]:
        total = 0.0
        for start in range(0, rows, height):
            total += height + BEGIN_AND_END
            at = start
            for half in halves(height):
                last = at + half - 1
                if half and (last >= rows or at // line != last // line):
                    total += GATHERED * half
                at += half
        return total, -height

    return min(range(1, min(rows, tallest) + 1), key=cost)


def print_amx_tile(vectors: int, rows: int) -> str:
    """`tile_amx_{rows}x{vectors}`: `length` counts 64 elements of K; `count` of the rows are there.

    `acc` is `[rows][vectors * 16]`. Reads up to 63 bytes past a row, times weights of zero.
    """
    parts = [h for h in halves(rows) if h]
    cells = [(i, j) for i in range(len(parts)) for j in range(vectors)]
    starts = [sum(parts[:i]) for i in range(len(parts))]
    lines = [f"uint8_t gathered[{rows * 64}] __attribute__((aligned(64)));"]
    lines += [f"long pitch[{len(parts)}];", f"const uint8_t *from[{len(parts)}];", "int even = 1;"]
    for i, (start, half) in enumerate(zip(starts, parts, strict=True)):
        lines += [
            f"pitch[{i}] = amx_pitch(at + {start}, {half}, count - {start});",
            f"from[{i}] = at[count > {start} ? {start} : 0];",
            f"even &= pitch[{i}] >= 0;",
        ]
    lines += [f"_tile_loadd({2 * i + j}, init + {j * FULL}, 0);" for i, j in cells]
    weights = [f"_tile_loadd({6 + j}, w + {64 * j}, {64 * vectors});" for j in range(vectors)]
    products = [f"_tile_dpbusd({2 * i + j}, {4 + i}, {6 + j});" for i, j in cells]
    straight = [f"_tile_loadd({4 + i}, from[{i}] + k, pitch[{i}]);" for i in range(len(parts))]
    copied: list[str] = []
    for i, (start, half) in enumerate(zip(starts, parts, strict=True)):
        copied += [
            f"if (pitch[{i}] < 0) {{",
            f"  amx_gather(gathered + {64 * start}, at + {start}, {half}, count - {start}, k);",
            f"  _tile_loadd({4 + i}, gathered + {64 * start}, 64);",
            f"}} else _tile_loadd({4 + i}, from[{i}] + k, pitch[{i}]);",
        ]
    for test, loads in (("if (even) {", straight), ("} else {", copied)):
        lines += [
            test,
            "  for (long y = 0; y < outer; ++y)",
            "    for (long x = 0; x < inner; ++x) {",
            "      const long start = y * outer_stride + x * inner_stride;",
            "      for (long k = start; k < start + length * 64; k += 64) {",
            *(f"        {line}" for line in (*loads, *weights, *products)),
            f"        w += {vectors * 1024};",
            "      }",
            "    }",
        ]
    lines += ["}"]
    lines += [
        f"_tile_stored({2 * i + j}, acc + {starts[i] * vectors * FULL + j * FULL}, {64 * vectors});"
        for i, j in cells
    ]
    lines.append('__asm__ volatile("" ::: "memory");')
    signature = (
        f"tile_amx_{rows}x{vectors}(const uint8_t *const *at, int count, long outer, "
        f"long outer_stride, long inner, long inner_stride, long length, const int8_t *w, "
        f"const int32_t *init, int32_t *acc)"
    )
    return f"TILE void {signature} {{\n{indent(lines)}\n}}\n"
