"""Work grows with the nodes, and memory does not grow with the weights."""

from __future__ import annotations

import cProfile
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.decoder import Shape, used_bytes, write
from benchmarks.graphs import KINDS
from optcompiler import spilling
from optcompiler.pipeline import resolve
from optcompiler.program import Program
from optcompiler.rewriting import Stage
from optcompiler.session import Session
from optcompiler.synthesis import random_batch
from tests.conformance.exact import PROFILE, TARGET, apply_exact_passes, registry
from tests.support import make_context

FEW, MANY = 100, 400
ALLOWED = 1.25
"""Calls per node may grow by this factor from few nodes to many: rounds end a little later."""

LEAST = 20_000
"""Calls below which nothing is said of their growth."""


def calls_of(step: Callable[[], object]) -> int:
    """How many function calls a step makes, in Python and out of it."""
    profile = cProfile.Profile()
    profile.runcall(step)
    return sum(entry.callcount for entry in profile.getstats())


def work(kind: str, nodes: int) -> dict[str, int]:
    """Calls by step of the way through import and all exact passes."""
    found: dict[str, int] = {}
    model = KINDS[kind](nodes)
    held: list[Program] = []
    found["import"] = calls_of(lambda: held.append(Program.from_onnx(model)))
    [program] = held
    found["clone"] = calls_of(program.clone)
    found["verify"] = calls_of(program.verify)
    backend = registry().backend("onnxruntime")
    context = make_context(
        program, capabilities=backend.capabilities(TARGET), precisions=frozenset({"fp32"}),
        calibration=[], holdout=[], ops=registry().ops,
    )  # fmt: skip
    session = Session(
        program, backend, TARGET, registry().cost_model("roofline"), PROFILE, context,
        random_batch(program.inputs),
    )  # fmt: skip
    for pass_ in resolve(None, registry()):
        if pass_.stage in (Stage.CLEAN, Stage.FUSE):
            found[pass_.name] = calls_of(
                lambda p=pass_: held.append(session.apply_exact(p, held[-1]))
            )
    found["rewrites"] = sum(row.outcome == "taken" for row in session.ledger)
    return found


@pytest.mark.parametrize("kind", list(KINDS))
def test_work_is_linear_in_nodes(kind: str) -> None:
    work(kind, 20)  # tables are made at their first use
    few, many = work(kind, FEW), work(kind, MANY)
    grown = {step: many[step] / few[step] / (MANY / FEW) for step in few if many[step] > LEAST}
    assert not {step: factor for step, factor in grown.items() if factor > ALLOWED}, grown
    assert {"import", "verify", "clone", "simplify"} <= set(grown)


def test_a_large_weight_that_is_made_anew_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spilling, "SPILL_ABOVE_BYTES", 64)
    large = np.arange(32, dtype=np.float32).reshape(4, 8).T
    mapped = spilling.spilled(large)
    assert not mapped.flags.writeable
    assert not mapped.flags.owndata
    np.testing.assert_array_equal(mapped, large)
    small = large[:2, :2]
    assert spilling.spilled(small) is small


def test_where_there_is_no_room_a_weight_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> object:
        raise OSError("no space left on device")

    monkeypatch.setattr(spilling, "SPILL_ABOVE_BYTES", 64)
    monkeypatch.setattr(spilling.tempfile, "TemporaryFile", full)
    large = np.zeros(100, np.float32)
    assert spilling.spilled(large) is large


def anonymous_mb() -> float:
    """RssAnon: the memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(text for text in lines if text.startswith("RssAnon")).split()[1]) / 1000


def measure(directory: Path) -> None:
    """Print how far RssAnon rises while a decoder is imported and rewritten, and what became."""
    shape = Shape(layers=2, vocabulary=8000, tokens=8)
    path = write(directory, shape)
    data = path.with_suffix(".data")
    assert used_bytes(data) < 0.1 * data.stat().st_size
    start, over, peaks = anonymous_mb(), threading.Event(), [0.0]

    def sample() -> None:
        while not over.wait(0.002):
            peaks.append(anonymous_mb())

    watcher = threading.Thread(target=sample)
    watcher.start()
    before = Program.from_onnx(path)
    tokens = np.arange(shape.tokens)[None]
    after, undone = apply_exact_passes(before, {"tokens": tokens})
    over.set()
    watcher.join()
    _, _, changed = after.changes_since(before)
    remade = sum(after.weights()[n].nbytes for n in changed)
    print(before.weight_bytes, remade, int(max(peaks) - start), len(before.graph),
          len(after.graph), len(undone))  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_mapped_weights(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from tests.test_scale import measure; "
    code += "measure(Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    weights, remade, risen_mb, before, after, undone = map(int, done.stdout.split())
    assert weights > 1.8e9
    assert remade > 4e8
    assert risen_mb < 500
    assert after < before
    assert undone == 0
