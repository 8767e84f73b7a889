"""How rows are divided among register tiles, now or, where their number is not known, at run time.

A block of the table says how many tiles of what height cover its rows. For rows that are counted at
run time it says the greatest height, and `oc_even` of `runtime/blocks.h` divides as `even_height`.
"""

from __future__ import annotations

from collections.abc import Sequence

from optcompiler.lowering.extents import is_run_time, values
from optcompiler_cpu.isa import Tiling


def even_height(rows: int, tallest: int) -> int:
    """The height of tiles, `tallest` at most, that divides `rows` most evenly."""
    return -(-rows // -(-rows // tallest))


def height_for(rows: int, vectors: int, tiling: Tiling) -> int:
    """The height of tiles for `rows`, or the greatest where their number is known at run time."""
    tallest = tiling.heights[vectors]
    return tallest if is_run_time(rows) else even_height(rows, tallest)


def tile_count(rows: int, height: int) -> int:
    """How many tiles of `height` cover `rows`; 0 where that is known at run time."""
    return 0 if is_run_time(rows) else -(-rows // height)


def heights_for(rows: int, height: int) -> set[int]:
    """The heights of all tiles of a block of `height`, whatever number `rows` is at run time."""
    every = values(rows)
    if every is None:
        return set(range(1, height + 1))
    return {r for n in every for h in [even_height(n, height)] for r in (h, (n - 1) % h + 1)}


def with_tiles(block: str, rows: int) -> str:
    """A block with its tiles, in C."""
    return f"oc_even({block}, {rows})" if is_run_time(rows) else block


def total_tiles(counts: Sequence[int], rows: int) -> tuple[str, list[str]]:
    """How many tiles `blocks` have, in C, and the statements before it."""
    if not is_run_time(rows):
        return str(sum(counts)), []
    each = with_tiles("blocks[b]", rows)
    return "total", [
        "int total = 0;",
        f"for (int b = 0; b < {len(counts)}; ++b) total += {each}.tiles;",
    ]


def rows_left(at: str, rows: int) -> str:
    """How many rows the tile of block `k` has that begins at row `at`, in C."""
    rest = f"(int)({rows} - {at})" if is_run_time(rows) else f"{rows} - {at}"
    return f"{at} + k.rows <= {rows} ? k.rows : {rest}"
