"""Runs items through the command line, each in a process of its own, and says what came of it."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.hostile import watched
from tests.hostile.corpus import CANARY, SECRET, Item

CPU_SECONDS = 2.0
WALL_SECONDS = 20
MEGABYTES = 512
_ADDRESS_SPACE = 6 << 30


@dataclass(frozen=True)
class Outcome:
    """What one process did: `code` is negative for a signal, `megabytes` the peak of its memory.

    `strays` are the paths that appeared, went or changed besides the output directory, `reached`
    what was opened, started or loaded that is neither the item's nor part of the installation, and
    `leaks` where the content of a file turned up that the item has no business with.
    """

    name: str
    code: int
    cpu_seconds: float
    megabytes: float
    stderr: str
    stdout: str
    artifact: bool
    strays: tuple[str, ...]
    reached: tuple[str, ...]
    leaks: tuple[str, ...]

    def faults(self, item: Item) -> list[str]:
        """Why the outcome is not what the item asks for; empty when it is."""
        found: list[str] = []
        if self.code not in item.codes:
            found.append(f"exit code {self.code}, not {sorted(item.codes)}")
        if self.strays:
            found.append(f"touched {', '.join(self.strays)[:300]}")
        if self.leaks:
            found.append(f"leaked a secret to {', '.join(self.leaks)[:300]}")
        if self.reached and (item.refused or self.code != 0):
            found.append(f"reached for {', '.join(self.reached)[:300]}")
        if self.code == 0:
            return found
        lines = self.stderr.splitlines()
        if len(lines) != 1 or not lines[0].startswith("optcompiler: "):
            found.append(f"{len(lines)} lines on stderr")
        if "Traceback" in self.stderr or not self.stderr.rstrip("\n").isprintable():
            found.append("a traceback or control characters on stderr")
        if len(self.stderr) > 1500:
            found.append(f"{len(self.stderr)} characters on stderr")
        if item.says not in self.stderr:
            found.append(f"stderr lacks {item.says!r}")
        if self.artifact:
            found.append("an output directory in spite of the error")
        if item.refused and item.bounded and self.cpu_seconds > CPU_SECONDS:
            found.append(f"{self.cpu_seconds:.2f} s of CPU time")
        if item.refused and item.bounded and self.megabytes > MEGABYTES:
            found.append(f"{self.megabytes:.0f} MB")
        return found


def run_item(item: Item, folder: Path, *, fresh: bool) -> Outcome:
    """Make the item in `folder`, which is empty, and run it: a new interpreter, or a fork of this.

    Nothing but the folder `out` may appear, and the cache, which lies beside `folder`.
    """
    files, home = folder / "files", folder / "home"
    files.mkdir(parents=True)
    home.mkdir()
    (folder / "tmp").mkdir()
    arguments = item.make(files)
    if arguments[0] == "compile":
        arguments = [*arguments, "-o", str(folder / "out")]
    before = _snapshot(folder)
    streams = [folder.with_name(f"{folder.name}.{kind}") for kind in ("out", "err")]
    log = folder.with_name(f"{folder.name}.log")
    log.unlink(missing_ok=True)
    start = (_exec if fresh else _call)(arguments, home, streams, log)
    code, usage = _wait(start)
    stdout, stderr = (s.read_text(encoding="utf-8", errors="replace") for s in streams)
    lines = log.read_text().splitlines()
    reached = watched.reached(lines, str(folder), str(_cache(home)), map(str, secrets(files)))
    after = _snapshot(folder)
    changed = {p for p in before.keys() | after.keys() if before.get(p) != after.get(p)}
    made = "out" not in before
    strays = sorted(p for p in changed if not (made and (p == "out" or p.startswith("out/"))))
    return Outcome(
        item.name, code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, stderr, stdout,
        made and (folder / "out").exists(), tuple(strays), tuple(reached),
        tuple(_leaks([*streams, folder / "out", folder / "tmp", home, _cache(home)])),
    )  # fmt: skip


def secrets(files: Path) -> list[Path]:
    """Files beside the item that it may not read."""
    return [p for p in files.rglob(SECRET) if p.is_file() and not p.is_symlink()]


def _leaks(places: list[Path]) -> Iterator[str]:
    for place in places:
        for path in (place, *place.rglob("*")):
            if path.is_file() and CANARY in path.read_bytes():
                yield str(path)


def _snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    found: dict[str, tuple[int, int, int]] = {}
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(root, name)
            status = path.lstat()
            size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
            stamp = 0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns
            found[str(path.relative_to(folder))] = (status.st_mode, size, stamp)
    return found


def _child(home: Path, streams: list[Path], go: Callable[[], int]) -> int:
    """A child process that calls `go` in `home`, with its output in files, and what it returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 120
    try:
        for path, handle in zip(streams, (1, 2), strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), handle)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(home)
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = go()
    finally:
        os._exit(code)


def _cache(home: Path) -> Path:
    return home.parent.parent / "cache"


def _environment(home: Path) -> dict[str, str]:
    return {
        "TMPDIR": str(home.parent / "tmp"),
        "HOME": str(home),
        "OPTCOMPILER_CACHE": str(_cache(home)),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _exec(arguments: list[str], home: Path, streams: list[Path], log: Path) -> int:
    def go() -> int:
        command = [sys.executable, "-P", watched.__file__, str(log), *arguments]
        os.execve(sys.executable, command, os.environ | _environment(home))

    return _child(home, streams, go)


def _call(arguments: list[str], home: Path, streams: list[Path], log: Path) -> int:
    def go() -> int:
        import tempfile

        from optcompiler.cli import main

        os.environ.update(_environment(home))
        tempfile.tempdir = None
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(h, "w"), "utf-8") for h in (1, 2))
        code = 1
        watched.watch(str(log))
        try:
            main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        return code

    return _child(home, streams, go)


def _wait(pid: int) -> tuple[int, resource.struct_rusage]:
    end = time.monotonic() + WALL_SECONDS * 6
    while time.monotonic() < end:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage


def warm() -> None:
    """Import what a refusal needs, so that forks start with it; nothing that starts threads."""
    import onnxscript.version_converter  # noqa: F401

    import optcompiler.cli.models
    import optcompiler.frontend  # noqa: F401
