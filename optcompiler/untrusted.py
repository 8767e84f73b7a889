"""Opening files that somebody else made: plain files of a bounded size, and nothing that blocks."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import stat
from collections.abc import Generator
from pathlib import Path
from typing import Any

from optcompiler.errors import InputError


@contextlib.contextmanager
def opened(path: Path, label: str, remedy: str = "check the path") -> Generator[tuple[int, int]]:
    """A descriptor for reading and the size in bytes; `label` is what messages call the file.

    Raises `InputError` for a file that is missing, cannot be read, or is a folder, a pipe, a
    device or a socket, without waiting for whoever may be at the other end.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError as error:
        raise InputError(f"{label}: no such file; {remedy}.") from error
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{label}: cannot be read ({cause}); {remedy}.") from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{label}: cannot be read (it is {_kind(status.st_mode)}); {remedy}.")
        yield handle, status.st_size
    finally:
        os.close(handle)


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"


@contextlib.contextmanager
def mapped(path: Path, label: str, most_bytes: int, remedy: str) -> Generator[memoryview]:
    """The bytes of a file, memory-mapped: what is not looked at is not read.

    Raises `InputError` as `opened` does, for an empty file, and for one beyond `most_bytes`.
    """
    with opened(path, label) as (handle, size):
        if size == 0:
            raise InputError(f"{label}: the file is empty; export the model again.")
        _check_size(size, label, most_bytes, remedy)
        with mmap.mmap(handle, 0, access=mmap.ACCESS_READ) as pages:
            view = memoryview(pages)
            try:
                yield view
            finally:
                view.release()


def text_of(path: Path, label: str, most_bytes: int) -> str:
    """The UTF-8 text of a file. Raises `InputError` as `mapped` does, and for other bytes."""
    with opened(path, label) as (handle, size):
        _check_size(size, label, most_bytes, "compile or copy the artifact again")
        with open(handle, "rb", closefd=False) as stream:
            data = stream.read(most_bytes)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{label}: not UTF-8 text ({error.reason} at byte {error.start}); "
            f"compile or copy the artifact again."
        ) from error


def json_of(path: Path, label: str, most_bytes: int) -> Any:
    """What a JSON file holds. Raises `InputError` as `text_of` does, and for other text."""
    text = text_of(path, label, most_bytes)
    return parsed_json(text, label, "compile or copy the artifact again")


def parsed_json(text: str | bytes, label: str, remedy: str) -> Any:
    """What JSON text holds. Raises `InputError` for other text, and for a key that is there twice:
    readers differ in which of the two they take."""
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        cause = "nested too deep" if isinstance(error, RecursionError) else error
        raise InputError(f"{label}: not JSON ({cause}); {remedy}.") from error


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twin[:100]!r} is there twice")
    return found


def _check_size(size: int, label: str, most_bytes: int, remedy: str) -> None:
    if size > most_bytes:
        raise InputError(f"{label}: {size} bytes, more than {most_bytes}; {remedy}.")
