"""What is worth keeping from one compile to the next, in a directory of this user alone.

An entry is a file named by the SHA-256 of the facts that decide its content. It begins with a line
of JSON: those facts, and size and SHA-256 of the content, which follows. All of it is compared when
it is read, and what does not agree is removed and counts as absent. Entries are replaced in one
step, so processes share them freely, and a lock per entry lets one of several make what all want.

A cache may save time but never costs a compile: whatever is wrong with it is told as a
`CacheWarning`, and the compile goes on as if there were none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from optcompiler.errors import CacheWarning, InputError
from optcompiler.files import plain, replacing_file, unwritable

LOCK_S = 300.0
"""Whoever waits this long for another process to make an entry makes it for itself."""

MOST_BYTES = 1 << 30
LONGEST_HEAD = 1 << 20

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def location() -> Path:
    """`$OPTCOMPILER_CACHE`, else `optcompiler` in the user's cache directory; for a user without a
    home, in the temporary folder. It may not exist.
    """
    if named := os.environ.get("OPTCOMPILER_CACHE"):
        return Path(named)
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"optcompiler-cache-{os.geteuid()}"
    return base / "optcompiler"


def private_directory(directory: Path) -> Path:
    """Make a directory that only this user may enter, or check one that is there.

    One that is there, and where a link leads, must belong to this user, and nobody else may write
    in it; a link must be this user's too. Raises `InputError` otherwise.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        found = [directory.lstat(), directory.stat()]
    except OSError as error:
        raise unwritable(directory, error) from error
    if not stat.S_ISDIR(found[-1].st_mode):
        raise InputError(f"cache {directory} is no directory; set OPTCOMPILER_CACHE to another.")
    if hasattr(os, "geteuid"):
        if any(status.st_uid != os.geteuid() for status in found):
            raise InputError(f"cache {directory} belongs to another user; set OPTCOMPILER_CACHE.")
        if found[-1].st_mode & _OTHERS_WRITE:
            raise InputError(
                f"cache {directory} may be written by other users (mode "
                f"{stat.S_IMODE(found[-1].st_mode):o}); make it yours alone with chmod 700, or set "
                f"OPTCOMPILER_CACHE to another."
            )
    return directory


class Cache:
    """The entries in `directory`, by default `location()`."""

    def __init__(self, directory: Path | None = None) -> None:
        self._named = directory

    def get(self, kind: str, facts: Mapping[str, Any]) -> bytes | None:
        """The content kept for these facts, or None."""
        directory = self._directory()
        return None if directory is None else _read(_path(directory, kind, facts), kind, facts)

    def put(self, kind: str, facts: Mapping[str, Any], content: bytes) -> None:
        """Keep `content` for these facts, in the place of what was kept."""
        directory = self._directory()
        if directory is None:
            return
        try:
            with replacing_file(_path(directory, kind, facts), mode=0o600) as fresh:
                fresh.write_bytes(_head(kind, facts, content) + content)
        except InputError as error:
            _tell(error)

    @contextlib.contextmanager
    def lock(self, kind: str, facts: Mapping[str, Any], seconds: float = LOCK_S) -> Generator[None]:
        """Keep others from making or changing this entry meanwhile; after `seconds` go on anyway.

        The lock of a process that ended is free. Look again with `get` once it is taken.
        """
        lock = None
        directory = self._directory()
        if directory is not None:
            lock = FileLock(_path(directory, kind, facts).with_suffix(".lock"), mode=0o600)
            try:
                lock.acquire(timeout=seconds)
            except Timeout:
                pass
            except OSError as error:
                _tell(unwritable(directory, error))
        try:
            yield
        finally:
            if lock is not None and lock.is_locked:
                lock.release()

    def _directory(self) -> Path | None:
        try:
            return private_directory(self._named or location())
        except InputError as error:
            _tell(error)
            return None


def _tell(error: InputError) -> None:
    warnings.warn(f"nothing is kept for the next compile: {error}", CacheWarning, stacklevel=1)


def _path(directory: Path, kind: str, facts: Mapping[str, Any]) -> Path:
    text = json.dumps([kind, plain(facts)], sort_keys=True)
    return directory / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()}.entry"


def _head(kind: str, facts: Mapping[str, Any], content: bytes) -> bytes:
    head = {
        "kind": kind,
        "facts": plain(facts),
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return json.dumps(head, sort_keys=True).encode() + b"\n"


def _read(path: Path, kind: str, facts: Mapping[str, Any]) -> bytes | None:
    """The content of an entry that is what it says; else None, and it is removed."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | _NONBLOCK)
    except OSError:
        return None
    with open(handle, "rb") as stream:
        status = os.fstat(handle)
        if _ours(status) and status.st_size <= MOST_BYTES:
            head = stream.readline(LONGEST_HEAD)
            content = stream.read()
            if head == _head(kind, facts, content):
                return content
    with contextlib.suppress(OSError):
        path.unlink()
    return None


_NONBLOCK = getattr(os, "O_NONBLOCK", 0)


def _ours(status: os.stat_result) -> bool:
    mine = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return mine and stat.S_ISREG(status.st_mode) and not status.st_mode & _OTHERS_WRITE
