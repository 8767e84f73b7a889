"""Every example runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import ROOT, blocks


@pytest.mark.slow
def test_the_snippet_of_the_readme(tmp_path: Path) -> None:
    (snippet,) = blocks(ROOT / "README.md", "python")
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "metric drop" in done.stdout
    assert (tmp_path / "build" / "net" / "manifest.json").is_file()


@pytest.mark.slow
def test_digits(tmp_path: Path) -> None:
    """The demo: pruned, quantised and distilled inside half a point, with less work."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "digits.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for backend in ("cpu", "onnxruntime"):
        directory = tmp_path / "build" / f"digits-{backend}"
        measured = json.loads((directory / "measurements.json").read_text())
        assert measured["metric"]["drop"] <= 0.5
        # how far it is pruned is the planner's, and follows from the speed of this machine
        assert measured["macs"]["after"] < 0.8 * measured["macs"]["before"]
        ledger = json.loads((directory / "ledger.json").read_text())
        taken = {row["pass_name"] for row in ledger if row["outcome"] == "taken"}
        assert {"fold-batchnorm", "prune-channels", "distill"} <= taken
        tried = [r for r in ledger if r["pass_name"] == "insert-qdq" and r["outcome"] != "declined"]
        assert tried
        # integers are no gain on every processor (without VNNI they are not), and then not taken
        slow = all(r["reason"].startswith("predicted no faster") for r in tried)
        assert "insert-qdq" in taken or slow, {r["reason"] for r in tried}
    assert len(re.findall(r"(?m)^metric drop ", done.stdout)) == 2
