"""The runner of the conformance suite: subjects, what they exclude and why, and their scores.

A subject is one way of running a model. To add one, subclass `Subject`, and put an instance into
`SUBJECTS` of `tests/conformance/subjects.py`.
"""

from __future__ import annotations

import enum
import fnmatch
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.program import Program
from tests.conformance.cases import Case, cases

CHUNKS = 4
"""Parts of the node models: each is one test, so that workers share them."""


TWO_ULPS = {"bfloat16": 2.0**-6, "float16": 2.0**-9}
"""Relative difference of two units in the last place, where that is more than the suite allows."""

ROUNDING = 4 * 2.0**-23
"""What float32 arithmetic in another order leaves of the largest element where the sum is zero."""


_NAMED = re.compile(r"[A-Z]\w+( of node)? '")
"""Every refusal of an operator names it and the node, as in "TopK 'n'" and "Conv of node 'n'"."""


@dataclass(frozen=True)
class Exclusion:
    """Cases that a subject gets wrong, by exact name or a pattern of `fnmatch`, and why.

    One that matches no case, or a case that passes, fails the suite.
    """

    pattern: str
    reason: str


class Verdict(enum.Enum):
    RIGHT = "right"
    UNSUPPORTED = "unsupported"
    EXCLUDED = "excluded"
    WRONG = "wrong"


@dataclass(frozen=True)
class Outcome:
    case: str
    verdict: Verdict
    reason: str = ""


class Subject(ABC):
    """A system under test."""

    name: ClassVar[str]
    floors: ClassVar[Mapping[str, int]]
    """How many cases of each kind must be right; kinds that are not named are not run."""
    exclusions: ClassVar[Sequence[Exclusion]] = ()

    def applies(self, case: Case) -> bool:
        """Whether the case says anything about this subject."""
        return True

    @abstractmethod
    def run(self, program: Program, inputs: Mapping[str, Any]) -> Sequence[Any]:
        """Outputs in graph order; raises `UnsupportedOperatorError` where it has no meaning."""

    def check(self, case: Case) -> None:
        """Raise `AssertionError` when the outputs are not those that the case expects."""
        program = Program.from_onnx(case.model)
        for inputs, expected in case.data:
            compare(self.run(program, inputs), expected, case)


def judge(subject: Subject, case: Case) -> Outcome:
    """Run one case; an exception that is no named unsupported operator is wrong."""
    excluded = [e for e in subject.exclusions if fnmatch.fnmatchcase(case.name, e.pattern)]
    try:
        subject.check(case)
    except UnsupportedOperatorError as error:
        named = _NAMED.search(str(error)) is not None
        verdict = Verdict.UNSUPPORTED if named else Verdict.WRONG
        found = Outcome(case.name, verdict, one_line(error))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust or C++ extension may raise what is no Exception
        found = Outcome(case.name, Verdict.WRONG, one_line(error))
    else:
        found = Outcome(case.name, Verdict.RIGHT)
    if not excluded:
        return found
    if found.verdict is Verdict.RIGHT:
        reason = f"excluded by {excluded[0].pattern!r}, but passes: remove the exclusion"
        return Outcome(case.name, Verdict.WRONG, reason)
    return Outcome(case.name, Verdict.EXCLUDED, excluded[0].reason)


def selected(subject: Subject, kind: str, chunk: int | None = None) -> list[Case]:
    """The cases of a kind that say something about the subject, or one of `CHUNKS` parts."""
    known = cases(kind) if chunk is None else cases(kind)[chunk::CHUNKS]
    return [case for case in known if subject.applies(case)]


def useless_exclusions(subject: Subject) -> list[Exclusion]:
    """Exclusions that match none of the cases."""
    names = [case.name for kind in subject.floors for case in cases(kind)]
    return [e for e in subject.exclusions if not fnmatch.filter(names, e.pattern)]


def compare(got: Sequence[Any], expected: Sequence[Any], case: Case) -> None:
    """Raise `AssertionError` where the outputs differ in structure, type, shape or value."""
    assert len(got) == len(expected), f"{len(got)} outputs, {len(expected)} expected"
    for index, (g, e) in enumerate(zip(got, expected, strict=True)):
        _compare(g, e, case, f"output {index}")


def _compare(got: Any, expected: Any, case: Case, where: str) -> None:
    if isinstance(expected, list):
        assert isinstance(got, list), f"{where} is {type(got).__name__}, a sequence expected"
        assert len(got) == len(expected), f"{where} holds {len(got)}, {len(expected)} expected"
        for index, (g, e) in enumerate(zip(got, expected, strict=True)):
            _compare(g, e, case, f"{where}[{index}]")
        return
    if expected is None or got is None:
        assert got is expected, f"{where} is {got!r}, {expected!r} expected"
        return
    g, e = np.asarray(got), np.asarray(expected)
    kinds = "".join(sorted({g.dtype.kind, e.dtype.kind} & set("OSU"))) or "-"
    assert kinds != "-" or g.dtype == e.dtype, f"{where} is {g.dtype}, {e.dtype} expected"
    assert g.shape == e.shape, f"{where} has shape {g.shape}, {e.shape} expected"
    if case.random:
        return
    if e.dtype.kind in "biuOSU":
        wrong = np.count_nonzero(g.astype(e.dtype) != e)
        assert not wrong, f"{where}: {wrong} of {e.size} elements differ"
        return
    rtol = max(case.rtol, TWO_ULPS.get(e.dtype.name, 0.0))
    if e.dtype.kind == "V" or e.dtype.itemsize == 1 or e.dtype.name == "bfloat16":
        g, e = g.astype(np.float32), e.astype(np.float32)
    largest = float(np.abs(e).max(initial=0.0, where=np.isfinite(e)))
    atol = max(case.atol, ROUNDING * largest)
    np.testing.assert_allclose(g, e, rtol=rtol, atol=atol, err_msg=where)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def table(outcomes: Mapping[tuple[str, str], Iterable[Outcome]]) -> str:
    """One line for each subject and kind: how many cases got which verdict."""
    columns = [verdict.value for verdict in Verdict]
    lines = [f"{'subject':20}{'models':20}" + "".join(f"{c:>13}" for c in columns)]
    for (subject, kind), found in outcomes.items():
        counts = Counter(outcome.verdict for outcome in found)
        numbers = "".join(f"{counts[verdict]:>13}" for verdict in Verdict)
        lines.append(f"{subject:20}{kind:20}{numbers}")
    return "\n".join(lines)
