"""Doing again what a reproducer records, in another process, on another day."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optcompiler.bisecting import Check, applied_to
from optcompiler.compiler import session_for
from optcompiler.errors import CHECK, InputError, PassFault, PluginError
from optcompiler.pipeline import from_options
from optcompiler.program import Program
from optcompiler.reproducer import FORMAT, RECORD, trial
from optcompiler.synthesis import random_batch

if TYPE_CHECKING:
    from optcompiler.plugins import Registry
    from optcompiler.rewriting import Batch, Pass
    from optcompiler.session import Session


@dataclass(frozen=True)
class Replay:
    """What came of replaying a reproducer; `fault` is None when the pass no longer fails."""

    record: Mapping[str, Any]
    owner: str
    fault: PassFault | None


def replay(directory: Path, registry: Registry, check: Check | None = None) -> Replay:
    """Do again what the reproducer in `directory` records.

    `check` judges programs, as in `bisecting.bisect`, and is needed for what that wrote. Raises
    `InputError` for what is no reproducer or lacks its check, and `PluginError` when the pass is
    not installed.
    """
    record = _read(directory)
    program = Program.from_onnx(directory / "program.onnx")
    name = record["pass"]
    if name not in registry.passes:
        raise PluginError(
            f"pass {name!r} of {record['owner']} is not installed; install that distribution and "
            f"replay again."
        )
    pass_ = from_options(registry.pass_class(name), record["options"])
    session = session_for(
        program, registry, target=record["target"], precisions=frozenset(record["precisions"]),
        batch=_inputs(directory, program, record["seed"]), calibrated=record["calibrated"],
        seed=record["seed"],
    )  # fmt: skip
    session.time_limit_s = float(record["time_limit_s"])
    if record["kind"] == CHECK:
        fault = _judged(session, pass_, program, record, check)
    else:
        fault = trial(session, pass_, program, record["site"], record["choice"])
    return Replay(record, registry.owner_of_pass(name), fault)


def _judged(
    session: Session, pass_: Pass, program: Program, record: Mapping[str, Any], check: Check | None
) -> PassFault | None:
    if check is None:
        raise InputError(
            f"this shows with a check of yours; give it again with --check {record['check']!r}."
        )
    if check(program) is not True:
        raise InputError(f"the check fails before {pass_.name} does anything; mend the check.")
    try:
        key = (record["site"], record["choice"])
        after = applied_to(session, pass_, key, program, record["part"] or None)
    except PassFault as fault:
        return fault
    if after is None or check(after) is not False:
        return None
    return PassFault(CHECK, record["reason"])


def _inputs(directory: Path, program: Program, seed: int) -> Batch:
    path = directory / "inputs.npz"
    if not path.exists():
        return random_batch(program.inputs, seed=seed)
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "pass": str, "options": dict, "owner": str, "site": str, "choice": str, "kind": str,
    "reason": str, "time_limit_s": (int, float, str), "target": str, "precisions": list,
    "calibrated": bool, "seed": int,
}  # fmt: skip


def _read(directory: Path) -> dict[str, Any]:
    path = directory / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{directory} is no reproducer: {path.name}: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}.") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{path} is no reproducer of format {FORMAT}.")
    fields = _FIELDS | ({"check": str, "part": list} if record.get("kind") == CHECK else {})
    for field, kind in fields.items():
        if not isinstance(record.get(field), kind):
            raise InputError(f"{path}: {field!r} is {record.get(field)!r}; the file was altered.")
    return record
