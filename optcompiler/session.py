"""The state of one compile, and the one way in which a candidate changes a program."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from optcompiler.backend import Backend, Kernel
from optcompiler.binding import bind
from optcompiler.cost import CostModel, DeviceProfile
from optcompiler.damage import (
    Judge,
    Outputs,
    as_tensors,
    largest_error,
    run_batches,
    typical_error,
)
from optcompiler.errors import Declined, PluginError, UnsupportedOperatorError, VerificationError
from optcompiler.ledger import DECLINED, REJECTED, ROLLED_BACK, TAKEN, Ledger, Row
from optcompiler.program import Program
from optcompiler.rewriting import (
    Batch,
    Candidate,
    Decline,
    Pass,
    PassContext,
    Patch,
    Progress,
    Stage,
    apply_candidate,
)
from optcompiler.target import Target

FURTHER = 1.1
"""A rewrite of a quantised program may bring it this much further from the teacher."""

SLOWER_SHARE = 0.01
"""A fusion predicted to slow the program by more than this share is rejected. Clean-up is not: what
it opens to later passes is in no prediction."""


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
    _outputs: tuple[Program, list[Outputs]] | None = None
    _prices: dict[int, tuple[Program, float]] = field(
        default_factory=dict[int, tuple[Program, float]]
    )

    @property
    def progress(self) -> Progress:
        return self.context.progress

    def bound(self, program: Program) -> Program:
        """The program with the target's sizes, as the backend sees it."""
        return bind(program, self.target.sizes)

    def kernels(self, program: Program) -> Sequence[Kernel]:
        return self.backend.kernels(self.bound(program), self.target)

    def price_us(self, program: Program) -> float:
        """Predicted microseconds of one call; infinite for a program the backend cannot lower."""
        known = self._prices.get(id(program))
        if known is None or known[0] is not program:
            try:
                price = self.cost_model.program_us(self.kernels(program), self.profile)
            except UnsupportedOperatorError:
                price = float("inf")
            self._prices[id(program)] = known = (program, price)
            while len(self._prices) > 8:
                self._prices.pop(next(iter(self._prices)))
        return known[1]

    def saving_us(self, before: Program, after: Program) -> float | None:
        """Predicted microseconds saved; None where the backend cannot lower one of the programs."""
        old, new = self.price_us(before), self.price_us(after)
        return old - new if max(old, new) < float("inf") else None

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
        with tempfile.TemporaryDirectory(prefix="optcompiler-check-") as scratch:
            info = self.backend.lower(self.bound(program), self.target, Path(scratch))
            runner = self.backend.load(Path(scratch), info, threads=self.target.threads)
            try:
                return as_tensors(runner.run(batch))
            finally:
                runner.close()

    # -- proposals ------------------------------------------------------------------------

    def propose(self, pass_: Pass, program: Program, *, record: bool = True) -> list[Candidate]:
        """The pass's candidates on `program`; what it declines goes to the ledger."""
        try:
            offered = list(pass_.propose(program, self.context))
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:
            raise PluginError(
                f"{pass_.name}: propose raised {type(error).__name__}: {error}; report it to the "
                f"author of the pass, or leave the pass out."
            ) from error
        candidates: dict[tuple[str, str], Candidate] = {}
        for item in offered:
            if isinstance(item, Decline):
                if record:
                    self.ledger.add(
                        Row(pass_.name, item.site, "-", DECLINED, item.reason, nodes=item.nodes)
                    )
            elif isinstance(item, Candidate):  # pyright: ignore[reportUnnecessaryIsInstance]
                if (item.site, item.choice) in candidates:
                    raise PluginError(
                        f"{pass_.name}: site {item.site!r} with choice {item.choice!r} is proposed "
                        f"twice; make choices of one site distinct."
                    )
                candidates[item.site, item.choice] = item
            else:
                raise PluginError(
                    f"{pass_.name}: propose gave {type(item).__name__}; yield Candidate or Decline."
                )
        return list(candidates.values())

    def row(self, pass_: Pass, candidate: Candidate, outcome: str, reason: str) -> Row:
        return Row(
            pass_.name, candidate.site, candidate.choice, outcome, reason,
            exact=candidate.exact, nodes=candidate.nodes, details=dict(candidate.details),
        )  # fmt: skip

    # -- applying -------------------------------------------------------------------------

    def patch(self, pass_: Pass, candidate: Candidate, program: Program) -> Patch:
        """Apply one candidate to a copy and verify its structure.

        Raises `Declined` when the rewrite does, `VerificationError` when what it made is not valid
        ONNX or has another interface than the teacher.
        """
        patch = apply_candidate(pass_.name, candidate, program)
        if not patch.empty:
            try:
                patch.after.verify(like=self.teacher)
            except VerificationError as error:
                raise VerificationError(f"{patch.label}: {error}") from error
        return patch

    def apply_exact(self, pass_: Pass, program: Program, *, record: bool = True) -> Program:
        """Take every exact candidate of the pass that verifies and is not predicted slower.

        Structure is verified after each; numbers are compared once at the end, and one by one when
        that fails, so that only what is wrong is rolled back.
        """
        candidates = self.propose(pass_, program, record=record)
        for candidate in candidates:
            if not candidate.exact:
                raise PluginError(
                    f"{pass_.name}: stage {pass_.stage.name} holds exact passes only, but the "
                    f"candidate at {candidate.site!r} is not exact."
                )
        after, rows = self._take(pass_, candidates, program, each=False)
        if after is not program:
            declared = max(candidates, key=lambda c: (c.typical, c.rtol))
            if not self._error(declared, program, after) <= declared.rtol:
                after, rows = self._take(pass_, candidates, program, each=True)
        if record:
            for row in rows:
                self.ledger.add(row)
        return after

    def _error(self, candidate: Candidate, before: Program, after: Program) -> float:
        """How far `after` is from `before` on the check batch, as the candidate asks to be judged.

        In a deep quantised program one level that flips early flips many later: then `typical`
        also passes, as 0, when `after` is no further from the teacher than `before` was.
        """
        old = self.outputs(before)
        new = [self.run(after, self.check)]
        if not candidate.typical:
            return largest_error(old, new)
        error = typical_error(old, new)
        if error <= candidate.rtol:
            return error
        teacher = [self.run(self.teacher, self.check)]
        no_further = typical_error(teacher, new) <= FURTHER * typical_error(teacher, old)
        return 0.0 if no_further else error

    def _take(
        self, pass_: Pass, candidates: Sequence[Candidate], program: Program, *, each: bool
    ) -> tuple[Program, list[Row]]:
        rows: list[Row] = []
        for candidate in candidates:
            try:
                patch = self.patch(pass_, candidate, program)
                if each:
                    error = self._error(candidate, program, patch.after)
                    if not error <= candidate.rtol:
                        raise VerificationError(
                            f"{patch.label}: outputs differ by {error:.1e} (relative), more than "
                            f"the {candidate.rtol:.0e} that it declares."
                        )
            except Declined as reason:
                rows.append(self.row(pass_, candidate, DECLINED, str(reason)))
                continue
            except VerificationError as error:
                rows.append(self.row(pass_, candidate, ROLLED_BACK, str(error)))
                continue
            if patch.empty:
                rows.append(self.row(pass_, candidate, DECLINED, "it changed nothing"))
                continue
            saving = self.saving_us(program, patch.after)
            slower = saving is not None and saving < -SLOWER_SHARE * self.price_us(program)
            if slower and pass_.stage is not Stage.CLEAN:
                reason = f"predicted {-(saving or 0.0):.1f} µs slower"
                rows.append(replace(self.row(pass_, candidate, REJECTED, reason), saving_us=saving))
                continue
            reason = candidate.note or "exact"
            rows.append(replace(self.row(pass_, candidate, TAKEN, reason), saving_us=saving))
            program = patch.after
        return program, rows


def judge_of(session: Session, batches: Sequence[Batch], measure: str) -> Judge:
    """A judge of the session's teacher on the given batches."""
    return Judge(session.teacher, batches, session.context.ops, measure)


Scorer = Callable[[Program], float]
"""The user's metric of a program, run through the FX executor."""
