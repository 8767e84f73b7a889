"""One compile's state: exact candidates taken and held to their word, prices, runs, quarantine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from optcompiler.backend import Runner
from optcompiler.choices import Choices
from optcompiler.damage import Judge
from optcompiler.errors import (
    INVALID,
    NUMBERS,
    RAISED,
    Declined,
    InputError,
    PassFault,
    PluginError,
    QuarantineWarning,
    UnsupportedOperatorError,
)
from optcompiler.ledger import DECLINED, QUARANTINED, REJECTED, ROLLED_BACK, TAKEN, Row
from optcompiler.program import Program
from optcompiler.rewriting import Candidate, Decline, Pass, Patch, Stage
from optcompiler.session import Fault, Refusal, Session, judge_of
from optcompiler.target import Target
from tests.paper import (
    HEAD,
    PaperBackend,
    PaperCosts,
    chain,
    operators,
    paper_pass,
    paper_session,
    side_by_side,
    swap,
)

CHECK = {"x": np.array([0.5, 2.0], np.float32)}
"""Positive: Relu, Abs and Identity are the same on it."""

COSTS = PaperCosts(
    {"Relu": 100, "Abs": 40, "Identity": 1, "Neg": 10, "Exp": 300, "Sigmoid": 101, "HardSwish": 7}
)


def session_of(program: Program, **options: Any) -> Session:
    options = {"costs": COSTS, "check": CHECK} | options
    return paper_session(program, options.pop("costs"), **options)


def exact(site: str, choice: str, **options: Any) -> Candidate:
    return swap(site, choice, exact=True, **options)


def clean(*offers: Candidate | Decline, stage: Stage = Stage.CLEAN, name: str = "clean") -> Pass:
    return paper_pass(offers, name, stage)


def outcomes(session: Session) -> list[tuple[str, str, str]]:
    return [(r.site, r.outcome, r.reason) for r in session.ledger]


# -- exact candidates -------------------------------------------------------------------------


def test_exact_candidates_are_taken_one_after_another() -> None:
    program = side_by_side(a="Relu", b="Relu", c="Relu")
    session = session_of(program)
    first, second = exact("a", "Abs"), exact("b", "Identity", note="it is positive")
    pass_ = clean(first, second, Decline("c", "too good", ("c",)))
    after = session.apply_exact(pass_, program)
    assert operators(after) == {"a": "Abs", "b": "Identity", "c": "Relu"}
    assert operators(program) == {"a": "Relu", "b": "Relu", "c": "Relu"}
    assert session.ledger[0].choice == "-"
    assert outcomes(session) == [
        ("c", DECLINED, "too good"),
        ("a", TAKEN, "exact"),
        ("b", TAKEN, "it is positive"),
    ]
    assert [r.saving_us for r in session.ledger] == [None, 60, 99]
    assert [r.pass_name for r in session.ledger] == ["clean"] * 3
    assert session.history == [(pass_, first), (pass_, second)]


def test_rows_repeat_what_the_candidate_says_of_itself() -> None:
    program = side_by_side(a="Relu")
    session = session_of(program)
    session.apply_exact(clean(exact("a", "Abs", nodes=("a", "z"), details={"bits": 8})), program)
    (row,) = session.ledger
    assert row == Row("clean", "a", "Abs", TAKEN, "exact", exact=True, saving_us=60,
                      nodes=("a", "z"), details={"bits": 8})  # fmt: skip


def test_nothing_is_written_down_when_nothing_is_to_be() -> None:
    program = side_by_side(a="Relu", b="Relu")
    session = session_of(program)
    after = session.apply_exact(clean(exact("a", "Abs"), Decline("b", "no")), program, record=False)
    assert operators(after) == {"a": "Abs", "b": "Relu"}
    assert len(session.ledger) == 0
    assert session.history == []


def test_a_pass_without_candidates_leaves_the_program() -> None:
    program = side_by_side(a="Relu")
    session = session_of(program)
    assert session.apply_exact(clean(), program) is program


def test_candidates_that_decline_or_change_nothing_are_rows() -> None:
    def declines(program: Program) -> None:
        raise Declined("on second thoughts")

    program = side_by_side(a="Relu", b="Relu", c="Relu")
    session = session_of(program)
    offers = [
        Candidate("a", "x", declines, True),
        Candidate("b", "x", lambda p: None, True, ("b",)),
        exact("c", "Abs"),
    ]
    after = session.apply_exact(clean(*offers), program)
    assert operators(after) == {"a": "Relu", "b": "Relu", "c": "Abs"}
    assert outcomes(session) == [
        ("a", DECLINED, "on second thoughts"),
        ("b", DECLINED, "it changed nothing"),
        ("c", TAKEN, "exact"),
    ]


@pytest.mark.parametrize(
    ("prices", "stage", "taken"),
    [
        ({"Relu": 100, "Abs": 101}, Stage.FUSE, True),
        ({"Relu": 100, "Abs": 101.5}, Stage.FUSE, False),
        ({"Relu": 100, "Abs": 101.5}, Stage.CLEAN, True),
        ({"Relu": 100, "Abs": 50}, Stage.FUSE, True),
    ],
)
def test_fusions_predicted_slower_are_rejected_and_clean_up_is_not(
    prices: dict[str, float], stage: Stage, taken: bool
) -> None:
    program = side_by_side(a="Relu")
    session = session_of(program, costs=PaperCosts(prices))
    after = session.apply_exact(clean(exact("a", "Abs"), stage=stage), program)
    assert operators(after)["a"] == ("Abs" if taken else "Relu")
    (row,) = session.ledger
    assert row.saving_us == prices["Relu"] - prices["Abs"]
    assert row.outcome == (TAKEN if taken else REJECTED)
    if not taken:
        assert row.reason == "predicted 1.5 µs slower"
        assert session.history == []


def test_what_the_backend_cannot_lower_has_no_saving_and_is_taken() -> None:
    program = side_by_side(a="Relu", b="Relu")
    session = session_of(program, backend=PaperBackend(lacks=frozenset({"Abs"})))
    session.apply_exact(clean(exact("a", "Abs"), exact("b", "Identity"), stage=Stage.FUSE), program)
    assert [(r.outcome, r.saving_us) for r in session.ledger] == [(TAKEN, None), (TAKEN, None)]


def test_a_candidate_that_computes_something_else_is_named() -> None:
    program = side_by_side(a="Relu", b="Relu", c="Relu")
    session = session_of(program)
    good, wrong = exact("a", "Abs"), exact("b", "Exp", rtol=1e-2)
    pass_ = clean(good, wrong, exact("c", "Abs"))
    with pytest.raises(PassFault, match=r"clean\[b=Exp\]: outputs differ by ") as caught:
        session.apply_exact(pass_, program)
    fault = caught.value
    assert (fault.kind, fault.pass_, fault.candidate) == (NUMBERS, pass_, wrong)
    assert str(fault).endswith("(relative), more than the 1e-02 that it declares.")
    assert fault.program is not None
    assert operators(fault.program) == {"a": "Abs", "b": "Relu", "c": "Relu"}


def test_the_loosest_candidate_does_not_excuse_a_stricter_one() -> None:
    """Together they are judged by 0.1; off by more, the strict one is at fault, not the loose."""
    program = side_by_side(a="Relu", b="Relu")
    session = session_of(program)
    loose, wrong = exact("a", "Abs", rtol=0.1), exact("b", "Exp", rtol=1e-6)
    with pytest.raises(PassFault) as caught:
        session.apply_exact(clean(loose, wrong), program)
    assert caught.value.candidate == wrong


def test_rounding_that_adds_up_is_nobodys_fault() -> None:
    """Each step doubles a difference of 1e-3: within its own 1e-3, together not."""

    def scaled(program: Program) -> None:
        value = program.value("k")
        assert value is not None
        assert value.const_value is not None
        program.set_weight(value, (value.const_value.numpy() * 1.0009).astype(np.float32))

    program = Program.from_text(
        '<ir_version: 10, opset_import: ["" : 20]>\n'
        "net (float[2] x) => (float[2] y) <float k = {2.0}> { [a] y = Mul (x, k) }"
    )
    session = session_of(program, costs=PaperCosts({"Mul": 1}))
    offers = [Candidate(s, "scale", scaled, True, rtol=1e-3) for s in "pqr"]
    after = session.apply_exact(clean(*offers), program)
    value = after.value("k")
    assert value is not None
    assert value.const_value is not None
    assert float(value.const_value.numpy()) == pytest.approx(2 * 1.0009**3)
    assert [r.outcome for r in session.ledger] == [TAKEN] * 3


def test_lossy_candidates_of_a_clean_stage_are_refused() -> None:
    program = side_by_side(a="Relu")
    session = session_of(program)
    for stage in (Stage.CLEAN, Stage.FUSE):
        with pytest.raises(PassFault, match=f"not exact, which stage {stage.name} has no room"):
            session.apply_exact(clean(swap("a", "Abs"), stage=stage), program)


# -- differences ------------------------------------------------------------------------------


def test_difference_is_the_largest_relative_to_the_output() -> None:
    before, after = side_by_side(a="Relu"), side_by_side(a="Exp")
    session = session_of(before)
    error, words = session.difference(exact("a", "Exp", rtol=0.05), before, after)
    expected = float(np.max(np.exp(CHECK["x"]) - CHECK["x"])) / 2.0
    assert error == pytest.approx(expected)
    assert words == (
        f"outputs differ by {expected:.1e} (relative), more than the 5e-02 that it declares."
    )


def test_typical_candidates_are_judged_by_the_root_mean_square() -> None:
    before, after = side_by_side(a="Relu"), side_by_side(a="Exp")
    session = session_of(before)
    error, _ = session.difference(exact("a", "Exp", typical=True), before, after)
    x = CHECK["x"]
    rms = float(np.sqrt(np.mean((np.exp(x) - x) ** 2) / np.mean(x**2)))
    assert error == pytest.approx(rms)


def test_typical_candidates_may_differ_when_no_further_from_the_teacher() -> None:
    teacher = side_by_side(a="Exp")
    session = session_of(teacher)
    before, nearer = side_by_side(a="Neg"), side_by_side(a="Relu")
    typical = exact("a", "Relu", typical=True)
    assert session.difference(typical, before, nearer)[0] == 0.0
    assert session.difference(replace(typical, typical=False), before, nearer)[0] > 1
    assert session.difference(typical, nearer, before)[0] > 1


@pytest.mark.parametrize(("share", "passes"), [(1.05, True), (1.2, False)])
def test_a_tenth_further_from_the_teacher_is_let_pass(share: float, passes: bool) -> None:
    def scaled(k: float) -> Program:
        return Program.from_text(
            '<ir_version: 10, opset_import: ["" : 20]>\n'
            f"net (float[2] x) => (float[2] y) <float k = {{{k}}}> {{ [a] y = Mul (x, k) }}"
        )

    session = session_of(scaled(1.0))
    candidate = exact("a", "x", typical=True, rtol=0.0)
    error, _ = session.difference(candidate, scaled(2.0), scaled(1.0 + share))
    assert (error == 0.0) == passes


def test_what_cannot_be_run_is_infinitely_far() -> None:
    program = side_by_side(a="Relu")
    session = session_of(program)
    other = chain(a="Relu", b="Relu")
    other.graph.outputs.append(other.graph.inputs[0])
    error, words = session.difference(exact("a", "x"), program, other)
    assert error == float("inf")
    assert words == "cannot be run: ValueError: 2 outputs instead of 1"
    broken = side_by_side(a="Relu")
    broken.node("a").op_type = "Nonsense"  # type: ignore[union-attr]
    error, words = session.difference(exact("a", "x"), program, broken)
    assert error == float("inf")
    assert words.startswith("cannot be run: ")
    assert session.simulated


def test_outputs_of_the_last_program_are_kept() -> None:
    program, other = side_by_side(a="Relu"), side_by_side(a="Exp")
    session = session_of(program)
    first = session.outputs(program)
    assert session.outputs(program) is first
    assert session.outputs(other) is not first
    torch.testing.assert_close(session.outputs(other)[0][0], torch.exp(torch.tensor(CHECK["x"])))


# -- soundness --------------------------------------------------------------------------------


def patch_for(session: Session, pass_: Pass, candidate: Candidate, program: Program) -> Patch:
    patch = session.attempt(pass_, candidate, program)
    assert isinstance(patch, Patch)
    return patch


def test_soundness_of_exact_and_lossy_patches() -> None:
    program = side_by_side(a="Relu")
    session = session_of(program)
    pass_ = clean(stage=Stage.REDUCE)
    same, other, lossy = exact("a", "Abs"), exact("a", "Exp"), swap("a", "Exp")
    session.require_sound(pass_, same, patch_for(session, pass_, same, program))
    session.require_sound(pass_, lossy, patch_for(session, pass_, lossy, program))
    with pytest.raises(PassFault, match=r"clean\[a=Exp\]: outputs differ") as caught:
        session.require_sound(pass_, other, patch_for(session, pass_, other, program))
    fault = caught.value
    assert (fault.kind, fault.pass_, fault.program, fault.candidate) == (
        NUMBERS, pass_, program, other,
    )  # fmt: skip


def test_a_lossy_patch_must_run() -> None:
    program = side_by_side(a="Relu")
    session = session_of(program)
    pass_, lossy = clean(stage=Stage.REDUCE), swap("a", "Abs")
    patch = patch_for(session, pass_, lossy, program)
    patch.after.node("a").op_type = "Nonsense"  # type: ignore[union-attr]
    with pytest.raises(PassFault, match=r"clean\[a=Abs\]: what it made cannot be run: ") as caught:
        session.require_sound(pass_, lossy, patch)
    fault = caught.value
    assert (fault.kind, fault.pass_, fault.program, fault.candidate) == (
        INVALID, pass_, program, lossy,
    )  # fmt: skip


def test_damage_is_of_what_the_patch_made() -> None:
    program = side_by_side(a="Relu")
    session = session_of(program)
    pass_, lossy = clean(stage=Stage.REDUCE), swap("a", "Exp")
    judge = judge_of(session, [CHECK], "nmse")
    assert isinstance(judge, Judge)
    x = CHECK["x"].astype(np.float64)
    expected = np.mean((np.exp(x) - x) ** 2) / np.var(x)
    found = session.damage_of(judge, pass_, lossy, patch_for(session, pass_, lossy, program))
    assert found == pytest.approx(expected, rel=1e-4)
    assert judge.damage(program) == 0.0
    with pytest.raises(InputError, match="no damage measure 'votes'"):
        judge_of(session, [CHECK], "votes")


def test_attempts_end_in_a_patch_or_a_refusal() -> None:
    def declines(program: Program) -> None:
        raise Declined("on second thoughts")

    program = side_by_side(a="Relu")
    session = session_of(program)
    pass_ = clean()
    assert session.attempt(pass_, Candidate("a", "x", declines, True), program) == Refusal(
        DECLINED, "on second thoughts"
    )
    assert session.attempt(pass_, Candidate("a", "x", lambda p: None, True), program) == Refusal(
        DECLINED, "it changed nothing"
    )
    patch = patch_for(session, pass_, exact("a", "Abs"), program)
    assert patch.label == "clean[a=Abs]"
    assert patch.before is program
    node = patch.after.node("a")
    assert node is not None
    assert node.metadata_props["optcompiler.pass"] == "clean"


def test_patches_keep_the_teachers_interface() -> None:
    program = side_by_side(a="Relu")
    session = session_of(program)

    def rename(p: Program) -> None:
        p.graph.outputs[0].name = "z"

    with pytest.raises(PassFault, match="interface changed") as caught:
        session.attempt(clean(), Candidate("a", "x", rename, True), program)
    assert caught.value.kind == INVALID


@pytest.mark.parametrize(
    ("nodes", "limit", "expected"),
    [(0, None, 60.0), (1, None, 60.0), (1000, None, 60.0), (1001, None, 120.0), (2001, 2.0, 6.0)],
)
def test_time_grows_with_the_program(nodes: int, limit: float | None, expected: float) -> None:
    graph = ir.Graph([], [], nodes=[ir.node("Relu", []) for _ in range(nodes)])
    session = session_of(side_by_side(a="Relu"), time_limit_s=limit)
    assert session.seconds(clean(), Program(ir.Model(graph, ir_version=10))) == expected


def test_what_takes_too_long_is_a_fault() -> None:
    program = side_by_side(a="Relu")

    def hangs(p: Program) -> None:
        while True:
            pass

    session = session_of(program, time_limit_s=0.05)
    with pytest.raises(PassFault, match=r"had not ended after 0\.05 s"):
        session.attempt(clean(), Candidate("a", "x", hangs, True), program)


# -- prices -----------------------------------------------------------------------------------


def test_prices_are_remembered_for_a_few_programs() -> None:
    costs = PaperCosts({"Relu": 100})
    programs = [side_by_side(a="Relu", b="Relu") for _ in range(9)]
    session = session_of(programs[0], costs=costs)
    assert [session.price_us(p) for p in programs] == [200.0] * 9
    assert session.price_us(programs[-1]) == session.price_us(programs[1]) == 200
    assert len(costs.priced) == 9
    session.price_us(programs[0])
    assert len(costs.priced) == 10


def test_what_cannot_be_lowered_costs_infinitely_much() -> None:
    program, lacking = side_by_side(a="Relu"), side_by_side(a="Exp")
    session = session_of(program, backend=PaperBackend(lacks=frozenset({"Exp"})))
    assert session.price_us(lacking) == float("inf")
    assert session.saving_us(program, lacking) is None
    assert session.saving_us(lacking, program) is None
    assert session.saving_us(program, side_by_side(a="Abs")) == 60


def test_measured_kernels_change_prices() -> None:
    program = side_by_side(a="Relu", b="Abs")
    session = session_of(program)
    assert session.price_us(program) == 140
    session.learned({"Relu": 7.0})
    assert session.price_us(program) == 47
    session.learned({"Abs": 1.0})
    assert session.price_us(program) == 8


def test_kernels_are_of_the_program_with_the_targets_sizes() -> None:
    program = Program.from_text(f"{HEAD}\nn (float[N] x) => (float[N] y) {{ [a] y = Relu (x) }}")
    session = replace(session_of(program), target=Target("paper", threads=1, sizes={"N": 5}))
    assert session.bound(program).inputs[0].shape == (5,)
    (kernel,) = session.kernels(program)
    assert (kernel.name, kernel.kind) == ("a", "Relu")


# -- running by the backend -------------------------------------------------------------------


class Constant(Runner):
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        self.log.append("run")
        return [inputs["x"] + 1]

    def close(self) -> None:
        self.log.append("close")


@dataclass
class RunningBackend(PaperBackend):
    """Adds one; says what it was asked."""

    here: bool = True
    log: list[str] = field(default_factory=list)

    def runs_here(self, target: Target) -> bool:
        return self.here

    def lower(
        self, program: Program, target: Target, directory: Path, choices: Choices | None = None
    ) -> Mapping[str, Any]:
        assert directory.is_dir()
        self.log.append(f"lower for {target}")
        return {"made": str(directory)}

    def load(self, directory: Path, info: Mapping[str, Any], *, threads: int) -> Runner:
        assert info == {"made": str(directory)}
        self.log.append(f"load with {threads}")
        return Constant(self.log)


def unknown() -> Program:
    """A program that the FX executor has no meaning for."""
    program = side_by_side(a="Relu")
    program.node("a").op_type = "NoSuchOperator"  # type: ignore[union-attr]
    return program


def test_what_the_executor_lacks_is_run_by_the_backend() -> None:
    backend = RunningBackend()
    session = session_of(unknown(), backend=backend)
    (got,) = session.run(session.teacher, CHECK)
    torch.testing.assert_close(got, torch.tensor(CHECK["x"]) + 1)
    assert backend.log == [f"lower for {session.target}", "load with 1", "run", "close"]
    assert session.simulated is False
    (note,) = session.progress.notes  # type: ignore[attr-defined]
    assert note.startswith(f"checked by {session.target} alone: ")
    session.run(side_by_side(a="Relu"), CHECK)
    assert len(backend.log) == 8


def test_nothing_runs_what_the_executor_lacks_for_another_machine() -> None:
    backend = RunningBackend(here=False)
    session = session_of(unknown(), backend=backend)
    with pytest.raises(UnsupportedOperatorError):
        session.run(session.teacher, CHECK)
    assert backend.log == []
    assert session.simulated


# -- quarantine -------------------------------------------------------------------------------


def broken(session: Session, pass_: Pass, program: Program) -> PassFault:
    with pytest.raises(PassFault) as caught:
        session.apply_exact(pass_, program)
    return caught.value


def fails(program: Program) -> None:
    raise ZeroDivisionError("oops")


def test_quarantine_blames_the_candidate_and_begins_again() -> None:
    program = side_by_side(a="Relu", b="Relu", c="Relu")
    session = session_of(program, owners={"clean": "acme 1.2"})
    session.apply_exact(clean(exact("c", "Abs"), name="other"), program)
    guilty = Candidate("b", "x", fails, True, ("b",), details={"bits": 4})
    pass_ = clean(exact("a", "Abs"), guilty)
    fault = broken(session, pass_, program)
    with pytest.warns(QuarantineWarning, match="going on without pass clean of acme 1.2: ") as w:
        found = session.quarantine(fault)
    assert w[0].message.fault is found  # type: ignore[union-attr]
    assert found == Fault("clean", "acme 1.2", "b", "x", RAISED, str(fault), ("b",))
    assert session.faults == [found]
    assert session.history == []
    assert [(r.site, r.choice, r.outcome, r.reason) for r in session.ledger] == [
        ("a", "Abs", QUARANTINED, "clean broke its contract at 'b'"),
        ("b", "x", ROLLED_BACK, str(fault)),
    ]
    assert session.ledger[1].details == {"bits": 4}


def test_rows_of_an_earlier_quarantine_stay() -> None:
    program = side_by_side(a="Relu", b="Relu")
    session = session_of(program)
    for name in ("first", "second"):
        pass_ = clean(Candidate("b", "x", fails, True), name=name)
        with pytest.warns(QuarantineWarning):
            session.quarantine(broken(session, pass_, program))
    assert [(r.pass_name, r.outcome) for r in session.ledger] == [
        ("first", ROLLED_BACK), ("second", ROLLED_BACK),
    ]  # fmt: skip
    assert [f.pass_name for f in session.faults] == ["first", "second"]
    assert session.faults[0].owner == "a pass given in Python"


def test_a_fault_while_proposing_has_one_row() -> None:
    program = side_by_side(a="Relu")
    session = session_of(program)
    pass_ = paper_pass(lambda p: 1 / 0, "clean", Stage.CLEAN)  # type: ignore[arg-type,return-value]
    fault = broken(session, pass_, program)
    with pytest.warns(QuarantineWarning):
        found = session.quarantine(fault)
    assert (found.site, found.choice, found.nodes, found.kind) == ("", "", (), RAISED)
    (row,) = session.ledger
    assert (row.pass_name, row.site, row.choice, row.outcome, row.reason) == (
        "clean", "program", "propose", QUARANTINED, str(fault),
    )  # fmt: skip


def test_faults_may_stop_the_compile() -> None:
    program = side_by_side(a="Relu")
    session = session_of(program, on_fault="stop")
    fault = broken(session, clean(Candidate("a", "x", fails, True)), program)
    with pytest.raises(PluginError, match="stopped at pass clean of a pass given in Python: clean"):
        session.quarantine(fault)
    assert session.faults == []


def test_quarantine_writes_a_reproducer(tmp_path: Path) -> None:
    program = side_by_side(b="Relu")
    session = session_of(program, reproducers=tmp_path)
    pass_ = clean(Candidate("b", "x", fails, True))
    fault = broken(session, pass_, program)
    with pytest.warns(QuarantineWarning, match="Reproduce it with: optcompiler replay "):
        found = session.quarantine(fault)
    assert found.reproducer is not None
    assert found.reproducer.parent == tmp_path
    assert (found.reproducer / "program.onnx").exists()
    (row,) = session.ledger
    assert row.reason == f"{fault} Reproducer: {found.reproducer.name}."


def test_what_a_fault_says_and_records() -> None:
    plain = Fault("p", "acme 1.2", "a", "x", RAISED, "p[a=x] raised oops.", ("a",))
    assert str(plain) == "pass p of acme 1.2: p[a=x] raised oops."
    assert plain.record() == {
        "pass": "p", "owner": "acme 1.2", "site": "a", "choice": "x", "kind": "raised",
        "reason": "p[a=x] raised oops.", "reproducer": "",
    }  # fmt: skip
    kept = replace(plain, reproducer=Path("/tmp/a b/p-1"))
    assert str(kept) == f"{plain} Reproduce it with: optcompiler replay '/tmp/a b/p-1'"
    assert kept.record()["reproducer"] == "p-1"


def test_a_session_about_another_program_starts_empty() -> None:
    program, other = side_by_side(a="Relu"), side_by_side(a="Exp")
    session = session_of(program, owners={"clean": "acme"}, time_limit_s=3.0)
    session.apply_exact(clean(exact("a", "Abs")), program)
    context = replace(session.context, calibration=[CHECK, CHECK])
    twin = replace(session, context=context).about(other, {"x": CHECK["x"] * 2})
    assert twin.teacher is other
    assert twin.context.teacher is other
    assert [b["x"].tolist() for b in twin.context.calibration] == [[1.0, 4.0]]
    assert list(twin.context.holdout) == []
    assert len(twin.ledger) == 0
    assert twin.history == []
    assert (twin.time_limit_s, twin.owners) == (3.0, {"clean": "acme"})
    assert (twin.backend, twin.target, twin.profile, twin.cost_model) == (
        session.backend, session.target, session.profile, session.cost_model,
    )  # fmt: skip
    assert twin.check["x"].tolist() == [1.0, 4.0]
    held = replace(session, context=replace(session.context, holdout=[CHECK])).about(other, CHECK)
    assert list(held.context.holdout) == [CHECK]
    assert list(held.context.calibration) == []
