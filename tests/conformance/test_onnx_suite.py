"""The ONNX backend suite against every subject; see `runner`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.cases import KINDS
from tests.conformance.runner import CHUNKS, Verdict, judge, selected, useless_exclusions
from tests.conformance.subjects import SUBJECTS


def parts() -> Iterator[tuple[str, str, int]]:
    for name, subject in SUBJECTS.items():
        for kind in KINDS:
            if kind in subject.floors:
                for chunk in range(CHUNKS if kind == "node" else 1):
                    yield name, kind, chunk


@pytest.mark.parametrize(("name", "kind", "chunk"), list(parts()))
def test_models(name: str, kind: str, chunk: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    subject = SUBJECTS[name]
    whole = CHUNKS if kind == "node" else 1
    chosen = selected(subject, kind, chunk if whole > 1 else None)
    outcomes = [judge(subject, case) for case in chosen]
    right = sum(outcome.verdict is Verdict.RIGHT for outcome in outcomes)
    total = add_up(scores(tmp_path_factory), f"{name}-{kind}", chunk, right, whole)
    wrong = [f"{o.case}: {o.reason}" for o in outcomes if o.verdict is Verdict.WRONG]
    assert not wrong, "\n".join(wrong)
    if total is not None:
        assert total >= subject.floors[kind]


def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "conformance"
    folder.mkdir(exist_ok=True)
    return folder


def add_up(folder: Path, name: str, chunk: int, right: int, whole: int) -> int | None:
    """The sum over all chunks for the last of them to finish, None for the others."""
    scratch = folder / f".{name}-{chunk}"
    scratch.write_text(json.dumps(right))
    scratch.replace(folder / f"{name}-{chunk}.json")
    found = [folder / f"{name}-{c}.json" for c in range(whole)]
    if not all(path.exists() for path in found):
        return None
    return sum(json.loads(path.read_text()) for path in found)


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_exclusion_matches_a_case(name: str) -> None:
    assert not useless_exclusions(SUBJECTS[name])
