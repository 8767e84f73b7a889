"""Five hundred graphs, always the same, through every oracle; and programs that once failed.

`make fuzz` draws 10,000 others.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from optcompiler.ops import builtin_specs
from tests.fuzz.families import FAMILIES, WITHOUT
from tests.fuzz.oracles import exact_passes
from tests.fuzz.regression import from_text, known
from tests.fuzz.run import Run, check_all
from tests.fuzz.strategy import replayed

GRAPHS = 500
SEEDS = (32, 132)
OFTEN = {
    "simplify": 100, "fuse-operators": 100, "fold-batchnorm": 25, "prune-dead-channels": 15,
    "pack-weights": 10, "move-integers": 8, "unify-caps": 0,
}  # fmt: skip
"""In how many of the graphs each pass takes a candidate, at least."""


def test_every_operator_of_the_table_can_be_drawn() -> None:
    table = {spec.op_type for spec in builtin_specs() if not spec.domain}
    assert set(FAMILIES) | set(WITHOUT) >= table
    assert not set(FAMILIES) & set(WITHOUT)


def test_graphs(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for number in SEEDS:
        run.chunk(GRAPHS // len(SEEDS), number)
    print(run.statistics.text(), f"\n{run.rate:.1f} graphs/s on one core")
    assert not run.failures, "\n".join(
        f"{message}\n{text}" for message, text in run.failures.items()
    )
    assert run.statistics.graphs == GRAPHS
    taken = run.statistics.taken
    assert {p.name for p in exact_passes()} == set(OFTEN)
    assert {name: taken[name] for name in OFTEN if taken[name] < OFTEN[name]} == {}
    assert run.statistics.compiled > 0.8 * GRAPHS
    assert run.statistics.not_run < 0.02 * GRAPHS
    assert len(run.statistics.operators) > 120


@pytest.mark.parametrize("path", known(), ids=lambda p: p.stem)
def test_programs_that_once_failed(path: Path, tmp_path: Path) -> None:
    check_all(replayed(*from_text(path.read_text(encoding="utf-8"))), tmp_path)
