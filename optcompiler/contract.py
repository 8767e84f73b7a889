"""Holding a pass to its contract: what it proposes and rewrites is checked, and all that goes wrong
becomes a `PassFault` that names the pass.

A pass sees copies: proposing gets a program of its own, a rewrite another, and the arrays that they
share with the compile's are read-only.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from optcompiler.errors import INVALID, NONSENSE, PassFault, VerificationError
from optcompiler.foreign import told
from optcompiler.program import Program
from optcompiler.rewriting import (
    Batch,
    Candidate,
    Decline,
    Pass,
    PassContext,
    Patch,
    Stage,
    apply_candidate,
    guarded,
)

MOST_OFFERS = (10_000, 100)
"""A pass may yield this many candidates and declines, and this many more for every node."""

EXACT = (Stage.CLEAN, Stage.FUSE)
"""Stages that hold exact candidates only."""

LOOSEST_RTOL = 0.1
"""What a candidate that calls itself exact may ask to be judged by."""


@contextmanager
def blaming(pass_: Pass, program: Program, candidate: Candidate | None = None) -> Generator[None]:
    """Faults that come out of the block say whose they are, and on which program."""
    try:
        yield
    except PassFault as fault:
        fault.by(pass_, program, candidate)
        raise


def proposals(
    pass_: Pass, program: Program, context: PassContext, seconds: float
) -> list[Candidate | Decline]:
    """What the pass yields, in order. Raises `PassFault` for what is not as `Candidate` says.

    The pass gets copies of the program and of all in the context that it could write to.
    """
    most = MOST_OFFERS[0] + MOST_OFFERS[1] * len(program.graph)
    own, context = program.clone(), private(context)

    def collect() -> list[Any]:
        offered: Any = pass_.propose(own, context)
        if not isinstance(offered, Iterable):
            raise PassFault(
                NONSENSE,
                f"{pass_.name}: propose gave {type(offered).__name__}; yield Candidate or Decline.",
            )
        found: list[Any] = []
        for item in cast("Iterable[Any]", offered):
            found.append(item)
            if len(found) > most:
                raise PassFault(NONSENSE, f"{pass_.name}: propose gave more than {most} items.")
        return found

    with blaming(pass_, program):
        found = guarded(f"{pass_.name}: propose", seconds, collect)
        seen: set[tuple[str, str]] = set()
        for item in found:
            wrong = _wrong_with(item)
            if not wrong and pass_.stage in EXACT and not getattr(item, "exact", True):
                wrong = (
                    f"a Candidate at {item.site!r} that is not exact, which stage "
                    f"{pass_.stage.name} has no room for"
                )
            if isinstance(item, Candidate) and not wrong:
                if (item.site, item.choice) in seen:
                    wrong = (
                        f"site {item.site!r} with choice {item.choice!r} twice; make choices of "
                        f"one site distinct"
                    )
                seen.add((item.site, item.choice))
            if wrong:
                raise PassFault(NONSENSE, f"{pass_.name}: propose gave {wrong}.")
    return found


def patch_of(
    pass_: Pass, candidate: Candidate, program: Program, seconds: float, like: Program
) -> Patch:
    """Apply one candidate to a copy of `program` and verify what it made.

    Raises `Declined` when the rewrite does, and `PassFault` when it raises anything else, does not
    end, or leaves what is not valid ONNX or has another interface than `like`.
    """
    with blaming(pass_, program, candidate):
        patch = apply_candidate(pass_.name, candidate, program, seconds)
        require_valid(patch, like)
    return patch


def require_valid(patch: Patch, like: Program) -> None:
    """Raise `PassFault` when a patch made what is no program with the interface of `like`."""
    try:
        patch.after.verify(like=like)
    except VerificationError as error:
        raise PassFault(INVALID, f"{patch.label}: {error}") from error
    except Exception as error:
        raise PassFault(INVALID, f"{patch.label}: no program: {told(error)}.") from error


def _wrong_with(item: Any) -> str:
    """What keeps `item` from being a candidate or a decline, "" when nothing does."""
    if isinstance(item, Decline):
        texts, kind = {"site": item.site, "reason": item.reason}, "a Decline"
    elif isinstance(item, Candidate):
        texts, kind = {"site": item.site, "choice": item.choice}, "a Candidate"
    else:
        return f"{type(item).__name__}; yield Candidate or Decline"
    for field, value in texts.items():
        if not isinstance(value, str) or not value:  # pyright: ignore[reportUnnecessaryIsInstance]
            return f"{kind} whose {field} is {value!r}, no text"
    nodes: Any = item.nodes
    if not isinstance(nodes, tuple) or not all(isinstance(n, str) for n in cast(Any, nodes)):
        return f"{kind} at {item.site!r} whose nodes are {nodes!r}, no tuple of names"
    return _wrong_candidate(item) if isinstance(item, Candidate) else ""


def _wrong_candidate(item: Candidate) -> str:
    kind = f"a Candidate at {item.site!r}"
    rtol: Any = item.rtol
    flags: tuple[Any, ...] = (item.exact, item.typical)
    if not callable(item.rewrite):
        return f"{kind} whose rewrite is {item.rewrite!r}, no function"
    if not all(isinstance(flag, (bool, np.bool_)) for flag in flags):
        return f"{kind} whose exact and typical are {flags}, not true or false"
    if not isinstance(rtol, (int, float)) or not 0 <= rtol <= LOOSEST_RTOL:
        return f"{kind} with rtol {rtol!r}, not between 0 and {LOOSEST_RTOL}"
    if not isinstance(item.details, Mapping) or not isinstance(item.note, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        return f"{kind} whose details are no mapping or whose note is no text"
    return ""


# -- what is shared, and so read-only ---------------------------------------------------------


def protected(program: Program) -> Program:
    """A copy whose weights cannot be written through; the memory is shared with `program`.

    `program` and the arrays that it was made of stay as they are.
    """
    twin = program.clone()
    for graph in twin.model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.Tensor):
                continue
            array = tensor.numpy()
            if array.flags.writeable:
                held = ir.Tensor(
                    protected_array(array), tensor.dtype, shape=tensor.shape, name=tensor.name
                )
                held.meta.update(tensor.meta)
                value.const_value = held
    return twin


def private(context: PassContext) -> PassContext:
    """A context with copies of its containers; arrays are shared."""
    return replace(
        context, teacher=context.teacher.clone(), observers=dict(context.observers),
        calibration=[dict(b) for b in context.calibration],
        holdout=[dict(b) for b in context.holdout],
    )  # fmt: skip


def protected_array(array: np.ndarray) -> np.ndarray:
    """A read-only view."""
    view = array.view()
    view.flags.writeable = False
    return view


def protected_batch(batch: Batch) -> Batch:
    """The batch with read-only views of its arrays."""
    return {
        name: protected_array(value) if isinstance(value, np.ndarray) else value  # pyright: ignore[reportUnnecessaryIsInstance]
        for name, value in batch.items()
    }
