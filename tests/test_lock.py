"""Locks: a locked compile measures nothing and makes the same bytes, or says what does not fit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from optcompiler import Budget, Program, device, finish
from optcompiler.choices import Choices, Consulted
from optcompiler.compiler import compile as compile_model
from optcompiler.errors import (
    InputError,
    PluginError,
    QuarantineWarning,
    VerificationError,
)
from optcompiler.ledger import QUARANTINED, REVERTED
from optcompiler.lock import Lock, differences, read_lock
from optcompiler.rewriting import Candidate, Decline, Pass, PassContext, Stage
from optcompiler.target import Target
from optcompiler_passes._clock import Clock
from tests.test_artifact import contents_of
from tests.toy import Harden, ToyBackend, registry, sigmoid_net

SCALES = (8.0, 0.05, 1.0)
SLEEPY = {"Sigmoid": 300.0, "HardSigmoid": 2000.0, "Tanh": 300.0}
"""Hardening is predicted to be quicker and measures slower."""


def batches(seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((4, 8)).astype(np.float32)} for _ in range(4)]


def compiled(
    *, backend: ToyBackend | None = None, net: Program | None = None, seed: int = 1,
    extra: tuple[type[Pass], ...] = (), **options: Any,
) -> Any:  # fmt: skip
    options = {"target": Target("toy", threads=1), "budget": Budget(max_damage=1.0)} | options
    return compile_model(
        net or sigmoid_net(SCALES), registry=registry(backend, Harden, *extra),
        calibration=batches(seed), damage="nmse", **options,
    )  # fmt: skip


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(*args: Any, **options: Any) -> Any:
        raise AssertionError("measured")

    for module, name in ((device, "measure"), (device, "interleaved_us"),
                         (finish, "interleaved_us"), (device, "remember")):  # fmt: skip
        monkeypatch.setattr(module, name, clock)


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that are not measured, so that what is timed is the artifact alone."""
    nominal = ToyBackend().nominal_profile(Target("toy"))
    monkeypatch.setattr(device, "profile_for", lambda *args, **options: nominal)


def test_a_locked_compile_is_the_same_directory(quick_probes: None, request: Any):
    backend = ToyBackend(timed=True, delays_us=SLEEPY)
    first = compiled(backend=backend)
    assert REVERTED in {row.outcome for row in first.ledger}
    assert first.measurements["measured_us"] > 0
    request.getfixturevalue("no_clock")
    for lock in (first.directory, first.directory / "lock.json"):
        second = compiled(backend=backend, locked=lock)
        assert contents_of(second.directory) == contents_of(first.directory)


def test_what_differs_is_named(quick_probes: None):
    made = compiled()
    lock = made.directory
    cases: list[tuple[dict[str, Any], str]] = [
        ({"net": sigmoid_net((8.0, 0.05, 2.0))}, "model is "),
        ({"seed": 2}, "data is "),
        ({"precision": "fp32"}, "options precision is fp32, locked is auto"),
        ({"budget": Budget(max_damage=0.5)}, "options budget max_damage is 0.5, locked is 1.0"),
        ({"target": "toy:threads=2"}, "target is toy:threads=2, locked is toy:threads=1"),
        ({"passes": []}, "options passes is .*, locked is harden"),
        ({"backend": ToyBackend(delays_us={"Mul": 1.0})}, "version toy is "),
    ]
    for options, told in cases:
        with pytest.raises(InputError, match=f"the lock does not fit: .*{told}"):
            compiled(locked=lock, **options)
    same = compiled(locked=lock, target="toy")
    assert str(same.target) == "toy:threads=1"


def test_what_is_no_lock_is_refused(tmp_path: Path):
    path = tmp_path / "lock.json"

    def refused(text: str | None, told: str) -> None:
        if text is not None:
            path.write_text(text)
        with pytest.raises(InputError, match=told):
            read_lock(path)

    refused(None, "no such file.*; give an artifact, or its lock.json")
    refused("{", "; give an artifact, or its lock.json")
    refused("[" * 100_000, "; give an artifact, or its lock.json")
    refused("[]", "no lock of an artifact")
    refused("{}", "no lock of an artifact")
    made_from = {"model": "1", "data": "2", "target": "toy", "options": {"timing": True}}
    arithmetic = {"threads": 1, "instructions": "VSX"}
    gives = {"program": "3", "code": "4"}
    whole = Lock(made_from, {}, arithmetic, {}, {}, gives).to_json()
    refused(json.dumps(Lock({}, {}, arithmetic, {}, {}, gives).to_json()), "made_from has no")
    many = Lock(made_from, {}, {**arithmetic, "threads": 0}, {}, {}, gives)
    refused(json.dumps(many.to_json()), "0 threads")
    refused(json.dumps(whole | {"format_version": 9}), "lock format 9")
    refused(json.dumps(whole | {"measured": {"timed": True}}), "not as it was written")
    path.write_text(json.dumps(whole))
    assert read_lock(path).to_json() == whole
    with pytest.raises(InputError, match="not an artifact"):
        read_lock(tmp_path)


def test_an_altered_lock_inside_an_artifact_is_refused():
    made = compiled()
    path = made.directory / "lock.json"
    path.write_text(path.read_text().replace('"nmse"', '"kl"'))
    with pytest.raises(InputError, match=r"lock\.json is not the file"):
        compiled(locked=made.directory)


@dataclass
class Chooser(ToyBackend):
    """Measures which of two variants it is to write."""

    winner: str = "a"
    asked: int = 0
    noise: str = ""

    def lower(
        self, program: Program, target: Target, directory: Path, choices: Choices | None = None
    ) -> Mapping[str, Any]:
        super().lower(program, target, directory)

        def measure() -> str:
            self.asked += 1
            return self.winner

        chosen = choices.choose("toy: variant", measure, "nominal") if choices else "nominal"
        (directory / "variant.txt").write_text(chosen + self.noise)
        return {}


def test_what_a_backend_measured_is_replayed(quick_probes: None):
    first = compiled(backend=Chooser(winner="b"))
    assert (first.directory / "code" / "variant.txt").read_text() == "b"
    again = Chooser(winner="a")
    second = compiled(backend=again, locked=first.directory)
    assert contents_of(second.directory) == contents_of(first.directory)
    assert again.asked == 0
    unlocked = compiled(backend=again)
    assert (unlocked.directory / "code" / "variant.txt").read_text() == "a"
    assert again.asked == 1
    untimed = compiled(backend=again, timing=False)
    assert (untimed.directory / "code" / "variant.txt").read_text() == "nominal"


def test_other_bytes_than_locked_are_no_success(quick_probes: None):
    first = compiled(backend=Chooser())
    with pytest.raises(VerificationError, match="the code made of it is not the same bytes"):
        compiled(backend=Chooser(noise="!"), locked=first.directory)


def test_another_program_than_locked_names_the_arithmetic():
    lock = Lock({}, {}, {"instructions": "VSX"}, {}, {}, {"program": "1", "code": "2"})
    with pytest.raises(VerificationError, match="computed with VSX instructions, here with "):
        lock.require_same({"program": "3", "code": "4"})


def test_without_timing_nothing_is_timed(no_clock: None):
    backend = ToyBackend(timed=True, delays_us=SLEEPY)
    first, second = compiled(backend=backend, timing=False), compiled(backend=backend, timing=False)
    assert contents_of(first.directory) == contents_of(second.directory)
    assert first.measurements["measured_us"] is None
    assert first.manifest["options"]["timing"] is False
    locked = compiled(backend=backend, locked=first.directory)
    assert contents_of(locked.directory) == contents_of(first.directory)
    for limit in (Budget(search_minutes=1), Budget(max_latency_ms=1)):
        with pytest.raises(InputError, match="=1 needs a clock"):
            compiled(timing=False, budget=limit)


@dataclass(frozen=True)
class Slow(Pass):
    """Does not end, as long as it is told not to."""

    name: ClassVar[str] = "slow"
    stage: ClassVar[Stage] = Stage.CLEAN
    time_limit_s: ClassVar[float] = 0.05
    waits: ClassVar[bool] = True

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate | Decline]:
        while self.waits:
            time.sleep(0.01)
        yield Decline("program", "nothing to do")


def test_a_pass_that_ran_out_of_time_is_left_out_again(
    monkeypatch: pytest.MonkeyPatch, quick_probes: None
):
    with pytest.warns(QuarantineWarning):
        first = compiled(extra=(Slow,))
    assert QUARANTINED in {row.outcome for row in first.ledger}
    with pytest.raises(PluginError, match="slow: propose"):
        compiled(extra=(Slow,), timing=False)
    monkeypatch.setattr(Slow, "waits", False)
    with pytest.warns(QuarantineWarning):
        second = compiled(extra=(Slow,), locked=first.directory)
    assert contents_of(second.directory) == contents_of(first.directory)
    with pytest.raises(PluginError, match="stopped at pass slow"):
        compiled(extra=(Slow,), locked=first.directory, on_fault="stop")


def test_a_search_that_ran_out_of_time_stops_at_the_same_plan(quick_probes: None):
    budget = Budget(max_damage=1e-9, search_minutes=0)
    first = compiled(budget=budget)
    assert read_lock(first.directory).measured["search time is over #1"] is True
    assert len([k for k in read_lock(first.directory).measured if k.startswith("damage #")]) == 2
    second = compiled(budget=budget, locked=first.directory)
    assert contents_of(second.directory) == contents_of(first.directory)


def test_training_that_ran_out_of_time_plans_the_same_steps():
    choices = Choices()
    clock = Clock(100, 1e-9, choices)
    for step in range(4):
        clock.tick(step)
    clock.stop()
    assert clock.steps == 4
    again = Clock(100, 1e9, Choices(json.loads(json.dumps(choices.values()))))
    planned = []
    for step in range(4):
        again.tick(step)
        planned.append(again.steps)
    assert planned == [100, 100, 100, 4]
    untimed = Clock(100, 1e-9, Choices(timed=False))
    for step in range(4):
        untimed.tick(step)
    assert untimed.steps == 100


def test_choices_answer_once():
    choices = Choices()
    times = iter([1.0, 2.0])
    assert [choices.choose("t", lambda: next(times), None) for _ in range(2)] == [1.0, 1.0]
    assert choices.number("d", lambda: float("inf")) == float("inf")
    assert choices.numbered("d") == "d #2"
    locked = Choices(choices.values())
    assert locked.number("d", lambda: 0.0) == float("inf")
    with pytest.raises(InputError, match="says nothing of 'u'"):
        locked.choose("u", lambda: 1, 1)


def test_the_part_of_a_table_that_mattered():
    table = Consulted({"b": 2.0, "a": 1.0, "c": 3.0})
    assert table.get("b") == 2.0
    assert table.get("z") is None
    assert table.seen() == {"b": 2.0}
    assert dict(table) == {"b": 2.0, "a": 1.0, "c": 3.0}
    assert list(table.seen()) == ["a", "b", "c"]


def test_differences_go_by_name():
    one = {"a": 1, "list": [{"name": "p", "x": 1}], "gone": 2}
    two = {"a": 1, "list": [{"name": "p", "x": 2}], "new": 3}
    assert list(differences(one, two)) == [
        ("gone", 2, None), ("list p x", 1, 2), ("new", None, 3),
    ]  # fmt: skip


def test_a_target_is_completed_by_the_locked_one():
    locked = Target("toy", threads=3, isa="x")
    assert str(Target("toy").completed(locked)) == "toy:threads=3,isa=x"
    assert str(Target("toy", threads=1, isa="y").completed(locked)) == "toy:threads=1,isa=y"
    assert str(Target("other", threads=1).completed(locked)) == "other:threads=1"
