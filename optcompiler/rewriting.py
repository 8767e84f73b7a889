"""The contract of a pass: it proposes candidates, the planner chooses, the core applies.

A pass author subclasses `Pass` as a frozen dataclass, yields `Candidate`s and `Decline`s from
`propose`, and writes each candidate's `rewrite` as a plain function that edits the program it is
handed. That program is always a private copy, so a rewrite needs no undo: the core diffs the copy
against the original into a `Patch`, verifies it, and throws it away when it does not hold.
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np
import onnx_ir as ir

from optcompiler.choices import Choices
from optcompiler.errors import INVALID, Declined, InputError, PassFault, PluginError
from optcompiler.foreign import contained, told
from optcompiler.program import Program

if TYPE_CHECKING:
    from optcompiler.backend import Capabilities, Kernel
    from optcompiler.observers import Observer
    from optcompiler.ops import OpTable
    from optcompiler.target import Target

__all__ = [
    "Candidate", "Decline", "Declined", "Pass", "PassContext", "Patch", "Progress", "Stage",
    "apply_candidate", "guarded",
]  # fmt: skip


T = TypeVar("T")


class Stage(enum.IntEnum):
    """Where in a compile a pass's candidates are pooled; one stage is planned together."""

    CLEAN = 10
    """Exact and always right: constant folding, dead code, batch-norm folding, dead channels."""
    REDUCE = 20
    """Fewer channels, layers or ranks: shapes change, the function changes a little."""
    QUANTIZE = 30
    """Lower precision for tensors that keep their shapes."""
    TUNE = 40
    """Recover: adjusts values to bring the student back to the teacher; changes no structure."""
    FUSE = 50
    """Exact grouping for code generation; the last thing before a backend."""


@dataclass(frozen=True)
class Candidate:
    """One rewrite that a pass offers.

    `site` names what is rewritten (a node, a value, a channel group, or "program") and `choice`
    what is done there; with the pass's name they are the candidate's identity, stable from run to
    run. Candidates of a pass at the same site are alternatives, and so are those of all passes of
    stage QUANTIZE: the planner takes at most one.
    `nodes` are the names of the nodes that the site covers.

    `exact` says that the rewrite keeps the function: then the core checks its outputs against the
    original within `rtol` of the largest output. Otherwise the core measures its damage. With
    `typical`, `rtol` bounds the root mean square of the difference, relative to that of the output,
    instead of its largest element, and a larger change passes when it brings the program no further
    from the teacher: for rewrites of quantised programs, where a difference in the last bit moves a
    value here and there to the next level.

    `rewrite` edits the private copy it is given. It looks its site up by name, because other
    candidates may have been applied before it, and raises `Declined` when the site is gone. Many
    candidates of a pass may be applied to one copy before it is looked at, so a rewrite works where
    its site is and not through the whole program: what it leaves unused the core sweeps up. A pass
    that cannot do so gives its candidates one `together`, which does what the rewrites of several
    would one after another.
    """

    site: str
    choice: str
    rewrite: Callable[[Program], None]
    exact: bool
    nodes: tuple[str, ...] = ()
    rtol: float = 1e-4
    typical: bool = False
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    together: Callable[[Program, Sequence[Candidate]], None] | None = None


@dataclass(frozen=True)
class Decline:
    """A site that the pass looked at and left alone, with the reason."""

    site: str
    reason: str
    nodes: tuple[str, ...] = ()


class Progress(Protocol):
    """Where a long step reports: shows a bar with an ETA on a terminal, and nothing otherwise."""

    def track(self, items: Sequence[Any], description: str) -> Iterator[Any]: ...
    def note(self, message: str) -> None: ...


Batch = Mapping[str, "np.ndarray"]
"""Inputs by name, each with the batch dimension first."""


@dataclass(frozen=True)
class PassContext:
    """What a pass may ask while it proposes.

    `teacher` is the program as imported. `calibration` holds batches by input name (empty when
    none were given; a pass that needs them declines). `holdout` is a part of the calibration data
    kept apart for judging; it is empty when there is too little data. `precisions` are those the
    user allows *and* the target has. `price_us` predicts the latency of a program on the target;
    `kernels` says which kernels it becomes. `observers` are the calibration observers of all
    plugins by name. `choices` keeps what a pass measures, so that a locked compile repeats it.
    """

    target: Target
    capabilities: Capabilities
    precisions: frozenset[str]
    teacher: Program
    calibration: Sequence[Batch]
    holdout: Sequence[Batch]
    ops: OpTable
    seed: int
    progress: Progress
    kernels: Callable[[Program], Sequence[Kernel]]
    price_us: Callable[[Program], float]
    observers: Mapping[str, type[Observer]] = field(default_factory=dict)
    choices: Choices = field(default_factory=Choices)


class Pass(ABC):
    """A source of candidates. Subclasses are frozen dataclasses whose fields are their options."""

    name: ClassVar[str]
    """How the command line and the ledger call it: `insert-qdq` for `InsertQdq`."""
    stage: ClassVar[Stage]
    summary: ClassVar[str] = ""
    default: ClassVar[bool] = True
    """Whether the default pipeline holds it."""

    after: ClassVar[tuple[str, ...]] = ()
    """Passes of the same stage that run before this one when both are in the pipeline."""

    time_limit_s: ClassVar[float] = 60.0
    """Seconds that `propose`, and each rewrite, may take for every begun thousand of nodes. A pass
    whose time depends on the user's data (it calibrates, it trains) says infinity."""

    @abstractmethod
    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate | Decline]:
        """Yield what could be done to `program`, and what was looked at and left, with reasons.

        `program` must not be changed here.
        """

    def options(self) -> dict[str, Any]:
        """The options as plain values, for the ledger and the manifest; a function by its name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {
            k: getattr(v, "__qualname__", type(v).__name__) if callable(v) else v
            for k, v in values.items()
        }


@dataclass(frozen=True)
class Patch:
    """A labelled rewrite of one program into another, to be priced, verified, kept or dropped."""

    label: str
    before: Program
    after: Program
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed_weights: tuple[str, ...]

    @property
    def empty(self) -> bool:
        return not (self.added or self.removed or self.changed_weights)


def apply_candidate(
    pass_name: str, candidate: Candidate, program: Program, seconds: float = math.inf
) -> Patch:
    """Run `candidate.rewrite` on a copy of `program` and describe what it changed.

    Nodes that the rewrite adds are stamped with `pass_name` as their provenance. Raises `Declined`
    when the rewrite does, and `PassFault` naming the pass for anything else it raises, when it
    takes longer than `seconds`, and when it leaves something that is no program.
    """
    label = f"{pass_name}[{candidate.site}={candidate.choice}]"
    copy = program.clone()
    guarded(f"{label}: the rewrite", seconds, lambda: candidate.rewrite(copy))
    return patch_between(pass_name, label, program, copy)


def patch_between(pass_name: str, label: str, before: Program, after: Program) -> Patch:
    """What rewrites of a pass made of `before`, with their nodes stamped and weights read-only.

    What they left unused is removed. Raises `PassFault` when `after` is no program.
    """
    try:
        added, removed, changed = after.changes_since(before)
        if added or removed or changed:
            after.sweep()
            kept, weights = {str(n.name) for n in after.graph}, after.weights()
            added = tuple(name for name in added if name in kept)
            removed = tuple(str(n.name) for n in before.graph if n.name not in kept)
            changed = tuple(name for name in changed if name in weights)
        after.stamp(added, pass_name)
        freeze(after, changed)
    except Exception as error:
        raise PassFault(INVALID, f"{label}: the rewrite left no program: {told(error)}.") from error
    return Patch(label, before, after, added, removed, changed)


def guarded(what: str, seconds: float, call: Callable[[], T]) -> T:
    """`call()` of a pass; raises `PassFault` beginning with `what` for all that it must not do.

    What is not the pass's fault goes through: `Declined`, what the user must change
    (`InputError`), another plugin's fault, Ctrl-C.
    """
    return contained(
        call, lambda kind, did: PassFault(kind, f"{what} {did}."),
        seconds=seconds, allowed=(Declined, InputError, PluginError),
    )  # fmt: skip


def freeze(program: Program, names: Iterable[str]) -> None:
    """Make the arrays behind the named initializers read-only: other programs share them."""
    weights = program.weights()
    for name in names:
        tensor = weights[name]
        if isinstance(tensor, ir.Tensor) and isinstance(array := tensor.raw, np.ndarray):
            array.flags.writeable = False
