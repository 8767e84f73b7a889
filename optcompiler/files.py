"""Files that are never half-written: hashes, JSON of one spelling, atomic replacement."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import enum
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Generator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, cast

from optcompiler.errors import InputError

_CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; reads it in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """`value` in JSON's own types: numpy scalars, sets, tuples, enums, paths and dataclasses too.

    Infinities and NaN, which JSON has no spelling for, become the strings "inf", "-inf", "nan".
    Any other object is named by its class, a function by its own name, as "<module.name>".
    """
    if value is None or (isinstance(value, (bool, int, str)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in cast("list[Any]", value)]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(v) for v in cast("set[Any]", value)), key=repr)
    tolist = getattr(value, "tolist", None)
    if tolist is not None:
        return plain(tolist())
    named = cast("Any", value if hasattr(value, "__qualname__") else type(value))
    return f"<{named.__module__}.{named.__qualname__}>"


def to_json(value: Any) -> str:
    """JSON text of `plain(value)`: keys sorted, ASCII, one trailing newline."""
    return json.dumps(plain(value), indent=1, sort_keys=True, allow_nan=False) + "\n"


def number(value: Any) -> float | None:
    """A float read back from `to_json`'s text: undoes the strings for infinities and NaN."""
    return None if value is None else float(value)


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` (UTF-8, LF line ends) in one step; readers see old or new."""
    path = Path(path)
    fresh = _sibling(path, "tmp")
    try:
        with fresh.open("xb") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def files_under(directory: Path) -> list[str]:
    """Relative POSIX paths of every file below `directory`, sorted; links are not followed."""
    found: list[str] = []
    for root, folders, names in os.walk(directory):
        linked = [f for f in folders if Path(root, f).is_symlink()]
        found += [Path(root, n).relative_to(directory).as_posix() for n in (*names, *linked)]
    return sorted(found)


def inside(directory: Path, relative: str) -> Path:
    """`directory / relative`; raises `InputError` when that leads out of `directory`.

    Absolute paths, `..`, backslashes, drive letters and symbolic links that lead out are refused.
    """
    parts = PurePosixPath(relative).parts
    odd = not parts or relative.startswith("/") or ".." in parts or "\\" in relative
    path = directory / relative
    if odd or ":" in parts[0] or not path.resolve().is_relative_to(directory.resolve()):
        raise InputError(
            f"{directory}: the manifest names {relative!r}, which is not a path inside "
            f"the artifact; compile it again."
        )
    return path


def sync_tree(directory: Path) -> None:
    """Flush every file and folder below `directory`, and `directory` itself, to the disk."""
    for root, _, names in os.walk(directory):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    if path.is_dir() and sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing_directory(destination: Path, check: Callable[[Path], None]) -> Generator[Path]:
    """Give an empty sibling directory to fill; put it in the place of `destination` at the end.

    What is filled in is flushed to the disk before it gets its name. `check` is called with a
    `destination` that exists, before anything is written and again before it is replaced, and
    raises when it must not go. When the body raises, `destination` is as it was. The replacement is
    one exchange of names where the kernel has one (Linux); elsewhere the old directory is renamed
    aside first and comes back if the second rename fails.
    """
    destination = Path(os.path.realpath(destination))
    if os.path.lexists(destination):
        check(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        fresh = _sibling(destination, "new")
        fresh.mkdir()
    except OSError as error:
        raise InputError(
            f"cannot write beside {destination}: {error.strerror}; choose another place."
        ) from error
    try:
        yield fresh
        sync_tree(fresh)
        _put_in_place(fresh, destination, check)
        _sync(destination.parent)
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)


def _put_in_place(fresh: Path, destination: Path, check: Callable[[Path], None]) -> None:
    """Afterwards `fresh` is gone or holds what `destination` was."""
    if not os.path.lexists(destination):
        try:
            fresh.rename(destination)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    check(destination)
    if _exchange(fresh, destination):
        return
    aside = _sibling(destination, "old")
    destination.rename(aside)
    try:
        fresh.rename(destination)
    except BaseException:
        aside.rename(destination)
        raise
    aside.rename(fresh)


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    result = rename(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    return result == 0


def _sibling(path: Path, suffix: str) -> Path:
    """A hidden name beside `path` that nothing has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.{suffix}")
