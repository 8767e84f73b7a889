"""Reproducers: the smallest program on which a pass breaks its contract, and all that replaying it
takes, in a directory.

    program.onnx        the program, shrunk
    inputs.npz          what it was run on, where numbers differed or the pass calibrates
    reproducer.json     pass, options and owner, candidate, what went wrong, target, seed, versions
    README.txt          the one command that replays it
"""

from __future__ import annotations

import hashlib
import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optcompiler._version import __version__
from optcompiler.errors import NUMBERS, OVERTIME, PassFault
from optcompiler.files import replacing_directory, to_json, write_text
from optcompiler.foreign import told
from optcompiler.program import Program
from optcompiler.rewriting import Candidate, Patch
from optcompiler.shrinking import shrink, weights_as_inputs
from optcompiler.synthesis import random_batch

if TYPE_CHECKING:
    from optcompiler.rewriting import Batch, Pass
    from optcompiler.session import Fault, Session

FORMAT = 1
RECORD = "reproducer.json"
SECONDS = 20.0
TESTS = 400

PATIENCE_S = 2.0
"""A pass that does not end is given this long in each test of a shrunk program."""

MOST_BYTES = 1 << 28
"""Weights and inputs beyond this are left out, and values inside the program not looked at."""


def trial(
    session: Session, pass_: Pass, program: Program, site: str, choice: str
) -> PassFault | None:
    """Let the pass propose on `program` and apply one candidate, as a compile would: its fault.

    Without a site, proposing is all. None when it keeps its contract or has no such candidate.
    """
    try:
        for item in session.proposed(pass_, program):
            if not isinstance(item, Candidate) or (item.site, item.choice) != (site, choice):
                continue
            patch = session.attempt(pass_, item, program)
            if isinstance(patch, Patch):
                session.require_sound(pass_, item, patch)
    except PassFault as fault:
        return fault
    return None


# -- writing ----------------------------------------------------------------------------------


def write_reproducer(
    session: Session, pass_: Pass, fault: Fault, program: Program, directory: Path
) -> Fault:
    """Write a reproducer under `directory` and return the fault with its path.

    Takes `SECONDS` at most, and bounded space. A reproducer that cannot be written never costs the
    compile: the fault then says why.
    """
    try:
        return replace(fault, reproducer=_write(session, pass_, fault, program, directory))
    except Exception as error:
        return replace(fault, unwritten=f"{told(error)}.")


def _write(session: Session, pass_: Pass, fault: Fault, program: Program, directory: Path) -> Path:
    case = _Case.of(session, pass_, fault, program)
    least, tests = program, 0
    again = case.fails(program)
    if again:
        least, tests = shrink(program, case.fails, focus=case.focus, seconds=SECONDS, tests=TESTS)
    left_out = least.weight_bytes > MOST_BYTES
    if left_out:
        least = weights_as_inputs(least, list(least.weights()))
    inputs = case.batch(least) if case.needs_inputs and not left_out else None
    record = recorded(session, pass_, fault) | {
        "time_limit_s": case.patience,
        "shown_again": again,
        "weights_left_out": left_out,
        "nodes": {"before": len(program.graph), "after": len(least.graph)},
        "tests": tests,
    }
    place = directory / _name(record, program)
    store(place, record, _readme(record, place), {"program.onnx": least}, inputs)
    return place


def recorded(session: Session, pass_: Pass, fault: Fault) -> dict[str, Any]:
    """What every reproducer says of the pass, the candidate and the session."""
    return {
        "format": FORMAT,
        "pass": pass_.name,
        "options": pass_.options(),
        "owner": fault.owner,
        "site": fault.site,
        "choice": fault.choice,
        "kind": fault.kind,
        "reason": fault.reason,
        "time_limit_s": session.limit_s(pass_),
        "target": str(session.target),
        "precisions": sorted(session.context.precisions),
        "calibrated": bool(session.context.calibration),
        "seed": session.context.seed,
        "versions": {
            "optcompiler": __version__, "python": platform.python_version(),
            **session.backend.versions(),
        },
    }  # fmt: skip


def store(
    place: Path, record: Mapping[str, Any], readme: str, programs: Mapping[str, Program],
    inputs: Batch | None,
) -> None:  # fmt: skip
    """Write a reproducer in one step; inputs beyond `MOST_BYTES` are left out."""
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with replacing_directory(place, lambda _: None, mode=0o700) as fresh:
        for name, program in programs.items():
            program.save(fresh / name)
        if inputs is not None and sum(a.nbytes for a in inputs.values()) <= MOST_BYTES:
            np.savez(fresh / "inputs.npz", **inputs)  # pyright: ignore[reportArgumentType]
        write_text(fresh / RECORD, to_json(record))
        write_text(fresh / "README.txt", readme)


def _name(record: Mapping[str, Any], program: Program) -> str:
    """The same fault on the same program has the same name, however far it was shrunk."""
    keys = ("pass", "options", "owner", "site", "choice", "kind", "target", "precisions", "seed")
    facts = to_json([record[k] for k in keys]) + "\n".join(program.structure())
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _readme(record: Mapping[str, Any], place: Path) -> str:
    shown = "" if record["shown_again"] else "\nIt did not show again when tried once more.\n"
    weights = "\nThe weights were too large to keep; they are inputs.\n"
    return (
        f"{record['reason']}\n\nReplay it with\n\n"
        f"    optcompiler replay {shlex.quote(str(place))}\n\n"
        f"which ends with 0 when the pass no longer fails here, with 1 when it does, and with 5\n"
        f"when the pass is not installed.\n"
        + shown
        + (weights if record["weights_left_out"] else "")
    )


@dataclass
class _Case:
    """One fault, and whether a part of the program still shows it."""

    session: Session
    pass_: Pass
    fault: Fault
    values: Mapping[str, np.ndarray]
    patience: float
    focus: tuple[str, ...]

    @classmethod
    def of(cls, session: Session, pass_: Pass, fault: Fault, program: Program) -> _Case:
        patience = session.limit_s(pass_)
        if fault.kind == OVERTIME:
            patience = min(patience, PATIENCE_S)
        case = cls(session, pass_, fault, {}, patience, (fault.site, *fault.nodes))
        if case.needs_inputs:
            case.values = observed(session, program)
        return case

    @property
    def needs_inputs(self) -> bool:
        return self.fault.kind == NUMBERS or bool(self.session.context.calibration)

    def batch(self, program: Program) -> dict[str, np.ndarray]:
        """Inputs of a part: what its inputs held in the whole program, else seeded ones."""
        missing = [p for p in program.inputs if p.name not in self.values]
        known = {p.name: self.values[p.name] for p in program.inputs if p.name in self.values}
        return known | random_batch(missing, seed=self.session.context.seed)

    def fails(self, program: Program) -> bool:
        program.verify()
        session = self.session.about(program, self.batch(program))
        session.time_limit_s = self.patience
        found = trial(session, self.pass_, program, self.fault.site, self.fault.choice)
        return found is not None and found.kind == self.fault.kind


def observed(session: Session, program: Program) -> dict[str, np.ndarray]:
    """Every tensor of the main graph on the check batch, by name; only what is given and stored
    where the program cannot be run or holds too much."""
    values = {name: np.asarray(array) for name, array in session.check.items()}
    values |= {n: t.numpy() for n, t in program.weights().items() if t.nbytes <= MOST_BYTES}
    whole = program.clone()
    inner = [v for node in whole.graph for v in node.outputs if v.name and v.shape is not None]
    size = sum(int(np.prod([d if isinstance(d, int) else 1 for d in v.shape or ()])) for v in inner)
    if 4 * size > MOST_BYTES:
        return values
    shown = {v.name for v in whole.graph.outputs}
    whole.graph.outputs.extend(v for v in inner if v.name not in shown)
    try:
        tensors = session.run(whole, session.check)
    except Exception as error:
        session.progress.note(f"values inside the program are unknown: {error}")
        return values
    names = [p.name for p in whole.outputs]
    if len(names) == len(tensors):
        values |= {n: t.numpy() for n, t in zip(names, tensors, strict=True)}
    return values
