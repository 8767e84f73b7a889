"""Drawing graphs, judging them, compiling those that hold, and keeping the smallest that fail."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from optcompiler.program import Program
from optcompiler.shrinking import shrink
from optcompiler_cpu.isa import ISAS
from tests.fuzz.batch import Batch
from tests.fuzz.oracles import Statistics, Wrong, judge
from tests.fuzz.regression import as_text
from tests.fuzz.strategy import Case, cases, known_values, replayed

CHUNK = 250
"""Graphs that are compiled together, and after which a run that failed starts anew."""


@dataclass
class Run:
    """`failures` maps the message of each kind of failure to the program that shows it."""

    scratch: Path
    isa: str = "portable"
    statistics: Statistics = field(default_factory=Statistics)
    failures: dict[str, str] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    """Of drawing and judging, without the backend `cpu`."""

    def chunk(self, graphs: int, number: int, *, shrinking: bool = True) -> None:
        """Draw and judge `graphs` graphs; Hypothesis shrinks the first that fails."""
        batch = Batch(ISAS[self.isa])
        last: list[Case] = []
        held: list[Case] = []
        phases = [Phase.generate, *([Phase.shrink] if shrinking else [])]

        @seed(number)
        @settings(max_examples=graphs, database=None, deadline=None, phases=phases,
                  suppress_health_check=list(HealthCheck), report_multiple_bugs=False)  # fmt: skip
        @given(cases())
        def check(case: Case) -> None:
            # what Hypothesis tries after a failure to make it smaller does not count
            statistics = Statistics() if last and not held else self.statistics
            last[:], held[:] = [case], []
            judged = judge(case, statistics)
            batch.add(judged, statistics)
            held[:] = [case]

        begin = time.process_time()
        try:
            with one_thread(), quiet():
                check()
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:
            if not last:
                raise
            self._keep(error, last[0])
        self.cpu_seconds += time.process_time() - begin
        for judged, error in batch.run(self.scratch):
            self._keep(error, smallest(judged.case, self.isa, self.scratch))

    def _keep(self, error: Exception, case: Case) -> None:
        text = f"{type(error).__name__}: {error}"
        kind = re.sub(r"[-+\d.]+(e[-+]?\d+)?", "#", text)[:120]
        if kind not in {re.sub(r"[-+\d.]+(e[-+]?\d+)?", "#", k)[:120] for k in self.failures}:
            self.failures[text] = as_text(case.model, case.inputs)

    @property
    def rate(self) -> float:
        """Graphs per second of one core."""
        return self.statistics.graphs / max(self.cpu_seconds, 1e-9)


def check_all(case: Case, scratch: Path, isa: str = "portable") -> None:
    """Every oracle on one program; raises what does not hold."""
    statistics = Statistics()
    batch = Batch(ISAS[isa])
    with quiet():
        batch.add(judge(case, statistics), statistics)
        for _, error in batch.run(scratch):
            raise error


def smallest(case: Case, isa: str, scratch: Path) -> Case:
    """The smallest part of the program that the backend `cpu` still gets wrong."""
    values = known_values(case.model, case.inputs)

    def part(program: Program) -> Case:
        return replayed(program.to_proto(), {p.name: values[p.name] for p in program.inputs})

    def fails(program: Program) -> bool:
        try:
            check_all(part(program), scratch, isa)
        except Wrong as error:
            return error.oracle == "cpu"
        return False

    found, _ = shrink(Program.from_onnx(case.model), fails)
    return part(found)


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the constant folder says of each node that it leaves."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
