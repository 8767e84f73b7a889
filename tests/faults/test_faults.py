"""Whatever writes files is killed, or finds the disk full, at each of its writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.running import run

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads a library")

SMALL = ("save", "save-first", "report", "program", "external", "cache", "reproducer", "c-compiler")


def fine(result: dict[str, Any]) -> bool:
    """Nothing broken, and both sides of the one step that puts the new in place were seen."""
    assert result["faults"] == [], result["scenario"]
    return all(len(seen) == 2 and "new" in seen for seen in result["outcomes"].values())


def test_at_every_point(tmp_path: Path) -> None:
    results = list(run(SMALL, tmp_path))
    assert [r["scenario"] for r in results] == list(SMALL)
    for result in results:
        assert fine(result), result
        assert result["points"] >= 5


def test_a_compile_by_the_command_line(tmp_path: Path) -> None:
    """At some points; `python -m tests.faults compile` takes all."""
    (result,) = run(["compile"], tmp_path, most=10)
    assert fine(result), result
    assert result["points"] > 60
