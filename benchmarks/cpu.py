"""Latency of the `cpu` backend beside ONNX Runtime, OpenVINO and torch.compile.

    pip install -c constraints.txt -e '.[benchmark,peers]'
    python benchmarks/cpu.py                                     # everything: hours
    python benchmarks/cpu.py --models resnet18,vit --threads 1 --batches 1 --repeats 5
    python benchmarks/cpu.py --kernels minilm --precisions int8 --threads 1 --batches 1

Each model, batch and number of threads is a process of its own, pinned to as many cores. In it all
tools are built and warmed, then timed in turn in rounds, so that a drifting machine drifts for all;
a number is the median over the rounds of the least of a round. Ours in int8 has no budget for
accuracy here and nothing is tuned for it, as the peers have none. Fractions of peak count the float
model's multiply-accumulates against what the same core reached in the same process on products in
registers (`peaks.c`).
`--kernels` prints each kernel of ours beside its floor in place of the peers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import RESULT, Task
from models import SPEED_CASES
from peers import PEERS
from roofline import kernel_table
from tables import remarks, table

PRECISIONS = ("fp32", "int8", "bf16")


def chosen(text: str, known: Sequence[str], what: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in known:
            raise SystemExit(f"{what} {name!r} is not known; give of {', '.join(known)}.")
    return names


def installed(peers: Sequence[str], precisions: Sequence[str]) -> tuple[str, ...]:
    """Those peers that can run at some of the precisions; says which cannot, and why."""
    kept: list[str] = []
    for name in peers:
        peer = PEERS[name]
        usable = 0
        for precision in precisions:
            needed = peer.packages.get(precision, [])
            missing = [p for p in needed if importlib.util.find_spec(p) is None]
            if missing:
                say(f"{peer.title} {precision} is skipped: {', '.join(missing)} is not installed")
            usable += bool(needed) and not missing
        if usable:
            kept.append(name)
    return tuple(kept)


def run(task: Task, show: bool) -> dict[str, Any] | str:
    """The result of a process of its own, or why there is none."""
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(task.threads),
                   "MKL_NUM_THREADS": str(task.threads)}  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name("measuring.py")),
               json.dumps(asdict(task))]  # fmt: skip
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=None if show else errors, text=True,
            env=environment, check=False,
        )  # fmt: skip
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1]
    say(f"{task.model}, batch {task.batch}, {task.threads} threads: "
        f"{time.perf_counter() - start:.0f} s")  # fmt: skip
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    ended = done.returncode
    how = f"ended by {signal.Signals(-ended).name}" if ended < 0 else f"exit status {ended}"
    return f"{how}, having said last: {last[:200]}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(results: Sequence[Mapping[str, Any]], precisions: Sequence[str]) -> None:
    for precision in precisions:
        print(f"\n## {precision}\n\n{table(results, precision) or 'ours did not run'}")
    print("\n" + "\n".join(remarks(results)))


def show_kernels(results: Sequence[Mapping[str, Any]]) -> None:
    for result in results:
        for precision, found in result["kernels"].items():
            print(f"\n## {result['model']}, {precision}, batch {result['batch']}, "
                  f"{result['threads']} threads\n\n{kernel_table(found)}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(SPEED_CASES), help="default: %(default)s")
    parser.add_argument("--precisions", default="fp32,int8", help="default: %(default)s")
    parser.add_argument("--threads", default="1,2", help="default: %(default)s")
    parser.add_argument("--batches", default="1,8", help="default: %(default)s")
    parser.add_argument("--peers", default=",".join(PEERS), help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=15, help="rounds; default: %(default)s")
    parser.add_argument("--json", type=Path, help="keep the measurements in this file")
    parser.add_argument("--kernels", metavar="MODEL", help="our kernels of this model alone")
    parser.add_argument("--verbose", action="store_true", help="show what the tools print")
    options = parser.parse_args()
    wanted = options.kernels or options.models
    models = chosen(wanted, list(SPEED_CASES), "model")
    precisions = chosen(options.precisions, PRECISIONS, "precision")
    peers = installed(chosen(options.peers, list(PEERS), "peer"), precisions)
    cores = sorted(os.sched_getaffinity(0))
    threads = [int(n) for n in options.threads.split(",")]
    if max(threads) > len(cores):
        raise SystemExit(f"--threads {max(threads)}: this process may use {len(cores)} cores.")
    # An exception in place of a sudden end: it takes the process that is measuring along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results: list[dict[str, Any]] = []
    for model in models:
        for batch in map(int, options.batches.split(",")):
            with tempfile.TemporaryDirectory() as directory:
                for count in threads:
                    task = Task(
                        model, batch, tuple(cores[:count]), precisions, peers, options.repeats,
                        directory, options.kernels is not None,
                    )  # fmt: skip
                    found = run(task, options.verbose)
                    if isinstance(found, str):
                        say(f"{model}, batch {batch}, {count} threads failed: {found}")
                        continue
                    results.append(found)
                    if options.json:
                        options.json.write_text(json.dumps(results, indent=1))
    if options.kernels:
        show_kernels(results)
    else:
        show(results, precisions)


if __name__ == "__main__":
    main()
