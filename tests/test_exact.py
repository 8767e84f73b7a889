"""Exact candidates are applied together, and what is wrong among them is found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from optcompiler.compiler import session_for
from optcompiler.errors import Declined, PassFault
from optcompiler.ledger import DECLINED, REJECTED, TAKEN
from optcompiler.program import Program
from optcompiler.rewriting import Candidate, Pass, PassContext, Stage
from optcompiler.session import Session
from optcompiler.synthesis import random_batch
from tests import toy

SITES = 9


def chain() -> Program:
    """Abs after Abs: taking out any of them keeps the function."""
    lines = [f"[a{i}] t{i} = Abs ({'x' if i == 0 else f't{i - 1}'})" for i in range(SITES)]
    lines.append(f"[out] y = Neg (t{SITES - 1})")
    return Program.from_text(
        '<ir_version: 10, opset_import: ["" : 20]>\nnet (float[4,8] x) => (float[4,8] y) {\n'
        + "\n".join(lines) + "\n}"
    )  # fmt: skip


def bypass(program: Program, name: str) -> None:
    node = program.node(name)
    if node is None or node.inputs[0] is None:
        raise Declined(f"{name} is gone")
    node.outputs[0].replace_all_uses_with(node.inputs[0])


def inflate(program: Program, name: str) -> None:
    node = program.node(name)
    assert node is not None
    node.op_type = "Exp"


def leave(program: Program, name: str) -> None:
    """Changes nothing."""


def refuse(program: Program, name: str) -> None:
    raise Declined("no")


def spoil(program: Program, name: str) -> None:
    """Declines after it has edited."""
    inflate(program, name)
    raise Declined("too late")


def crash(program: Program, name: str) -> None:
    raise ValueError("oh")


def break_(program: Program, name: str) -> None:
    node = program.node(name)
    assert node is not None
    node.op_type = "Nonsense"


def slow_down(program: Program, name: str) -> None:
    """Dear by the toy's prices."""
    node = program.node(name)
    assert node is not None
    node.op_type = "Tanh"


Rewrite = Callable[[Program, str], None]


@dataclass(frozen=True)
class Many(Pass):
    """Takes out every Abs but the first; `odd` are other rewrites by position."""

    name: ClassVar[str] = "many"
    stage: ClassVar[Stage] = Stage.CLEAN
    odd: Mapping[int, Rewrite] = field(default_factory=dict)

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate]:
        for i in range(1, SITES):
            rewrite, name = self.odd.get(i, bypass), f"a{i}"
            yield Candidate(
                name, rewrite.__name__, lambda p, r=rewrite, n=name: r(p, n), True, (name,)
            )


@dataclass(frozen=True)
class ManyFused(Many):
    stage: ClassVar[Stage] = Stage.FUSE


@pytest.fixture
def session() -> Session:
    program = chain()
    return session_for(
        program, toy.registry(), target="toy", precisions=frozenset({"fp32"}),
        batch=random_batch(program.inputs), calibrated=False, seed=0,
    )  # fmt: skip


def outcomes(session: Session) -> list[str]:
    return [row.outcome for row in session.ledger]


def names(program: Program) -> list[str]:
    return [str(n.name) for n in program.graph]


def test_all_are_taken_from_one_copy(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Program] = []
    clone = Program.clone
    monkeypatch.setattr(Program, "clone", lambda p: made.append(p) or clone(p))
    after = session.apply_exact(Many(), session.teacher)
    assert names(after) == ["a0", "out"]
    assert outcomes(session) == [TAKEN] * (SITES - 1)
    assert [row.saving_us for row in session.ledger] == pytest.approx([1.0] * (SITES - 1))
    assert len(session.history) == SITES - 1
    # one to propose on, one to rewrite, and what the backend copies for two prices
    assert len(made) <= 6


@pytest.mark.parametrize("wrong", [inflate, crash, break_], ids=lambda f: f.__name__)
@pytest.mark.parametrize("position", [1, 4, SITES - 1])
def test_the_one_at_fault_is_named(session: Session, wrong: Rewrite, position: int) -> None:
    with pytest.raises(PassFault) as caught:
        session.apply_exact(Many({position: wrong}), session.teacher)
    fault = caught.value
    assert fault.candidate is not None
    assert fault.candidate.site == f"a{position}"
    assert fault.program is not None
    assert names(fault.program) == ["a0", *(f"a{i}" for i in range(position, SITES)), "out"]


@pytest.mark.parametrize("idle", [leave, refuse, spoil], ids=lambda f: f.__name__)
def test_what_declines_or_changes_nothing_leaves_no_trace(session: Session, idle: Rewrite) -> None:
    after = session.apply_exact(Many({3: idle, 6: idle}), session.teacher)
    expected = [DECLINED if i in (3, 6) else TAKEN for i in range(1, SITES)]
    assert outcomes(session) == expected
    assert names(after) == ["a0", "a3", "a6", "out"]
    assert {n.op_type for n in after.graph} == {"Abs", "Neg"}


def test_a_fusion_that_is_predicted_slower_is_rejected(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "difference", lambda *_: (0.0, ""))
    after = session.apply_exact(ManyFused({2: slow_down, 5: slow_down}), session.teacher)
    expected = [REJECTED if i in (2, 5) else TAKEN for i in range(1, SITES)]
    assert outcomes(session) == expected
    assert names(after) == ["a0", "a2", "a5", "out"]
    assert {n.op_type for n in after.graph} == {"Abs", "Neg"}
