"""Latency of the `cpu` backend beside ONNX Runtime, OpenVINO and torch.compile, fp32 and int8.

    pip install -c constraints.txt -e '.[benchmark,peers]'
    python benchmarks/cpu.py                                   # every model, batch 1, one thread
    python benchmarks/cpu.py --models resnet18,vit --threads 1,2 --batch 1,8

Each model, batch and number of threads is a process of its own, pinned to as many cores; in it all
tools are timed in turn, so that a drifting machine drifts for all. The models' int8 budgets are
unbounded here, as the peers' are: what int8 costs in accuracy is `benchmarks/quality.py`'s subject.
Fractions are of what the same core reached just before on independent products (`peaks.c`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PASSES = (
    "simplify", "fold-batchnorm", "prune-dead-channels", "insert-qdq", "pack-weights",
    "move-integers", "fuse-operators",
)  # fmt: skip


def peaks() -> dict[str, float]:
    """Giga operations a second of one core by data type."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "peaks"
        subprocess.run(
            [os.environ.get("CC", "cc"), "-O2", HERE / "peaks.c", "-o", program], check=True
        )
        printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return dict(zip(("int8", "bf16", "fp32"), map(float, printed.split()), strict=True))


# -- one model, batch and number of threads, in a process of its own ----------------------------


def measure(name: str, batch: int, threads: int, precisions: Sequence[str]) -> dict[str, Any]:
    sys.path.insert(0, str(HERE))
    import torch
    from models import SPEED_CASES
    from peers import PEERS, made, samples

    import optcompiler as oc
    from optcompiler.device import interleaved_us

    os.sched_setaffinity(0, range(threads))
    torch.set_num_threads(threads)
    case = SPEED_CASES[name]()
    inputs = tuple(torch.cat([t] * batch) for t in case.inputs)
    calls: dict[str, Any] = {}
    failed: dict[str, str] = {}
    macs = 0
    for precision in precisions:
        compiled = oc.compile(
            case.module, inputs, target=oc.Target("cpu", threads=threads), precision=precision,
            calibration=samples(case, inputs) if precision != "fp32" else None,
            budget=oc.Budget(max_damage=float("inf")), passes=PASSES,
        )  # fmt: skip
        macs = macs or compiled.measurements["macs"]["before"]
        calls[f"optcompiler {precision}"] = compiled
        peers, missing = made(PEERS.get(precision, {}), case, inputs, threads)
        calls |= {f"{k} {precision}": v for k, v in peers.items()}
        failed |= {f"{k} {precision}": v for k, v in missing.items()}
    rates = peaks()
    times = interleaved_us([lambda c=c: c(*inputs) for c in calls.values()], seconds=3.0)
    return {
        "model": case.name, "batch": batch, "threads": threads, "macs": macs, "peaks": rates,
        "us": dict(zip(calls, times, strict=True)), "failed": failed,
    }  # fmt: skip


# -- the table ------------------------------------------------------------------------------------


def row_of(found: Mapping[str, Any], precision: str) -> dict[str, Any] | None:
    times = {k: v for k, v in found["us"].items() if k.endswith(f" {precision}")}
    ours = times.pop(f"optcompiler {precision}", None)
    if ours is None or not times:
        return None
    peer, least = min(times.items(), key=lambda pair: pair[1])
    rate = 2 * found["macs"] / ours / 1e3
    return {
        "ours_us": ours, "peer": peer.removesuffix(f" {precision}"), "peer_us": least,
        "ratio": least / ours, "of_peak": rate / (found["peaks"][precision] * found["threads"]),
        "times": times,
    }  # fmt: skip


def table(results: Sequence[Mapping[str, Any]], precisions: Sequence[str]) -> None:
    for precision in precisions:
        print(f"\n{precision}\n")
        print(
            "| model | batch | threads | ours µs | best peer | µs | × best peer | of peak "
            "| all peers µs |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        ratios: dict[tuple[int, int], list[float]] = {}
        for found in results:
            row = row_of(found, precision)
            if row is None:
                continue
            ratios.setdefault((found["batch"], found["threads"]), []).append(row["ratio"])
            others = ", ".join(
                f"{k.removesuffix(f' {precision}')} {v:.0f}" for k, v in row["times"].items()
            )
            cells = (
                found["model"], found["batch"], found["threads"], f"{row['ours_us']:.0f}",
                row["peer"], f"{row['peer_us']:.0f}", f"{row['ratio']:.2f}",
                f"{100 * row['of_peak']:.0f} %", others,
            )  # fmt: skip
            print("| " + " | ".join(map(str, cells)) + " |")
        for (batch, threads), values in sorted(ratios.items()):
            mean = math.exp(sum(map(math.log, values)) / len(values))
            print(
                f"\nbatch {batch}, {threads} threads: geometric mean {mean:.2f}×, "
                f"least {min(values):.2f}×, of {len(values)} models"
            )
    for found in results:
        for who, why in found["failed"].items():
            print(f"{found['model']}, batch {found['batch']}: {who} failed: {why}", file=sys.stderr)


def main() -> None:
    sys.path.insert(0, str(HERE))
    from models import SPEED_CASES

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(SPEED_CASES))
    parser.add_argument("--batch", default="1")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--precisions", default="fp32,int8")
    parser.add_argument("--json", type=Path, help="keep the measurements in this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    precisions = options.precisions.split(",")
    if options.worker:
        found = measure(options.models, int(options.batch), int(options.threads), precisions)
        print("RESULT " + json.dumps(found))
        return
    results: list[dict[str, Any]] = []
    for batch in options.batch.split(","):
        for threads in options.threads.split(","):
            for name in options.models.split(","):
                command = [
                    sys.executable, __file__, "--worker", "--models", name, "--batch", batch,
                    "--threads", threads, "--precisions", options.precisions,
                ]  # fmt: skip
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
                if line is None:
                    print(f"{name}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                    continue
                results.append(json.loads(line.removeprefix("RESULT ")))
                print(f"{name}, batch {batch}, {threads} threads: done", file=sys.stderr)
    table(results, precisions)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
