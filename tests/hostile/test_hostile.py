"""The corpus in forks of one process, and mutations of good files; `python -m tests.hostile` starts
a fresh process for each item."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from optcompiler.artifact import open_artifact
from optcompiler.errors import OptcompilerError
from optcompiler.program import Program
from tests.hostile import archives, artifacts, calibration, files, graphs  # noqa: F401
from tests.hostile.corpus import ITEMS
from tests.hostile.running import Outcome

ROOT = Path(__file__).parents[2]
MUTATIONS = 100


PARTS = 12
"""Of the corpus, each run by a small process of its own: a fork begins with its parent's memory,
and this process may hold anything."""


@pytest.mark.parametrize("part", range(PARTS))
def test_items(part: int) -> None:
    names = list(ITEMS)[part::PARTS]
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile", "--forked", "--json", "--named", *names],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    outcomes = [Outcome(**found) for found in json.loads(done.stdout)]
    assert [o.name for o in outcomes] == names
    # a crowded machine says nothing of the CPU time; python -m tests.hostile does
    faults = {
        o.name: (wrong, o.stderr)
        for o in outcomes
        if (wrong := [f for f in o.faults(ITEMS[o.name]) if "CPU time" not in f])
    }
    assert not faults, faults


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(0, len(changed)))
        how = rng.integers(0, 4)
        if how == 0:
            changed[at] ^= 1 << int(rng.integers(0, 8))
        elif how == 1:
            changed[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
        elif how == 2:
            del changed[at : at + int(rng.integers(1, 9))]
        else:
            changed[at:at] = rng.bytes(int(rng.integers(1, 9)))
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def test_mutated_models_are_read_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    good = graphs.function_chain(3).SerializeToString()
    for _ in range(MUTATIONS):
        (tmp_path / "m.onnx").write_bytes(mutated(good, rng))
        try:
            Program.from_onnx(tmp_path / "m.onnx")
        except OptcompilerError:
            continue


def test_mutated_manifests_are_read_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    net = tmp_path / "net"
    shutil.copytree(artifacts.good(), net)
    good = (net / "manifest.json").read_bytes()
    assert json.loads(good)["format"]
    for _ in range(MUTATIONS):
        (net / "manifest.json").write_bytes(mutated(good, rng))
        try:
            open_artifact(net)
        except OptcompilerError:
            continue
