"""The state of one compile, and the one way in which a candidate changes a program."""

from __future__ import annotations

import math
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optcompiler import scratch
from optcompiler.backend import Backend, Kernel
from optcompiler.binding import bind
from optcompiler.choices import Choices
from optcompiler.contract import blaming, patch_of, proposals
from optcompiler.cost import CostModel, DeviceProfile
from optcompiler.damage import (
    Judge,
    Outputs,
    as_tensors,
    largest_error,
    run_batches,
    typical_error,
)
from optcompiler.errors import (
    INVALID,
    NUMBERS,
    OVERTIME,
    Declined,
    PassFault,
    PluginError,
    QuarantineWarning,
    UnsupportedOperatorError,
)
from optcompiler.files import plain
from optcompiler.ledger import (
    DECLINED,
    FAULTY,
    QUARANTINED,
    ROLLED_BACK,
    TAKEN,
    Ledger,
    Row,
    rows_of,
)
from optcompiler.program import Program
from optcompiler.rewriting import (
    Batch,
    Candidate,
    Decline,
    Pass,
    PassContext,
    Patch,
    Progress,
)
from optcompiler.target import Target

Step = tuple[Pass, Candidate]
"""A candidate as it is applied, with its pass."""

FURTHER = 1.1
"""A rewrite of a quantised program may bring it this much further from the teacher."""


@dataclass(frozen=True)
class Fault:
    """Why a pass is quarantined. `reproducer` is a directory that `optcompiler replay` takes."""

    pass_name: str
    owner: str
    site: str
    choice: str
    kind: str
    reason: str
    nodes: tuple[str, ...] = ()
    reproducer: Path | None = None
    unwritten: str = ""
    """Why there is no reproducer, where one was wanted."""

    def __str__(self) -> str:
        told = f"pass {self.pass_name} of {self.owner}: {self.reason}"
        if self.reproducer:
            told += f" Reproduce it with: optcompiler replay {shlex.quote(str(self.reproducer))}"
        elif self.unwritten:
            told += f" No reproducer could be written: {self.unwritten}"
        return told

    def record(self) -> dict[str, str]:
        """For the manifest: nothing that differs between two machines."""
        return {
            "pass": self.pass_name, "owner": self.owner, "site": self.site, "choice": self.choice,
            "kind": self.kind, "reason": self.reason,
            "reproducer": self.reproducer.name if self.reproducer else "",
        }  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """Why a candidate gave no patch: an outcome of the ledger and a reason."""

    outcome: str
    reason: str


@dataclass
class Session:
    """What every step of a compile shares. `profile` grows as kernels are measured."""

    teacher: Program
    backend: Backend
    target: Target
    cost_model: CostModel
    profile: DeviceProfile
    context: PassContext
    check: Batch
    """One batch on which exact rewrites are compared."""
    ledger: Ledger = field(default_factory=Ledger)
    simulated: bool = True
    """Whether the FX executor runs the teacher, as far as was seen; if not, the backend does."""
    owners: Mapping[str, str] = field(default_factory=dict[str, str])
    """Distribution and version by name of pass."""
    on_fault: str = "continue"
    """When a pass breaks its contract: "continue" without it, or "stop"."""
    time_limit_s: float | None = None
    """In place of what the passes declare."""
    reproducers: Path | None = None
    """Where reproducers go; None writes none."""
    faults: list[Fault] = field(default_factory=list[Fault])
    """One for each quarantined pass."""
    history: list[Step] = field(default_factory=list["Step"])
    """Candidates that were taken, in order."""
    _offered: dict[str, list[Candidate]] = field(default_factory=dict[str, list[Candidate]])
    _outputs: tuple[Program, list[Outputs]] | None = None
    _prices: dict[int, tuple[Program, Sequence[Kernel], float]] = field(
        default_factory=dict[int, tuple[Program, Sequence[Kernel], float]]
    )

    @property
    def progress(self) -> Progress:
        return self.context.progress

    @property
    def choices(self) -> Choices:
        return self.context.choices

    def bound(self, program: Program) -> Program:
        """The program with the target's sizes, as the backend sees it."""
        return bind(program, self.target.sizes)

    def kernels(self, program: Program) -> Sequence[Kernel]:
        """The kernels that the program becomes, at the greatest of sizes that have bounds."""
        program = bind(self.bound(program), self.target.most)
        return self.backend.kernels(program, self.target)

    def price_us(self, program: Program) -> float:
        """Predicted microseconds of one call; infinite for a program the backend cannot lower."""
        return self._priced(program)[1]

    def _priced(self, program: Program) -> tuple[Sequence[Kernel], float]:
        """The kernels of a program and their price together; those of a few programs are kept."""
        known = self._prices.get(id(program))
        if known is None or known[0] is not program:
            try:
                kernels = self.kernels(program)
                price = self.cost_model.program_us(kernels, self.profile)
            except UnsupportedOperatorError:
                kernels, price = (), float("inf")
            self._prices[id(program)] = known = (program, kernels, price)
            while len(self._prices) > 8:
                self._prices.pop(next(iter(self._prices)))
        return known[1:]

    def saving_us(self, before: Program, after: Program) -> float | None:
        """Predicted microseconds saved; None where the backend cannot lower one of the programs."""
        old, new = self.price_us(before), self.price_us(after)
        return old - new if max(old, new) < float("inf") else None

    def savings_us(
        self, candidates: Sequence[Candidate], before: Program, after: Program
    ) -> list[float | None]:
        """Predicted microseconds that each of several candidates, applied together, saves.

        A kernel of which the other program has no equal is put down, in equal parts, to the
        candidates on whose nodes it works. None as in `saving_us`.
        """
        if self.saving_us(before, after) is None:
            return [None] * len(candidates)
        owners: dict[str, list[int]] = {}
        for index, candidate in enumerate(candidates):
            for name in dict.fromkeys((candidate.site, *candidate.nodes)):
                owners.setdefault(name, []).append(index)
        savings = [0.0] * len(candidates)
        old, new = (
            {(k.nodes, k.signature): k for k in self._priced(p)[0]} for p in (before, after)
        )
        for sign, kernels, others in ((1, old, new), (-1, new, old)):
            for key, kernel in kernels.items():
                mine = {i for n in kernel.nodes for i in owners.get(n, ())}
                if key in others or not mine:
                    continue
                price = self.cost_model.kernel_us(kernel, self.profile)
                for index in mine:
                    savings[index] += sign * price / len(mine)
        return list(savings)

    def learned(self, times_us: dict[str, float]) -> None:
        """Add measured kernels (by signature) to the table that prices are read from."""
        self.profile = self.profile.with_measured(times_us)
        self._prices.clear()

    def outputs(self, program: Program) -> list[Outputs]:
        """Outputs on the check batch; those of the last program asked for are kept."""
        if self._outputs is None or self._outputs[0] is not program:
            self._outputs = (program, [self.run(program, self.check)])
        return self._outputs[1]

    def run(self, program: Program, batch: Batch) -> Outputs:
        """Outputs by the FX executor; by the backend when the executor lacks an operator."""
        if self.simulated:
            try:
                return run_batches(program, [batch], self.context.ops)[0]
            except UnsupportedOperatorError as error:
                if not self.backend.runs_here(self.target):
                    raise
                self.progress.note(f"checked by {self.target} alone: {error}")
                self.simulated = False
        with scratch.directory() as code:
            info = self.backend.lower(self.bound(program), self.target, code, self.choices)
            runner = self.backend.load(code, info, threads=self.target.threads)
            try:
                return as_tensors(runner.run(batch))
            finally:
                runner.close()

    def about(self, program: Program, batch: Batch) -> Session:
        """A session like this one whose teacher is `program`, with nothing recorded yet."""
        context = replace(
            self.context, teacher=program, calibration=[batch] if self.context.calibration else [],
            holdout=[batch] if self.context.holdout else [], choices=Choices(),
        )  # fmt: skip
        return Session(
            program, self.backend, self.target, self.cost_model, self.profile, context, batch,
            time_limit_s=self.time_limit_s, owners=self.owners,
        )  # fmt: skip

    # -- proposals ------------------------------------------------------------------------

    def limit_s(self, pass_: Pass) -> float:
        """The limit of the pass, for a thousand nodes."""
        return pass_.time_limit_s if self.time_limit_s is None else self.time_limit_s

    def seconds(self, pass_: Pass, program: Program) -> float:
        """How long proposing, or one rewrite, may take on this program; for ever under a lock."""
        if self.choices.locked:
            return math.inf
        return self.limit_s(pass_) * max(1, math.ceil(len(program.graph) / 1000))

    def proposed(self, pass_: Pass, program: Program) -> list[Candidate | Decline]:
        """What the pass yields. Raises `PassFault` when it breaks its contract."""
        return proposals(pass_, program, self.context, self.seconds(pass_, program))

    def propose(self, pass_: Pass, program: Program, *, record: bool = True) -> list[Candidate]:
        """The pass's candidates on `program`; what it declines goes to the ledger."""
        candidates, declined = self.offers(pass_, program)
        for row in declined if record else ():
            self.ledger.add(row)
        return candidates

    def offers(self, pass_: Pass, program: Program) -> tuple[list[Candidate], list[Row]]:
        """The pass's candidates on `program`, and rows of what it declines."""
        offered = self.proposed(pass_, program)
        candidates = [item for item in offered if isinstance(item, Candidate)]
        self._offered[pass_.name] = candidates
        return candidates, [
            Row(pass_.name, item.site, "-", DECLINED, item.reason, nodes=item.nodes)
            for item in offered
            if isinstance(item, Decline)
        ]

    def row(self, pass_: Pass, candidate: Candidate, outcome: str, reason: str) -> Row:
        return Row(
            pass_.name, candidate.site, candidate.choice, outcome, reason,
            exact=candidate.exact, nodes=candidate.nodes, details=dict(candidate.details),
        )  # fmt: skip

    # -- faults ---------------------------------------------------------------------------

    def quarantine(self, fault: PassFault) -> Fault:
        """Make ready to begin again without the pass that did `fault`.

        Writes a reproducer and warns. Raises `PluginError` when faults stop the compile.
        """
        pass_, program, candidate = fault.pass_, fault.program, fault.candidate
        assert pass_ is not None
        assert program is not None
        found = Fault(
            pass_.name, self.owners.get(pass_.name, "a pass given in Python"),
            candidate.site if candidate else "", candidate.choice if candidate else "",
            fault.kind, str(fault), candidate.nodes if candidate else (),
        )  # fmt: skip
        if self.reproducers is not None:
            from optcompiler.reproducer import write_reproducer

            found = write_reproducer(self, pass_, found, program, self.reproducers)
        if self.on_fault == "stop" or (found.kind == OVERTIME and not self.choices.timed):
            raise PluginError(f"stopped at {found}") from fault
        warnings.warn(QuarantineWarning(found), stacklevel=2)
        self.faults.append(found)
        rows = [r for r in self.ledger if r.outcome in FAULTY] + self._blame(found, fault)
        self.ledger, self.history = Ledger(rows), []
        self.choices.begin_again()
        return found

    def quarantined_before(self) -> list[Fault]:
        """The faults of the compile that wrote the lock, their rows added to the ledger: no pass
        need break its contract again. Without a lock none, so far.

        Raises `PluginError` when faults stop the compile.
        """
        kept = self.choices.get(QUARANTINED) or {"faults": [], "rows": []}
        for entry in kept["faults"]:
            place = Path(entry["reproducer"]) if entry["reproducer"] else None
            known: dict[str, Any] = {**entry, "nodes": tuple(entry["nodes"]), "reproducer": place}
            fault = Fault(**known)
            if self.on_fault == "stop":
                raise PluginError(f"stopped at {fault}")
            warnings.warn(QuarantineWarning(fault), stacklevel=2)
            self.faults.append(fault)
        for row in rows_of(kept["rows"]):
            self.ledger.add(row)
        return self.faults

    def keep_quarantined(self) -> None:
        """Let the lock say which passes were left out, and why."""
        if not self.faults:
            return
        rows = [r for r in self.ledger if r.outcome in FAULTY]
        faults = [
            {**plain(f), "reproducer": f.reproducer and f.reproducer.name, "unwritten": ""}
            for f in self.faults
        ]
        self.choices.keep(QUARANTINED, lambda: {"faults": faults, "rows": rows})

    def _blame(self, found: Fault, fault: PassFault) -> list[Row]:
        """A row for each candidate that the quarantined pass had proposed."""
        reason = found.reason
        if found.reproducer:
            reason += f" Reproducer: {found.reproducer.name}."
        pass_, guilty = fault.pass_, fault.candidate
        assert pass_ is not None
        if guilty is None:
            return [Row(pass_.name, "program", "propose", QUARANTINED, reason)]
        elsewhere = f"{pass_.name} broke its contract at {guilty.site!r}"
        offered = {(c.site, c.choice): c for c in (*self._offered[pass_.name], guilty)}
        return [
            self.row(pass_, c, ROLLED_BACK, reason)
            if key == (guilty.site, guilty.choice)
            else self.row(pass_, c, QUARANTINED, elsewhere)
            for key, c in offered.items()
        ]

    # -- applying -------------------------------------------------------------------------

    def patch(self, pass_: Pass, candidate: Candidate, program: Program) -> Patch:
        """Apply one candidate to a copy and verify its structure.

        Raises `Declined` when the rewrite does, `PassFault` when it breaks the contract: what it
        made is not valid ONNX, say, or has another interface than the teacher.
        """
        return patch_of(pass_, candidate, program, self.seconds(pass_, program), self.teacher)

    def attempt(self, pass_: Pass, candidate: Candidate, program: Program) -> Patch | Refusal:
        """The verified patch, or why there is none. Raises `PassFault` as `patch` does."""
        try:
            patch = self.patch(pass_, candidate, program)
        except Declined as reason:
            return Refusal(DECLINED, str(reason))
        return Refusal(DECLINED, "it changed nothing") if patch.empty else patch

    def apply_exact(self, pass_: Pass, program: Program, *, record: bool = True) -> Program:
        """Take every exact candidate of the pass that is not predicted slower.

        Structure and numbers are verified once for all of them, and again in ever smaller parts
        when that fails, so that the one that is wrong is named. Raises `PassFault`.
        """
        from optcompiler.exact import Exact

        candidates = self.propose(pass_, program, record=record)
        after, rows = Exact(self, pass_).take(candidates, program)
        if record:
            for candidate, row in rows:
                self.ledger.add(row)
                if row.outcome == TAKEN:
                    self.history.append((pass_, candidate))
        return after

    def difference(
        self, candidate: Candidate, before: Program, after: Program
    ) -> tuple[float, str]:
        """How far `after` is from `before` on the check batch, as the candidate asks to be judged,
        and in words.

        In a deep quantised program one level that flips early flips many later: then `typical`
        also passes, as 0, when `after` is no further from the teacher than `before` was. A program
        that cannot be run is infinitely far.
        """
        old = self.outputs(before)
        simulated = self.simulated
        try:
            new = [self.run(after, self.check)]
            if len(new[0]) != len(old[0]):
                raise ValueError(f"{len(new[0])} outputs instead of {len(old[0])}")
        except Exception as error:
            self.simulated = simulated
            return float("inf"), f"cannot be run: {type(error).__name__}: {error}"
        error = largest_error(old, new) if not candidate.typical else typical_error(old, new)
        if candidate.typical and not error <= candidate.rtol:
            teacher = [self.run(self.teacher, self.check)]
            if typical_error(teacher, new) <= FURTHER * typical_error(teacher, old):
                error = 0.0
        if error <= candidate.rtol:
            self._outputs = (after, new)
        return error, (
            f"outputs differ by {error:.1e} (relative), more than the {candidate.rtol:.0e} that it "
            f"declares."
        )

    def require_sound(self, pass_: Pass, candidate: Candidate, patch: Patch) -> None:
        """Raise `PassFault` when an exact patch computes something else, or any cannot be run."""
        with blaming(pass_, patch.before, candidate):
            if candidate.exact:
                error, words = self.difference(candidate, patch.before, patch.after)
                if not error <= candidate.rtol:
                    raise PassFault(NUMBERS, f"{patch.label}: {words}")
                return
            try:
                self.run(patch.after, self.check)
            except Exception as error:
                raise _cannot_run(patch, error) from error

    def damage_of(self, judge: Judge, pass_: Pass, candidate: Candidate, patch: Patch) -> float:
        """The damage that a patch does. Raises `PassFault` when what it made cannot be run."""
        with blaming(pass_, patch.before, candidate):
            try:
                return self.choices.number(
                    f"damage: {patch.label}", lambda: judge.damage(patch.after)
                )
            except Exception as error:
                raise _cannot_run(patch, error) from error


def _cannot_run(patch: Patch, error: Exception) -> PassFault:
    why = f"{type(error).__name__}: {error}"
    return PassFault(INVALID, f"{patch.label}: what it made cannot be run: {why}.")


def judge_of(session: Session, batches: Sequence[Batch], measure: str) -> Judge:
    """A judge of the session's teacher on the given batches."""
    return Judge(session.teacher, batches, session.context.ops, measure)


Scorer = Callable[[Program], float]
"""The user's metric of a program, run through the FX executor."""
