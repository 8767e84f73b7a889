"""The lock of an artifact: what it was made from and all that was measured, to make it once more.

`lock.json` holds

    made_from   hashes of the model and of the data, target, options
    versions    of what can change a byte
    arithmetic  threads and instruction set of the compile's own arithmetic
    profile     the device profile, with those measured kernels that were looked up
    measured    the answers of `Choices`
    gives       hashes of the final program and of the code
    sha256      of all of the above, as it is written

A compile under a lock measures nothing, and ends in the same bytes or in an error that says what
does not fit.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

from optcompiler.checking import LOCK_FORM, check_form
from optcompiler.errors import InputError, VerificationError
from optcompiler.files import plain, to_json
from optcompiler.target import Target
from optcompiler.untrusted import json_of

if TYPE_CHECKING:
    import numpy as np

    from optcompiler.backend import Backend

FORMAT = "optcompiler-lock"
FORMAT_VERSION = 1
NAME = "lock.json"

MOST_BYTES = 1 << 28
MOST_THREADS = 4096

SHOWN = 3
"""Differences that an error names."""

AGAIN = "compile without the lock to get a new one."

PACKAGES = (
    "optcompiler", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "ml-dtypes",
    "networkx", "safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Lock:
    """One lock; the fields are those of the file."""

    made_from: Mapping[str, Any]
    versions: Mapping[str, str]
    arithmetic: Mapping[str, Any]
    profile: Mapping[str, Any]
    measured: Mapping[str, Any]
    gives: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        content = {f.name: plain(getattr(self, f.name)) for f in fields(self)}
        content |= {"format": FORMAT, "format_version": FORMAT_VERSION}
        return content | {"sha256": _seal(content)}

    @property
    def target(self) -> Target:
        return Target.parse(self.made_from["target"])

    @property
    def threads(self) -> int:
        """How many threads the compile's own arithmetic ran with."""
        return self.arithmetic["threads"]

    def require(self, made_from: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        """Raise `InputError` naming what differs from what was locked."""
        found = [
            *differences(plain(self.made_from), plain(made_from)),
            *differences(plain(self.versions), plain(versions), "version"),
        ]
        if not found:
            return
        named = [
            f"{where} is {_short(here)}, locked is {_short(locked)}"
            for where, locked, here in found[:SHOWN]
        ]
        more = f", and {len(found) - SHOWN} more differences" if len(found) > SHOWN else ""
        raise InputError(f"the lock does not fit: {', '.join(named)}{more}; {AGAIN}")

    def require_same(self, gives: Mapping[str, str]) -> None:
        """Raise `VerificationError` when a compile under this lock ended in something else."""
        if dict(gives) == dict(self.gives):
            return
        here = arithmetic()["instructions"]
        if gives["program"] == self.gives["program"]:
            cause = "the program is the locked one, but the code made of it is not the same bytes"
        elif here != self.arithmetic["instructions"]:
            cause = (
                f"the program differs from the locked one, whose numbers were computed with "
                f"{self.arithmetic['instructions']} instructions, here with {here}"
            )
        else:
            cause = "the program differs from the locked one in structure or weights"
        raise VerificationError(f"{cause}; {AGAIN}")


def arithmetic() -> dict[str, Any]:
    """Threads and instruction set that torch computes with here."""
    import torch

    return {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


@contextlib.contextmanager
def arithmetic_threads(count: int) -> Generator[None]:
    """Let torch compute with `count` threads, and afterwards with as many as before: sums come out
    otherwise in the last digits when they are divided otherwise."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def versions_of(backend: Backend) -> dict[str, str]:
    """Versions of what can change an artifact: Python, packages, the backend's tools."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | dict(backend.versions())


def data_hash(batches: Sequence[Mapping[str, np.ndarray]]) -> str:
    """SHA-256 over names, types, shapes and elements."""
    import numpy as np

    digest = hashlib.sha256()
    for batch in batches:
        for name, array in sorted(batch.items()):
            listed: list[Any] = array if isinstance(array, list) else [array]
            digest.update(f"{name} {len(listed)}".encode())
            for item in listed:
                values = np.asarray(item)
                digest.update(repr((str(values.dtype), values.shape)).encode())
                digest.update(repr(values.tolist()).encode() if values.dtype == object
                              else np.ascontiguousarray(values).data)  # fmt: skip
    return digest.hexdigest()


# -- reading ----------------------------------------------------------------------------------


def read_lock(path: str | Path) -> Lock:
    """The lock in a file, or of an artifact. Raises `InputError` for anything else, and for one
    that was altered."""
    path = Path(path)
    if path.is_dir():
        from optcompiler.artifact import open_artifact

        open_artifact(path)
        path = path / NAME
    try:
        data = json_of(path, str(path), MOST_BYTES)
    except InputError as error:
        cause = str(error).partition("; ")[0]
        raise InputError(f"{cause}; give an artifact, or its {NAME}.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:  # pyright: ignore[reportUnknownMemberType]
        raise InputError(f"{path} is no lock of an artifact; give an artifact, or its {NAME}.")
    content = cast("dict[str, Any]", data)
    if content.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: lock format {content.get('format_version')!r}, this optcompiler reads "
            f"{FORMAT_VERSION}; {AGAIN}"
        )
    if content.pop("sha256", None) != _seal(content):
        raise InputError(
            f"{path} is not as it was written (its SHA-256 differs); restore it, or {AGAIN}"
        )
    check_form(content, LOCK_FORM, str(path))
    lock = Lock(**{f.name: content[f.name] for f in fields(Lock)})
    if not 1 <= lock.threads <= MOST_THREADS:
        raise InputError(f"{path}: {lock.threads} threads of arithmetic are out of range; {AGAIN}")
    return lock


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(content).encode()).hexdigest()


def differences(locked: Any, here: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ: a path of names and the two values, None where one is missing.

    Lists of dicts with a "name" are compared by that name.
    """
    if isinstance(locked, Mapping) and isinstance(here, Mapping):
        one, other = cast("Mapping[str, Any]", locked), cast("Mapping[str, Any]", here)
        for key in sorted({*one, *other}):
            yield from differences(one.get(key), other.get(key), f"{where} {key}".strip())
    elif _named(locked) and _named(here) and list(_by_name(locked)) == list(_by_name(here)):
        yield from differences(_by_name(locked), _by_name(here), where)
    elif locked != here:
        yield where, locked, here


def _named(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(
        isinstance(v, dict) and "name" in v for v in cast("list[Any]", value)
    )


def _by_name(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {str(item["name"]): item for item in items}


def _short(value: Any) -> str:
    if _named(value) and value:
        value = ", ".join(_by_name(value))
    text = "not given" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:60]}…"
