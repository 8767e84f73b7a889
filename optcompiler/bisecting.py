"""Blame: the pass, the candidate and the nodes that make a user's check fail.

A compile is a sequence of candidates. The check is asked about the program after the first k of
them, and halving finds the one that breaks it, in about log2(n) checks. Where the pass can be
applied to a part of the program alone, delta debugging then finds the fewest nodes on which it
still does.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optcompiler import cache
from optcompiler.artifact import NODE_LINE, program_text
from optcompiler.budget import Budget
from optcompiler.compiler import DEFAULT_COST_MODEL, Job
from optcompiler.errors import CHECK, GateError, InputError, OptcompilerError, PluginError
from optcompiler.plugins import Registry
from optcompiler.program import Program, consumed
from optcompiler.progress import Silent
from optcompiler.reproducer import observed, recorded, store
from optcompiler.rewriting import Candidate, Patch
from optcompiler.session import Fault
from optcompiler.shrinking import extract, fewest, put_back
from optcompiler.synthesis import random_batch

if TYPE_CHECKING:
    import numpy as np

    from optcompiler.rewriting import Pass, Progress
    from optcompiler.session import Session, Step
    from optcompiler.target import Target

Check = Callable[[Program], bool | None]
"""True for a good program, False for a bad one, None for one that cannot be judged."""

NARROWING = 48
"""Most checks that go into finding the nodes."""

KEPT = 8
"""Programs of earlier trials that are kept to go on from."""


@dataclass(frozen=True)
class Trial:
    """One answer of the check: about the program after `steps` candidates, or a `part` of one."""

    steps: int
    good: bool | None
    part: tuple[str, ...] = ()


@dataclass(frozen=True)
class Culprit:
    """What breaks the check: candidate number `step` of `steps`.

    `nodes` are the fewest that it has to be applied to when `narrowed`, else those it changes.
    `before` and `after` are lines of the program's text. `faults` are passes that were left out.
    """

    pass_name: str
    owner: str
    site: str
    choice: str
    exact: bool
    note: str
    step: int
    steps: int
    nodes: tuple[str, ...]
    narrowed: bool
    before: tuple[str, ...]
    after: tuple[str, ...]
    trials: tuple[Trial, ...]
    faults: tuple[Fault, ...]
    reproducer: Path


def bisect(
    model: Any,
    check: Check,
    example_inputs: Any = None,
    *,
    target: str | Target = "onnxruntime",
    precision: str | Iterable[str] = "auto",
    calibration: Any = None,
    budget: Budget | None = None,
    passes: Iterable[str | Pass | type[Pass]] | None = None,
    dynamic: Any = None,
    damage: str = "kl",
    cost_model: str = DEFAULT_COST_MODEL,
    seed: int = 0,
    registry: Registry | None = None,
    progress: Progress | None = None,
    time_limit_s: float | None = None,
    reproducers: str | Path | None = None,
    command: str = "",
) -> Culprit:
    """Find what a compile with these options does that makes `check` fail, and write a reproducer.

    `check` is asked about whole programs, each with the model's interface; it must hold for the
    model as imported. `command` is what the reproducer says that the check was. What a compile
    undoes because it measures slower is not undone here.

    Raises `InputError` when the check does not hold for the model itself, and `GateError` when it
    holds after all passes, answers differently when asked again, or skips too many programs.
    """
    job = Job.prepare(
        model, example_inputs, target=target, precision=precision, calibration=calibration,
        budget=budget or Budget(), passes=passes, dynamic=dynamic, damage=damage,
        cost_model=cost_model, seed=seed, registry=registry or Registry(),
        progress=progress or Silent(), on_fault="continue", time_limit_s=time_limit_s,
        reproducers=reproducers,
    )  # fmt: skip
    line = _Line(job.session, check)
    line.require(0, True, "the check fails for the model as imported; no pass is to blame")
    job.holding_passes_to_contract(job.rewritten)
    line.steps = list(job.session.history)
    last = _first_bad(line)
    pass_, candidate = line.steps[last - 1]
    before, after = line.program(last - 1), line.program(last)
    changed = _changed_nodes(before, after)
    nodes, part = changed, None
    narrowed = _narrowed(line, last, changed)
    if narrowed is not None:
        nodes, after, part = *narrowed, narrowed[0]
    place = _write(
        job.session, (pass_, candidate), before, after, nodes, part, command,
        Path(reproducers or cache.location() / "reproducers"),
    )  # fmt: skip
    return Culprit(
        pass_.name, job.session.owners[pass_.name], candidate.site, candidate.choice,
        candidate.exact, candidate.note, last, len(line.steps), tuple(nodes), part is not None,
        *_changes(before, after), tuple(line.trials), tuple(job.session.faults), place,
    )  # fmt: skip


@dataclass
class _Line:
    """The programs after the first k candidates, made when asked for, and what the check says."""

    session: Session
    check: Check
    steps: list[Step] = field(default_factory=list["Step"])
    trials: list[Trial] = field(default_factory=list[Trial])
    _programs: dict[int, Program] = field(default_factory=dict[int, Program])

    def program(self, count: int) -> Program:
        """The program after `count` candidates."""
        start = max((k for k in self._programs if k <= count), default=0)
        program = self._programs.get(start, self.session.teacher)
        for pass_, candidate in self.steps[start:count]:
            patch = self.session.attempt(pass_, candidate, program)
            if not isinstance(patch, Patch):
                raise PluginError(
                    f"pass {pass_.name} of {self.session.owners.get(pass_.name, '-')}: "
                    f"{candidate.site!r} was rewritten once and is declined now "
                    f"({patch.reason}); make the pass deterministic."
                )
            program = patch.after
        self._programs[count] = program
        if len(self._programs) > KEPT:
            self._programs.pop(next(k for k in self._programs if k != count))
        return program

    def ask(self, count: int) -> bool | None:
        self.session.progress.note(f"checking after {count} of {len(self.steps)} candidates")
        good = self.check(self.program(count))
        self.trials.append(Trial(count, good))
        return good

    def require(self, count: int, good: bool, otherwise: str) -> None:
        """Raise when the check does not say `good`."""
        said = self.ask(count)
        if said is None:
            where = "after all passes" if count else "as imported"
            raise InputError(f"the check skips the model {where}; it must judge that one.")
        if said is not good:
            raise (GateError if good is False else InputError)(f"{otherwise}.")


def _first_bad(line: _Line) -> int:
    """The least count of candidates after which the check fails."""
    low, high = 0, len(line.steps)
    line.require(high, False, f"the check holds after all {high} candidates; nothing to find")
    skipped: set[int] = set()
    while untried := [k for k in range(low + 1, high) if k not in skipped]:
        middle = min(untried, key=lambda k: abs(2 * k - low - high))
        good = line.ask(middle)
        if good is None:
            skipped.add(middle)
        elif good:
            low = middle
        else:
            high = middle
    if high - low > 1:
        suspects = [f"{p.name}[{c.site}={c.choice}]" for p, c in line.steps[low:high]]
        raise GateError(
            f"the check skips every program between {low} and {high} candidates; one of these is "
            f"to blame: {', '.join(suspects)}."
        )
    for count, good in ((low, True), (high, False)):
        if line.ask(count) is not good:
            raise GateError(
                f"the check said {_spelled(good)} of the program after {count} candidates and "
                f"says otherwise when asked again; make it deterministic."
            )
    return high


def _spelled(good: bool) -> str:
    return "good" if good else "bad"


# -- within a candidate -----------------------------------------------------------------------


def applied_to(
    session: Session, pass_: Pass, key: tuple[str, str], program: Program,
    names: Sequence[str] | None, values: Mapping[str, np.ndarray] | None = None,
) -> Program | None:  # fmt: skip
    """`program` after the candidate `key` (site and choice) of the pass, which sees only the named
    nodes (None: all). None when the pass does not propose it there.

    `values` are known tensors of the program by name, for passes that calibrate. Raises `PassFault`
    when the pass breaks its contract.
    """
    part = program if names is None else extract(program, names)
    known = {p.name: (values or {}).get(p.name) for p in part.inputs}
    unknown = [p for p in part.inputs if known[p.name] is None]
    made = random_batch(unknown, seed=session.context.seed)
    local = session.about(part, {n: made[n] if v is None else v for n, v in known.items()})
    if names is None:
        local = session
    for item in local.proposed(pass_, part):
        if isinstance(item, Candidate) and (item.site, item.choice) == key:
            patch = local.attempt(pass_, item, part)
            if not isinstance(patch, Patch):
                return None
            return patch.after if names is None else put_back(program, names, patch.after)
    return None


def _narrowed(
    line: _Line, last: int, changed: Sequence[str]
) -> tuple[tuple[str, ...], Program] | None:
    """The fewest nodes to which the pass has to be applied, and the program that this gives; None
    where it breaks the check only as a whole."""
    session, (pass_, candidate) = line.session, line.steps[last - 1]
    before = line.program(last - 1)
    values = observed(session, before)
    key = (candidate.site, candidate.choice)
    found: tuple[tuple[str, ...], Program] | None = None
    left = NARROWING

    def breaks(names: Sequence[str]) -> bool:
        nonlocal found, left
        try:
            made = applied_to(session, pass_, key, before, names, values)
            if made is None:
                return False
            made.verify(like=before)
        except (OptcompilerError, ValueError, KeyError):
            return False  # a part may be nothing that the pass can work on
        left -= 1
        good = line.check(made)
        line.trials.append(Trial(last, good, tuple(names)))
        if good is False:
            found = (tuple(names), made)
        return good is False

    session.progress.note(f"looking for the nodes among {len(changed)}")
    wider = _with_neighbours(before, changed)
    for names in (changed, wider) if set(wider) != set(changed) else (changed,):
        if names and breaks(names):
            fewest(names, breaks, over=lambda: left <= 0)
            break
    return found


def _changed_nodes(before: Program, after: Program) -> list[str]:
    """Nodes of `before` that are gone, changed, or read a changed weight, in order."""
    added, removed, weights = after.changes_since(before)
    other = {*added, *removed}
    return [
        str(n.name)
        for n in before.graph
        if n.name in other or any(v.name in weights for v in consumed(n))
    ]


def _with_neighbours(program: Program, names: Sequence[str]) -> list[str]:
    network = program.network()
    near = set(names)
    for name in names:
        near.update(n for n in network.predecessors(name) if isinstance(n, str))
        near.update(n for n in network.successors(name) if isinstance(n, str))
    return [str(n.name) for n in program.graph if n.name in near]


def _changes(before: Program, after: Program) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The lines in which the texts of two programs differ: nodes first, then weights."""
    texts = [program_text(p).splitlines() for p in (before, after)]
    lines = [
        [x.strip() for x in text if NODE_LINE.match(x) or x.startswith("#   ")] for text in texts
    ]
    old, new = set(lines[0]), set(lines[1])
    return tuple(x for x in lines[0] if x not in new), tuple(x for x in lines[1] if x not in old)


# -- the reproducer ---------------------------------------------------------------------------


def _write(
    session: Session, step: Step, before: Program, after: Program, nodes: Sequence[str],
    part: Sequence[str] | None, command: str, directory: Path,
) -> Path:  # fmt: skip
    """Write the programs before and after, and how to apply the pass again."""
    pass_, candidate = step
    label = f"{pass_.name}[{candidate.site}={candidate.choice}]"
    fault = Fault(
        pass_.name, session.owners[pass_.name], candidate.site, candidate.choice, CHECK,
        f"{label}: the check holds before it and fails after it.", tuple(nodes),
    )  # fmt: skip
    record = recorded(session, pass_, fault) | {"check": command, "part": list(part or ())}
    facts = "\n".join([label, command, *(part or ()), *before.structure()])
    place = directory / hashlib.sha256(facts.encode()).hexdigest()[:16]
    again = shlex.join(["optcompiler", "replay", str(place), "--check", command or "..."])
    readme = (
        f"{fault.reason}\n\nIt holds for program.onnx and fails for after.onnx. To apply the pass "
        f"again:\n\n    {again}\n"
    )
    inputs = dict(session.check) if session.context.calibration else None
    store(place, record, readme, {"program.onnx": before, "after.onnx": after}, inputs)
    return place
