"""Directories for the work of one process, in the system's temporary folder.

They go when their block ends, when they are removed, or when the process exits. Those of processes
that were killed are removed by the next process that makes one.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
from collections.abc import Generator
from pathlib import Path

from optcompiler import claims
from optcompiler.files import unwritable

STEM = "optcompiler-scratch-"

_held: dict[Path, tuple[int, claims.Claim]] = {}
"""Directories with the process that made them: a fork knows of its parent's and leaves them."""

_swept: set[Path] = set()


def new() -> Path:
    """An empty directory that only this user may enter, until `remove` or the end of the process.

    Raises `InputError` when there is no room for it.
    """
    parent = Path(tempfile.gettempdir())
    try:
        if parent not in _swept:
            _swept.add(parent)
            sweep(parent)
        made = claims.claim(parent, STEM, folder=True, mode=0o700)
    except OSError as error:
        raise unwritable(parent, error) from error
    _held[made.path] = os.getpid(), made
    return made.path


def remove(directory: Path) -> None:
    """Remove a directory with all that is in it, unless another process made it."""
    maker, claim = _held.pop(directory, (os.getpid(), None))
    if maker == os.getpid():
        claims.remove(directory)
    if claim is not None:
        claim.release()


@contextlib.contextmanager
def directory() -> Generator[Path]:
    """A scratch directory for the block."""
    made = new()
    try:
        yield made
    finally:
        remove(made)


def sweep(parent: Path) -> None:
    """Remove the scratch directories in `parent` of processes that have ended."""
    for path in claims.left_behind(parent, STEM):
        claims.reclaim(path)


@atexit.register
def remove_all() -> None:
    """Remove every scratch directory of this process."""
    for path in list(_held):
        remove(path)
