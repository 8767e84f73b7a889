"""One model at one batch size and number of threads, in a process that does nothing else.

    python benchmarks/measuring.py '{"model": "resnet18", "batch": 1, …}'

`benchmarks/cpu.py` starts it; the argument is a `Task` as JSON, the last line printed the result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peers import Job

    import optcompiler as oc

OURS = "optcompiler"
RESULT = "RESULT "


@dataclass(frozen=True)
class Task:
    """`cores` are what the process is pinned to, one for each thread; `directory` keeps what is
    the same for every number of threads; `rounds` are the turns that each tool is timed in.
    `kernels` asks for the kernels of our artifacts in place of the peers."""

    model: str
    batch: int
    cores: tuple[int, ...]
    precisions: tuple[str, ...]
    peers: tuple[str, ...]
    rounds: int
    directory: str
    kernels: bool = False

    @property
    def threads(self) -> int:
        return len(self.cores)


def peaks() -> dict[str, dict[str, float]]:
    """Giga operations a second of one core, by type and by the instructions that reach them."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "peaks"
        source = Path(__file__).with_name("peaks.c")
        subprocess.run([os.environ.get("CC", "cc"), "-O2", source, "-o", program], check=True)
        for _ in range(2):
            run = subprocess.run([program], check=True, capture_output=True, text=True)
            for line in run.stdout.splitlines():
                dtype, instructions, rate = line.split()
                rates = found.setdefault(dtype, {})
                rates[instructions] = max(float(rate), rates.get(instructions, 0.0))
    return found


def compiled(job: Job, precision: str) -> oc.Compiled:
    """Ours: every layer that has an integer kernel quantised, whatever it costs, and nothing tuned
    for accuracy, so that kernels are compared with the peers' kernels."""
    import integers_first
    from peers import samples

    import optcompiler as oc
    from optcompiler.pipeline import resolve

    registry = oc.Registry(extra=[integers_first])
    return oc.compile(
        job.case.module, job.inputs, target=oc.Target("cpu", threads=job.threads),
        precision=precision, calibration=None if precision == "fp32" else samples(job),
        budget=oc.Budget(max_damage=float("inf")), registry=registry,
        cost_model=integers_first.IntegersFirst.name,
        passes=[p for p in resolve(None, registry) if p.stage is not oc.Stage.TUNE],
    )  # fmt: skip


def left_in_float(artifact: oc.Compiled, threads: int) -> str:
    """The share of multiply-accumulates done in float, and in which kernels; "" for none."""
    import optcompiler as oc

    assert artifact.program is not None
    kernels = oc.Registry().backend("cpu").kernels(
        artifact.program, oc.Target("cpu", threads=threads)
    )  # fmt: skip
    floats = [k for k in kernels if k.macs and k.dtype == "fp32"]
    if not floats:
        return ""
    share = sum(k.macs for k in floats) / sum(k.macs for k in kernels)
    return f"{share:.1%} of MACs: {', '.join(k.name for k in floats)}"


def measure(task: Task, job: Job) -> dict[str, Any]:
    """Latencies of ours and the peers at every precision, all timed in turn."""
    import torch
    from interleaving import in_turn
    from peers import PEERS, made

    import optcompiler as oc

    entries: list[dict[str, Any]] = []
    calls: list[Callable[..., Any]] = []
    failed: list[dict[str, str]] = []
    notes: list[str] = []
    operations = 0

    def add(who: str, precision: str, maker: Callable[[], Any], threads: int = job.threads) -> Any:
        outcome = made(maker)
        if outcome.call is None:
            failed.append({"who": who, "precision": precision, "reason": outcome.reason})
            return None
        print(f"{who} {precision} made in {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
        entries.append({"who": who, "precision": precision, "threads": threads,
                        "build_s": outcome.seconds})  # fmt: skip
        calls.append(outcome.call)
        return outcome.call

    for precision in task.precisions:
        ours = add(OURS, precision, lambda p=precision: compiled(job, p))
        if ours is not None:
            operations = operations or 2 * ours.measurements["macs"]["before"]
            if precision != "fp32" and (left := left_in_float(ours, job.threads)):
                notes.append(f"{precision}, {left}")
            if job.threads > 1:
                add(OURS, precision, lambda o=ours: oc.load(o.directory, threads=1), threads=1)
        for name in task.peers:
            maker = PEERS[name].makers.get(precision)
            if maker is not None:
                add(PEERS[name].title, precision, lambda m=maker: m(job))
    with torch.no_grad():
        expected = _array(job.case.module(*job.inputs))
    for entry, call in zip(entries, calls, strict=True):
        difference = abs(_array(call(*job.inputs)) - expected).max() / abs(expected).max()
        entry["error"] = float(difference)
    times = in_turn([lambda c=c: c(*job.inputs) for c in calls], task.rounds)
    for entry, found in zip(entries, times, strict=True):
        entry |= {"us": found.us, "low_us": found.low_us, "high_us": found.high_us}
    return {
        "model": job.case.name, "batch": task.batch, "threads": task.threads,
        "operations": operations, "peaks": peaks(), "times": entries, "failed": failed,
        "notes": notes,
    }  # fmt: skip


def _array(output: Any) -> Any:
    import numpy as np

    first = output[0] if isinstance(output, (tuple, list)) else output
    return np.asarray(first.detach().float() if hasattr(first, "detach") else first)


def perform(task: Task) -> dict[str, Any]:
    import torch
    from models import SPEED_CASES
    from peers import Job

    torch.set_num_threads(task.threads)
    case = SPEED_CASES[task.model]()
    inputs = tuple(torch.cat([t] * task.batch) for t in case.inputs)
    job = Job(case, inputs, task.threads, Path(task.directory))
    if not task.kernels:
        return measure(task, job)
    from roofline import kernels_of

    rates = peaks()
    found = {p: kernels_of(compiled(job, p), job, rates, task.rounds) for p in task.precisions}
    return {"model": case.name, "batch": task.batch, "threads": task.threads, "kernels": found}


def main(arguments: Sequence[str]) -> None:
    task = Task(**json.loads(arguments[0]))
    # Before any tool is imported: each takes the cores that it may use from the process.
    os.sched_setaffinity(0, task.cores)
    print(RESULT + json.dumps(perform(task)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
