"""How large a program the core takes: memory with mapped weights, and time by the number of nodes.

    python -m benchmarks.scale decoder [--layers 32] [--type float32] [--save]
    python -m benchmarks.scale nodes [--kinds deep,wide] [--sizes 1000,3000,10000] [--passes a,b]

`decoder` takes a decoder of Llama-7B's shapes, whose weights are a sparse file, through import,
verification and every exact pass of the default pipeline, and samples RssAnon: the memory of the
process that no file stands behind. `nodes` prints the microseconds of processor time per node of
each step on graphs of rising size, and the slope of log time over log nodes: 1 is linear.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from benchmarks.decoder import Shape, used_bytes, write
from benchmarks.graphs import KINDS
from optcompiler import Registry
from optcompiler.collecting import collecting_seldom
from optcompiler.compiler import session_for
from optcompiler.pipeline import resolve
from optcompiler.program import Program
from optcompiler.rewriting import Batch, Stage
from optcompiler.session import Session
from optcompiler.synthesis import random_batch

T = TypeVar("T")

EVERY_S = 0.005


def anonymous_mb() -> float:
    """RssAnon of this process in MB."""
    with open("/proc/self/status") as status:
        line = next(text for text in status if text.startswith("RssAnon"))
    return int(line.split()[1]) / 1000


@dataclass
class Meter:
    """Seconds and the highest RssAnon of each step."""

    rows: list[tuple[str, float, float]] = field(default_factory=list)
    peak: float = 0.0

    def __call__(self, label: str, step: Callable[[], T]) -> T:
        self.peak = anonymous_mb()
        start = time.perf_counter()
        result = step()
        self.rows.append((label, time.perf_counter() - start, max(self.peak, anonymous_mb())))
        print(f"| {label} | {self.rows[-1][1]:.1f} | {self.rows[-1][2]:.0f} |", flush=True)
        return result

    @contextmanager
    def sampling(self) -> Iterator[None]:
        over = threading.Event()

        def sample() -> None:
            while not over.wait(EVERY_S):
                self.peak = max(self.peak, anonymous_mb())

        watcher = threading.Thread(target=sample, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def exact_session(program: Program, batch: Batch, registry: Registry) -> Session:
    return session_for(
        program, registry, target="onnxruntime", precisions=frozenset({"fp32"}), batch=batch,
        calibrated=False, seed=0,
    )  # fmt: skip


def decoder(shape: Shape, dtype: str, save: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="optcompiler-scale-") as name:
        path = write(Path(name), shape, dtype)
        data = path.with_suffix(".data")
        size = data.stat().st_size
        print(f"{shape}, {dtype}: {size / 1e9:.2f} GB of weights, "
              f"{used_bytes(data) / 1e9:.2f} GB on disk\n")  # fmt: skip
        print("| step | seconds | peak RssAnon in MB |\n|---|---|---|", flush=True)
        meter = Meter()
        with meter.sampling():
            _decoder_steps(path, shape, save, meter)
        print(f"\nHighest RssAnon: {max(peak for *_, peak in meter.rows):.0f} MB")


def _decoder_steps(path: Path, shape: Shape, save: bool, meter: Meter) -> None:
    print(f"| (before anything) | 0 | {anonymous_mb():.0f} |")
    program = meter("import", lambda: Program.from_onnx(path))
    meter("verify", program.verify)
    registry = Registry()
    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, (1, shape.tokens))
    session = exact_session(program, {"tokens": tokens}, registry)
    meter("run on the check batch", lambda: session.outputs(program))
    for pass_ in resolve(None, registry):
        if pass_.stage in (Stage.CLEAN, Stage.FUSE):
            before, seen = program, len(list(session.ledger))
            program = meter(
                f"{pass_.name}: propose, rewrite, verify, compare",
                lambda p=pass_, b=before: session.apply_exact(p, b),
            )
            told = Counter(row.outcome for row in list(session.ledger)[seen:])
            _, _, changed = program.changes_since(before)
            remade = sum(program.weights()[n].nbytes for n in changed)
            print(f"|   {len(before.graph)} nodes become {len(program.graph)}; "
                  f"{dict(told)}; {remade / 1e9:.2f} GB of weights made anew | | |")  # fmt: skip
    if save:
        meter("save", lambda: program.save(path.with_name("saved.onnx")))


def nodes(kinds: Sequence[str], sizes: Sequence[int], wanted: Sequence[str] | None) -> None:
    registry = Registry()
    for kind in kinds:
        table: dict[str, dict[int, float]] = {}
        for size in sizes:
            for label, seconds in _steps(kind, size, registry, wanted):
                table.setdefault(label, {})[size] = seconds
        heads = " | ".join(f"{s} nodes" for s in sizes)
        print(f"\n{KINDS[kind].__doc__}\n\n| {kind}, µs a node | {heads} | slope |")
        print("|---" * (len(sizes) + 2) + "|")
        for label, times in table.items():
            cells = " | ".join(f"{1e6 * times[s] / s:.0f}" for s in sizes)
            print(f"| {label} | {cells} | {_slope(times):.2f} |", flush=True)


def _slope(times: dict[int, float]) -> float:
    """Of the least-squares line through (log nodes, log seconds)."""
    if len(times) < 2:
        return math.nan
    x, y = np.log(list(times)), np.log(list(times.values()))
    return float(np.polyfit(x, y, 1)[0])


def _steps(
    kind: str, size: int, registry: Registry, wanted: Sequence[str] | None
) -> Iterator[tuple[str, float]]:
    def timed(step: Callable[[], T]) -> tuple[T, float]:
        start = time.process_time()
        result = step()
        return result, time.process_time() - start

    program, seconds = timed(lambda: Program.from_onnx(KINDS[kind](size)))
    yield "import", seconds
    yield "verify", timed(program.verify)[1]
    yield "clone", timed(program.clone)[1]
    with tempfile.TemporaryDirectory() as name:
        yield "save", timed(lambda: program.save(Path(name) / "saved.onnx"))[1]
    session = exact_session(program, random_batch(program.inputs), registry)
    session.time_limit_s = math.inf
    yield "run on the check batch", timed(lambda: session.outputs(program))[1]
    whole = 0.0
    for pass_ in resolve(None, registry):
        if pass_.stage not in (Stage.CLEAN, Stage.FUSE) or (wanted and pass_.name not in wanted):
            continue
        program, seconds = timed(lambda p=pass_, b=program: session.apply_exact(p, b))
        whole += seconds
        yield pass_.name, seconds
    yield "all passes", whole
    taken = sum(row.outcome == "taken" for row in session.ledger)
    print(f"{kind}, {size}: {len(session.teacher.graph)} nodes become {len(program.graph)} by "
          f"{taken} rewrites in {whole:.1f} s", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    memory = commands.add_parser("decoder")
    memory.add_argument("--layers", type=int, default=Shape.layers)
    memory.add_argument("--tokens", type=int, default=Shape.tokens)
    memory.add_argument("--type", default="float32", choices=["float32", "float16"])
    memory.add_argument("--save", action="store_true")
    growth = commands.add_parser("nodes")
    growth.add_argument("--kinds", default=",".join(KINDS))
    growth.add_argument("--sizes", default="1000,3000,10000")
    growth.add_argument("--passes", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with collecting_seldom():
        if options.command == "decoder":
            shape = Shape(layers=options.layers, tokens=options.tokens)
            decoder(shape, options.type, options.save)
        else:
            sizes = [int(s) for s in options.sizes.split(",")]
            nodes(options.kinds.split(","), sizes, [p for p in options.passes.split(",") if p])


if __name__ == "__main__":
    main()
