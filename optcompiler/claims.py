"""Names in the making, held by a living process: what is in use is told from what a killed process
left behind.

A file or directory gets a name that nothing has and is locked as long as its maker holds it. The
system drops the locks of a process that ends, however it ends. So whoever gets the lock of such a
name may remove it; a maker that finds its new name locked or gone takes another one.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from optcompiler import supervisor

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing is ever taken for left behind
    fcntl = None

DIGITS = 12


@dataclass
class Claim:
    """A file or directory of this process at `path`, until `release`."""

    path: Path
    handle: int | None

    def release(self) -> None:
        """Let go of the name. What has it is left alone."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None


def claim(parent: Path, stem: str, suffix: str = "", *, folder: bool, mode: int) -> Claim:
    """Make an empty file, or with `folder` a directory, called `stem`, random digits, `suffix`.

    Raises `OSError`. The mode is narrowed by the umask.
    """
    while True:
        path = parent / f"{stem}{secrets.token_hex(DIGITS // 2)}{suffix}"
        _note(path)
        if not folder:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        else:
            path.mkdir(mode=mode)
            if fcntl is None:
                return Claim(path, None)
            try:
                handle = _open(path)
            except FileNotFoundError:
                continue
        if fcntl is None or (_lock(handle) is not False and _still(path, handle)):
            return Claim(path, handle)
        os.close(handle)


def hold(path: Path) -> Claim:
    """Lock a directory that is there already, where that can be done. Raises `OSError`."""
    if fcntl is None:
        return Claim(path, None)
    handle = _open(path)
    _lock(handle)
    return Claim(path, handle)


def left_behind(parent: Path, stem: str, suffix: str = "") -> Iterator[Path]:
    """Paths that `claim` could have made; some may be in use."""
    wanted = re.compile(f"{re.escape(stem)}[0-9a-f]{{{DIGITS}}}{re.escape(suffix)}")
    with contextlib.suppress(OSError):
        yield from (parent / name for name in os.listdir(parent) if wanted.fullmatch(name))


@contextlib.contextmanager
def abandoned(path: Path) -> Generator[bool]:
    """Whether `path` is ours and nobody's any more; if so, it is held while the block runs."""
    handle = None
    with contextlib.suppress(OSError):
        if fcntl is not None and _ours(path):
            handle = _open(path)
    try:
        yield handle is not None and _lock(handle) is True and _still(path, handle)
    finally:
        if handle is not None:
            os.close(handle)


def reclaim(path: Path) -> None:
    """Remove `path` if it was left behind; a path in use, or that cannot be removed, stays."""
    with abandoned(path) as found:
        if found:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a tree, as far as that is possible."""
    with contextlib.suppress(OSError):
        if stat.S_ISDIR(path.lstat().st_mode):
            path.chmod(0o700)
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _note(path: Path) -> None:
    if supervisor.journal is not None:
        os.write(supervisor.journal, os.fsencode(os.path.abspath(path)) + b"\0")


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)


def _ours(path: Path) -> bool:
    status = path.lstat()
    plain = stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)
    return plain and status.st_uid == os.geteuid()


def _lock(handle: int) -> bool | None:
    """True: locked now; False: somebody else holds it; None: this file system has no locks."""
    assert fcntl is not None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(handle))
    except OSError:
        return False
