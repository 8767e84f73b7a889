"""`optcompiler bench`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optcompiler.cli.shell import common, write

if TYPE_CHECKING:
    from rich.console import RenderableType

    from optcompiler.plugins import Registry

_FEWEST_ROUNDS = 10


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="ARTIFACT",
    help="Time this artifact too, calls in turn, so that a drifting machine drifts for both.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Instead of those it was compiled for.")
@click.option("--seconds", type=click.FloatRange(0), default=3.0, show_default=True)
@click.option(
    "--size",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Of symbolic dimensions, or the nearest within their bounds.",
)
@common
def bench(
    artifact: Path, against: Path | None, threads: int | None, seconds: float, size: int,
    as_json: bool, registry: Callable[[], Registry],
) -> None:  # fmt: skip
    """Time an artifact on inputs made from its interface: median, p10 and p90 of one call."""
    from contextlib import ExitStack

    from optcompiler.compiled import load
    from optcompiler.synthesis import random_batch

    paths = [artifact] if against is None else [artifact, against]
    plugins = registry()
    with ExitStack() as stack:
        loaded = [stack.enter_context(load(p, threads=threads, registry=plugins)) for p in paths]
        inputs = [random_batch(c.inputs, dynamic=size, bounds=c.bounds) for c in loaded]
        runs = [partial(c.run, i) for c, i in zip(loaded, inputs, strict=True)]
        times = _interleaved(runs, seconds)
        rows: list[dict[str, Any]] = [
            {"artifact": str(p), "target": str(c.target), "threads": c.threads, **_percentiles(t)}
            for p, c, t in zip(paths, loaded, times, strict=True)
        ]
    data: dict[str, Any] = {"runs": rows}
    if len(rows) == 2:
        data["speedup"] = rows[1]["median_us"] / rows[0]["median_us"]
    write(data, lambda: _parts(data), as_json=as_json)


def _interleaved(runs: Sequence[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Microseconds of each call, after two calls of each that do not count."""
    for run in (*runs, *runs):
        run()
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while len(times[0]) < _FEWEST_ROUNDS or time.perf_counter() < end:
        for run, kept in zip(runs, times, strict=True):
            start = time.perf_counter_ns()
            run()
            kept.append((time.perf_counter_ns() - start) / 1000)
    return times


def _percentiles(times: Sequence[float]) -> dict[str, Any]:
    import numpy as np

    p10, median, p90 = np.percentile(times, [10, 50, 90])
    return {"calls": len(times), "median_us": median, "p10_us": p10, "p90_us": p90}


def _parts(data: dict[str, Any]) -> Iterable[RenderableType]:
    from optcompiler.summary import cell, grid, micros

    table = grid(
        ("artifact", "left"), ("target", "left"), ("threads", "right"), ("calls", "right"),
        ("median", "right"), ("p10", "right"), ("p90", "right"),
    )  # fmt: skip
    for row in data["runs"]:
        spelled = [micros(row[k]) for k in ("median_us", "p10_us", "p90_us")]
        known = [row[k] for k in ("artifact", "target", "threads", "calls")]
        table.add_row(*map(cell, (*known, *spelled)))
    yield table
    if "speedup" in data:
        first, second = (row["artifact"] for row in data["runs"])
        yield cell(f"{first} is {data['speedup']:.2f}x as fast as {second}")
