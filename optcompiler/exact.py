"""Taking the exact candidates of a pass, in time that grows with the program and not with its
square.

All candidates are applied to one copy, which is verified, priced and compared as a whole. Where
that fails, the candidates are split and the parts taken one after the other, down to the single one
that is at fault. So what a pass that keeps its contract costs is one copy, and what finding a fault
costs is a logarithm of copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import is_
from typing import TYPE_CHECKING

import onnx_ir as ir

from optcompiler.contract import require_valid
from optcompiler.errors import Declined, PassFault
from optcompiler.ledger import DECLINED, REJECTED, TAKEN, Row
from optcompiler.program import Program
from optcompiler.rewriting import Candidate, Pass, Patch, Stage, guarded, patch_between
from optcompiler.session import Refusal

if TYPE_CHECKING:
    from optcompiler.session import Session

SLOWER_SHARE = 0.01
"""A fusion predicted to slow the program by more than this share is rejected. Clean-up is not: what
it opens to later passes is in no prediction."""

NOTHING = "it changed nothing"

Outcome = list[tuple[Candidate, Row]]


@dataclass(frozen=True)
class Split:
    """Where the candidates are to be parted, because together they do not hold."""

    cuts: tuple[int, ...]


@dataclass(frozen=True)
class Exact:
    """The exact candidates of one pass in one session."""

    session: Session
    pass_: Pass

    def take(self, candidates: Sequence[Candidate], program: Program) -> tuple[Program, Outcome]:
        """The program with every candidate that declines nothing and is not predicted slower, and a
        row for each in order. Raises `PassFault` for the one that breaks the contract."""
        if len(candidates) < 2:
            rows: Outcome = []
            for candidate in candidates:
                program, row = self._one(candidate, program)
                rows.append((candidate, row))
            return program, rows
        found = self._together(candidates, program)
        if not isinstance(found, Split):
            return found
        rows = []
        for start, end in pairwise((0, *found.cuts, len(candidates))):
            program, some = self.take(candidates[start:end], program)
            rows += some
        return program, rows

    def _one(self, candidate: Candidate, program: Program) -> tuple[Program, Row]:
        session, pass_ = self.session, self.pass_
        patch = session.attempt(pass_, candidate, program)
        if isinstance(patch, Refusal):
            return program, session.row(pass_, candidate, patch.outcome, patch.reason)
        saving = session.saving_us(program, patch.after)
        row = self._judged(candidate, saving, program, _sizes(patch))
        if row.outcome != TAKEN:
            return program, row
        session.require_sound(pass_, candidate, patch)
        return patch.after, row

    def _together(
        self, candidates: Sequence[Candidate], program: Program
    ) -> tuple[Program, Outcome] | Split:
        session, pass_ = self.session, self.pass_
        halves = Split((len(candidates) // 2,))
        applied = self._apply(candidates, program)
        if isinstance(applied, Split):
            return applied
        patch, refused = applied
        if patch.empty:
            refused = dict.fromkeys(range(len(candidates)), NOTHING) | refused
        if refused:
            # What refuses may have edited before it did: the program is made anew without it.
            rest = [c for i, c in enumerate(candidates) if i not in refused]
            again = self._apply(rest, program)
            if isinstance(again, Split) or again[1] or not _alike(patch.after, again[0].after):
                return halves
            patch = again[0]
        try:
            if not patch.empty:
                require_valid(patch, session.teacher)
        except PassFault:
            return halves
        taken = [c for i, c in enumerate(candidates) if i not in refused]
        rows = self._rows(taken, patch)
        if any(row.outcome != TAKEN for _, row in rows):
            return self._without_rejected(candidates, rows, program)
        if not patch.empty:
            strictest = max(taken, key=lambda c: (c.typical, c.rtol))
            error, _ = session.difference(strictest, program, patch.after)
            if not error <= strictest.rtol:
                return halves
        known = {id(c): row for c, row in rows}
        outcome: Outcome = [
            (c, known[id(c)] if i not in refused else session.row(pass_, c, DECLINED, refused[i]))
            for i, c in enumerate(candidates)
        ]
        return (program if patch.empty else patch.after), outcome

    def _apply(
        self, candidates: Sequence[Candidate], program: Program
    ) -> tuple[Patch, dict[int, str]] | Split:
        """All rewrites on one copy, unverified, and by position why some are none.

        One that is not seen to change its nodes or their neighbours is taken to change nothing; the
        caller finds out whether that is so by leaving it out.
        """
        copy = program.clone()
        seconds = self.session.seconds(self.pass_, program)
        refused: dict[int, str] = {}
        halves = Split((len(candidates) // 2,))
        together = candidates[0].together if candidates else None
        if together is not None and all(c.together is together for c in candidates):
            try:
                guarded(f"{self.pass_.name}: together", seconds, lambda: together(copy, candidates))
                return patch_between(self.pass_.name, self.pass_.name, program, copy), refused
            except (Declined, PassFault):
                return halves
        for index, candidate in enumerate(candidates):
            label = f"{self.pass_.name}[{candidate.site}={candidate.choice}]: the rewrite"
            around = _around(copy, candidate)
            before = _looks(around)
            try:
                guarded(label, seconds, lambda c=candidate: c.rewrite(copy))
                after = _looks(around)
                if before and len(before) == len(after) and all(map(is_, before, after)):
                    refused[index] = NOTHING
            except Declined as reason:
                refused[index] = str(reason)
            except PassFault:
                return Split(tuple(i for i in (index, index + 1) if 0 < i < len(candidates)))
        try:
            return patch_between(self.pass_.name, self.pass_.name, program, copy), refused
        except PassFault:
            return halves

    def _judged(
        self, candidate: Candidate, saving: float | None, program: Program, did: str = "exact"
    ) -> Row:
        """The row of a candidate that is verified, by what it saves."""
        slower = saving is not None and saving < -SLOWER_SHARE * self.session.price_us(program)
        if slower and self.pass_.stage is not Stage.CLEAN:
            reason = f"predicted {-(saving or 0.0):.1f} µs slower"
            row = self.session.row(self.pass_, candidate, REJECTED, reason)
        else:
            row = self.session.row(self.pass_, candidate, TAKEN, candidate.note or did)
        return replace(row, saving_us=saving)

    def _rows(self, candidates: Sequence[Candidate], patch: Patch) -> Outcome:
        savings = self.session.savings_us(candidates, patch.before, patch.after)
        return [
            (c, self._judged(c, saving, patch.before))
            for c, saving in zip(candidates, savings, strict=True)
        ]

    def _without_rejected(
        self, candidates: Sequence[Candidate], rows: Outcome, program: Program
    ) -> tuple[Program, Outcome]:
        rejected = {id(c): row for c, row in rows if row.outcome == REJECTED}
        rest = [c for c in candidates if id(c) not in rejected]
        after, others = self.take(rest, program)
        known = rejected | {id(c): row for c, row in others}
        return after, [(c, known[id(c)]) for c in candidates]


def _sizes(patch: Patch) -> str:
    before, after = len(patch.before.graph), len(patch.after.graph)
    return f"{before} nodes become {after}" if before != after else "exact"


def _around(program: Program, candidate: Candidate) -> list[ir.Node]:
    """The nodes of a candidate and their neighbours."""
    found: dict[ir.Node | None, None] = {}
    for name in candidate.nodes:
        node = program.node(name)
        if node is not None:
            found[node] = None
            found |= dict.fromkeys(v.producer() for v in node.inputs if v is not None)
            found |= dict.fromkeys(reader for v in node.outputs for reader, _ in v.uses())
    return [node for node in found if node is not None]


def _looks(nodes: Sequence[ir.Node]) -> list[object]:
    """All that is to be seen on these nodes, compared by identity."""
    seen: list[object] = []
    for node in nodes:
        values = [v for v in (*node.inputs, *node.outputs) if v is not None]
        seen += [node.graph, node.domain, node.op_type, *node.attributes.values(), *values]
        seen += [part for v in values for part in (v.name, v.type, v.shape, v.const_value)]
    return seen


def _alike(one: Program, other: Program) -> bool:
    return list(one.structure()) == list(other.structure())
