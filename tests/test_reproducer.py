"""A pass that breaks its contract leaves behind what shows it again: the smallest program, and one
command, in a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from optcompiler import Registry, reproducer
from optcompiler.cli import main
from optcompiler.compiler import compile as compile_model
from optcompiler.errors import (
    INVALID,
    NUMBERS,
    OVERTIME,
    RAISED,
    InputError,
    PluginError,
    QuarantineWarning,
)
from optcompiler.program import Program
from optcompiler.replaying import replay
from optcompiler.rewriting import Candidate
from optcompiler.session import Fault
from tests.misbehaving import OWNER, Entry, installed, offering, pass_of, rewriting
from tests.support import op_types
from tests.toy import ToyBackend

ROOT = Path(__file__).parent.parent


def net(odd: str = "Tanh") -> Program:
    """A residual chain of thirty nodes; number 17 is `odd`, and number 18 a Sigmoid."""
    steps = ["[first] h0 = MatMul (x, w)"]
    for i in range(30):
        operator = {17: odd, 18: "Sigmoid"}.get(i, "Softplus" if i % 2 else "Relu")
        steps.append(f"[n{i}] h{i + 1} = {operator} (h{i})")
    text = (
        '<ir_version: 10, opset_import: ["" : 20]>\nnet (float[2,4] x) => (float[2,4] y)\n'
        "<float[4,4] w = {1,2,3,4,5,6,7,8,9,1,1,1,2,3,4,1}> {\n"
        + "\n".join(steps)
        + "\n[last] y = Add (h30, x)\n}"
    )
    return Program.from_text(text)


@pytest.fixture(autouse=True)
def _nominal_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optcompiler.device.measure", lambda *_: None)


@pytest.fixture
def having(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Registry]:
    """A registry of the toy backend and of passes of the distribution `OWNER`."""

    def made(*passes: type[Any]) -> Registry:
        toy = Entry("a", lambda: offering(backends=[ToyBackend()]), "toy")
        return installed(monkeypatch, toy, Entry("evil", lambda: offering(passes=passes)))

    return made


@pytest.fixture
def failing(having: Any, tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Compile with a pass that must be left out: its reproducer and what that records."""

    def run(evil: type[Any], **options: Any) -> tuple[Path, dict[str, Any]]:
        with pytest.warns(QuarantineWarning, match=OWNER) as caught:
            got = compile_model(
                options.pop("program", None) or net(), target="toy", registry=having(evil),
                reproducers=tmp_path / "kept", **options,
            )  # fmt: skip
        fault = next(w.message.fault for w in caught if isinstance(w.message, QuarantineWarning))
        assert isinstance(fault, Fault)
        assert fault.reproducer is not None
        assert fault.reproducer.parent == tmp_path / "kept"
        (row,) = (r for r in got.ledger if r.outcome == "rolled back")
        assert fault.reproducer.name in row.reason
        record = json.loads((fault.reproducer / "reproducer.json").read_text())
        again = replay(fault.reproducer, having(evil))
        assert again.fault is not None
        assert (again.fault.kind, again.owner) == (record["kind"], OWNER)
        return fault.reproducer, record

    return run


def negate_tanh(program: Program) -> None:
    for node in program.graph:
        if node.op_type == "Tanh":
            node.op_type = "Neg"


def trip_over_a_pair(program: Program) -> None:
    for node in program.graph:
        after = [reader.op_type for v in node.outputs for reader, _ in v.uses()]
        if node.op_type == "Tanh" and "Sigmoid" in after:
            raise IndexError("a pair")


def nonsense_tanh(program: Program) -> None:
    for node in program.graph:
        if node.op_type == "Tanh":
            node.op_type = "Nonsense"


def stare_at_tanh(program: Program) -> None:
    while "Tanh" in op_types(program):
        pass


@pytest.mark.parametrize(
    ("rewrite", "kind", "least"),
    [
        (negate_tanh, NUMBERS, ["Tanh"]),
        (nonsense_tanh, INVALID, ["Tanh"]),
        (trip_over_a_pair, RAISED, ["Tanh", "Sigmoid"]),
    ],
)
def test_the_program_is_the_smallest(failing: Any, rewrite: Any, kind: str, least: Any) -> None:
    place, record = failing(rewriting(rewrite))
    assert op_types(Program.from_onnx(place / "program.onnx")) == least
    assert (record["kind"], record["owner"], record["pass"]) == (kind, OWNER, "evil")
    assert record["nodes"] == {"before": 32, "after": len(least)}
    assert record["shown_again"]
    assert record["tests"] < 60
    assert f"optcompiler replay {place}" in (place / "README.txt").read_text()


def test_a_pass_that_does_not_end(failing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproducer, "PATIENCE_S", 0.1)
    place, record = failing(rewriting(stare_at_tanh), time_limit_s=0.3)
    assert record["kind"] == OVERTIME
    assert record["time_limit_s"] == 0.1
    assert op_types(Program.from_onnx(place / "program.onnx")) == ["Tanh"]


def test_the_values_that_went_in_are_kept(failing: Any) -> None:
    """Clipping at 1 shows only on what node 17 gets in the whole program, which is large."""

    def clip(program: Program) -> None:
        for node in program.graph:
            if node.op_type == "Identity":
                node.op_type = "Tanh"

    place, _ = failing(rewriting(clip), program=net("Identity"))
    with np.load(place / "inputs.npz") as stored:
        (values,) = (stored[name] for name in stored.files)
    assert values.max() > 5


def test_the_candidate_is_kept(failing: Any) -> None:
    def propose(program: Program, context: Any) -> Iterator[Candidate]:
        for node in program.graph:
            yield Candidate(str(node.name), "look", lambda p: None, True, (str(node.name),))
            if node.op_type == "Tanh":
                yield Candidate(str(node.name), "spoil", negate_tanh, True, (str(node.name),))

    _, record = failing(pass_of(propose))
    assert (record["site"], record["choice"]) == ("n17", "spoil")


def test_what_does_not_show_again_is_kept_whole(having: Any, tmp_path: Path) -> None:
    calls: list[int] = []

    def once(program: Program) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("the first time")

    with pytest.warns(QuarantineWarning):
        compile_model(net(), target="toy", registry=having(rewriting(once)), reproducers=tmp_path)
    (place,) = tmp_path.iterdir()
    assert json.loads((place / "reproducer.json").read_text())["shown_again"] is False
    assert "did not show again" in (place / "README.txt").read_text()
    assert len(Program.from_onnx(place / "program.onnx").graph) == 32
    assert replay(place, having(rewriting(once))).fault is None


def test_large_weights_are_left_out(failing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def trip(program: Program) -> None:
        if "w" in program.graph.initializers or program.graph.inputs[-1].name == "w":
            raise RuntimeError("w")

    monkeypatch.setattr(reproducer, "MOST_BYTES", 32)
    place, record = failing(rewriting(trip))
    assert record["weights_left_out"]
    assert Program.from_onnx(place / "program.onnx").weights() == {}


def test_nowhere_to_write_costs_no_compile(having: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(QuarantineWarning, match="No reproducer could be written"):
        compile_model(
            net(), target="toy", registry=having(rewriting(negate_tanh)),
            reproducers=tmp_path / "file" / "below",
        )  # fmt: skip


# -- replaying --------------------------------------------------------------------------------


def command(registry: Registry, *arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], obj=lambda: registry)


def test_replay_tells_by_its_exit_code(failing: Any, having: Any) -> None:
    place, record = failing(rewriting(negate_tanh))
    fails = command(having(rewriting(negate_tanh)), "replay", place)
    assert fails.exit_code == 1
    assert "outputs differ" in fails.stdout
    mended = command(having(rewriting(lambda program: None)), "replay", place, "--json")
    assert mended.exit_code == 0
    told = json.loads(mended.stdout)
    assert (told["fails"], told["now"], told["owner"]) == (False, None, OWNER)
    assert told["recorded"]["reason"] == record["reason"]
    absent = command(having(), "replay", place)
    assert absent.exit_code == 5
    assert f"pass 'evil' of {OWNER} is not installed" in absent.stderr


def test_replay_by_name_alone(having: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPTCOMPILER_CACHE", str(tmp_path))
    evil = rewriting(negate_tanh)
    with pytest.warns(QuarantineWarning):
        compile_model(net(), target="toy", registry=having(evil))
    (place,) = (tmp_path / "reproducers").iterdir()
    assert command(having(evil), "replay", place.name).exit_code == 1


def test_what_is_no_reproducer(having: Any, tmp_path: Path, failing: Any) -> None:
    with pytest.raises(InputError, match="is no reproducer"):
        replay(tmp_path / "nothing", having())
    place, record = failing(rewriting(negate_tanh))
    for field, value in {"options": 3, "seed": "many", "format": 99, "time_limit_s": []}.items():
        (place / "reproducer.json").write_text(json.dumps(record | {field: value}))
        with pytest.raises(InputError, match="reproducer"):
            replay(place, having(rewriting(negate_tanh)))
    (place / "reproducer.json").write_text(json.dumps(record | {"options": {"speed": 3}}))
    with pytest.raises(InputError, match="no option 'speed'"):
        replay(place, having(rewriting(negate_tanh)))
    (place / "reproducer.json").write_text("{")
    with pytest.raises(InputError, match="no JSON"):
        replay(place, having())


def test_a_fault_can_stop_the_compile(having: Any, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=f"{OWNER}.*Reproduce it with: optcompiler replay"):
        compile_model(
            net(), target="toy", registry=having(rewriting(negate_tanh)), on_fault="stop",
            reproducers=tmp_path,
        )  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 1


# -- a distribution that is installed, in processes of their own -------------------------------

MODULE = """
from dataclasses import dataclass
from typing import ClassVar

from optcompiler import Candidate, Pass, Stage, hookimpl
from tests.test_reproducer import negate_tanh
from tests.toy import ToyBackend


@dataclass(frozen=True)
class Negate(Pass):
    name: ClassVar[str] = "negate"
    stage: ClassVar[Stage] = Stage.CLEAN

    strength: int = 1

    def propose(self, program, context):
        nodes = tuple(n.name for n in program.graph if n.op_type == "Tanh")
        yield Candidate("program", "negate", negate_tanh, True, nodes)


@hookimpl
def optcompiler_passes():
    return [Negate]


@hookimpl
def optcompiler_backends():
    return [ToyBackend()]
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Environment variables under which Python finds an installed distribution with `MODULE`."""
    site = tmp_path / "site"
    about = site / "optcompiler_negate-1.5.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: optcompiler-negate\nVersion: 1.5\n"
    )
    (about / "entry_points.txt").write_text("[optcompiler]\nnegate = optcompiler_negate\n")
    (site / "optcompiler_negate.py").write_text(MODULE)
    return os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}


def test_an_installed_pass_in_processes_of_their_own(
    environment: dict[str, str], tmp_path: Path
) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *words], env=environment, cwd=tmp_path, capture_output=True,
            text=True, check=False,
        )  # fmt: skip

    net().save(tmp_path / "net.onnx")
    done = run(
        "optcompiler", "compile", "net.onnx", "-o", "out", "--target", "toy", "--json",
        "--pass", "negate:strength=2", "--reproducers", "my faults",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("optcompiler: going on without pass negate of optcompiler-negate 1.5: ")
    data = json.loads(done.stdout)
    (fault,) = data["quarantined"]
    assert (fault["pass_name"], fault["owner"]) == ("negate", "optcompiler-negate 1.5")
    assert data["ledger"]["rolled back"] == 1
    place = Path(fault["reproducer"])
    assert op_types(Program.from_onnx(tmp_path / place / "program.onnx")) == ["Tanh"]
    assert json.loads((tmp_path / place / "reproducer.json").read_text())["options"] == {
        "strength": 2
    }
    words = shlex.split(line.partition("Reproduce it with: ")[2])
    assert words == ["optcompiler", "replay", str(place)]
    again = run(*words)
    assert again.returncode == 1
    assert "of optcompiler-negate 1.5: negate[program=negate]: outputs differ" in again.stdout
    assert again.stderr == ""
    explained = CliRunner().invoke(main, ["explain", str(tmp_path / "out"), "n17"])
    assert explained.exit_code == 0
    assert "rolled back" in explained.stdout
    assert place.name in explained.stdout
