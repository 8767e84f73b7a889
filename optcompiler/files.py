"""Files that are never half-written: hashes, JSON of one spelling, atomic replacement.

What has a name of its own is written under a hidden name beside it, flushed to the disk and
renamed. Whoever ends in between leaves the hidden name; the next to write there removes it.
"""

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
import stat
import sys
import traceback
from collections.abc import Callable, Generator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, cast

from optcompiler import claims
from optcompiler.errors import InputError

_CHUNK = 1 << 20

_LONGEST_PATH = 4096


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
    """Replace `path` with `text` (UTF-8, LF line ends) in one step; readers see old or new.

    Raises `InputError` where that cannot be done.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Like `write_text`, for bytes."""
    with replacing_file(path) as fresh:
        fresh.write_bytes(data)


@contextlib.contextmanager
def replacing_file(path: Path, mode: int = 0o666) -> Generator[Path]:
    """Give the path of an empty file to fill; put it in the place of `path` at the end.

    Links are followed, and the permissions of a file that is replaced are kept. When the body
    raises, `path` is as it was. Raises `InputError` where `path` cannot be written or is no file.
    """
    path = Path(os.path.realpath(path))
    with _told(path):
        _require_file(path)
        _sweep(path)
        fresh = claims.claim(path.parent, _stem(path), ".tmp", folder=False, mode=mode)
        try:
            yield fresh.path
            if path.exists():
                fresh.path.chmod(stat.S_IMODE(path.stat().st_mode))
            _sync(fresh.path)
            fresh.path.replace(path)
            _sync(path.parent)
        finally:
            claims.remove(fresh.path)
            fresh.release()


@contextlib.contextmanager
def replacing_files(path: Path) -> Generator[Path]:
    """Give an empty directory to fill with a file called as `path` is, and with files it refers to.

    At the end they move beside `path`, that file last: it is replaced in one step, as by
    `replacing_file`, and finds the others there. They need names that say what they hold, since one
    that the old file refers to must not change. Raises `InputError` as `replacing_file` does.
    """
    path = Path(os.path.realpath(path))
    with _told(path):
        _require_file(path)
        _sweep(path)
        fresh = claims.claim(path.parent, _stem(path), ".new", folder=True, mode=0o777)
        try:
            yield fresh.path
            sync_tree(fresh.path)
            for part in sorted(fresh.path.iterdir(), key=lambda p: p.name == path.name):
                part.replace(path.parent / part.name)
                _sync(path.parent)
        finally:
            claims.remove(fresh.path)
            fresh.release()


def _require_file(path: Path) -> None:
    if os.path.lexists(path) and not path.is_file():
        raise InputError(f"cannot write {path}: it is not a file; choose another place.")


_SPACE = "free some space"
_LIMIT = "raise the limit on the size of files (ulimit -f)"
_NO_ROOM = {errno.ENOSPC: _SPACE, errno.EDQUOT: _SPACE, errno.EFBIG: _LIMIT}
_KILLED = "File size limit exceeded"
"""What a process is said to have died of that knows nothing of EFBIG."""


def unwritable(path: Path, error: OSError) -> InputError:
    """The error to raise where writing `path` failed with `error`."""
    remedy = no_room(error) or "choose another place"
    reason = error.strerror or str(error)
    named = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    if named and _stem(path) not in named and not Path(named).is_relative_to(path):
        reason += f" ({named})"
    return InputError(f"cannot write {path}: {reason}; {remedy}.")


def no_room(error: BaseException | str) -> str:
    """The remedy where there was no room to write, else ""; errors that are no `OSError`, and what
    another program printed, are told by their text."""
    if isinstance(error, OSError):
        return _NO_ROOM.get(error.errno or 0, "")
    text = error if isinstance(error, str) else "".join(traceback.format_exception_only(error))
    told = [remedy for number, remedy in _NO_ROOM.items() if os.strerror(number) in text]
    return told[0] if told else _LIMIT if _KILLED in text else ""


@contextlib.contextmanager
def _told(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


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
    odd = (
        not parts
        or len(relative) > 4096
        or "\0" in relative
        or relative.startswith("/")
        or ".." in parts
        or "\\" in relative
    )
    path = directory / relative
    if odd or ":" in parts[0] or not path.resolve().is_relative_to(directory.resolve()):
        raise InputError(
            f"{directory}: the manifest names {relative[:200]!r}, which is not a path inside "
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
def replacing_directory(
    destination: Path, check: Callable[[Path], None], mode: int = 0o777
) -> Generator[Path]:
    """Give an empty sibling directory to fill; put it in the place of `destination` at the end.

    What is filled in is flushed to the disk before it gets its name. `check` is called with a
    `destination` that exists, before anything is written and again before it is replaced, and
    raises when it must not go. When the body raises, `destination` is as it was. The replacement is
    one exchange of names where the kernel has one (Linux); elsewhere the old directory is renamed
    aside first and comes back if the second rename fails. Raises `InputError` where `destination`
    cannot be written.
    """
    destination = Path(os.path.realpath(destination))
    with _told(destination), _parents_of(destination):
        _sweep(destination)
        if os.path.lexists(destination):
            check(destination)
        fresh = claims.claim(destination.parent, _stem(destination), ".new", folder=True, mode=mode)
        try:
            yield fresh.path
            if destination.is_dir():
                fresh.path.chmod(stat.S_IMODE(destination.stat().st_mode))
            sync_tree(fresh.path)
            _put_in_place(fresh.path, destination, check)
            _sync(destination.parent)
        finally:
            claims.remove(fresh.path)
            fresh.release()


@contextlib.contextmanager
def _parents_of(path: Path) -> Generator[None]:
    """Make the missing ones for the block; when it raises, they go again."""
    missing = [p for p in path.parents if not p.exists()]
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            _sync(folder.parent)
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


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
    old = claims.hold(destination)
    try:
        aside = destination.with_name(f"{_stem(destination)}{secrets.token_hex(6)}.old")
        destination.rename(aside)
        try:
            fresh.rename(destination)
        except BaseException:
            aside.rename(destination)
            raise
        claims.remove(aside)
    finally:
        old.release()


def _stem(path: Path) -> str:
    """How the hidden names beside `path` begin; short enough for any file system."""
    name = path.name
    if len(name) > 50:
        name = f"{name[:40]}~{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
    return f".{name}."


def _sweep(path: Path) -> None:
    """Remove what processes that have ended left beside `path`; bring back what one put aside."""
    for aside in claims.left_behind(path.parent, _stem(path), ".old"):
        with claims.abandoned(aside) as found:
            if found and not os.path.lexists(path):
                aside.rename(path)
            elif found:
                claims.remove(aside)
    for suffix in (".new", ".tmp"):
        for left in claims.left_behind(path.parent, _stem(path), suffix):
            claims.reclaim(left)


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
