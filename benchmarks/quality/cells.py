"""One cell of the table: a model, a tool, a setting, so many samples, a seed; made in a process."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

SETTINGS = ("w8a8", "w4a8", "w4a4", "w4")
RESULT = "result: "


@dataclass(frozen=True)
class Cell:
    """`samples` 0 is without data; `variant` names a pipeline of ours, "" for all of it."""

    subject: str
    tool: str
    setting: str
    samples: int
    seed: int
    variant: str = ""

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Made:
    """A model as quantised: `call` takes batches as the module does; `facts` go into the result."""

    call: Callable[..., Any]
    facts: dict[str, Any]


def performed(cell: Cell, threads: int) -> dict[str, Any]:
    """The score of a cell with what it took, in this process."""
    import torch

    from benchmarks import zoo
    from benchmarks.quality.tools import TOOLS

    torch.set_num_threads(threads)
    subject = zoo.subject(cell.subject)
    start = time.perf_counter()
    made = TOOLS[cell.tool].make(subject, cell, threads)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    score = subject.metric(made.call)
    found = {**asdict(cell), "score": score, "seconds": seconds, "peak_mb": peak, **made.facts}
    if subject.second is not None:
        found["second"] = subject.second[1](made.call)
    return found


def run(cell: Cell, threads: int, verbose: bool) -> dict[str, Any]:
    """The result of a process of its own; one that fails says why under "reason"."""
    command = [sys.executable, "-m", "benchmarks.quality.cells", cell.key, str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONHASHSEED": "0"}
    errors = None if verbose else subprocess.PIPE
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, check=False
    )
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    last = ((done.stderr or "").strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return {**asdict(cell), "score": None, "reason": last[:300]}


def main() -> None:
    cell, threads = Cell(**json.loads(sys.argv[1])), int(sys.argv[2])
    print(RESULT + json.dumps(performed(cell, threads)), flush=True)


if __name__ == "__main__":
    main()
