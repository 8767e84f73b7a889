"""Child processes that do not outlive what they were started for."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any


class Children:
    """A block whose child processes are killed, with all that they started, when it ends early.

    Each leads a process group of its own, so that Ctrl-C reaches it through this process alone.
    Threads may share one.
    """

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[Any]] = set()
        self._lock = threading.Lock()
        self._over = False

    def __enter__(self) -> Children:
        return self

    def start(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path | None = None,
        stdin: int | None = subprocess.DEVNULL, stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> subprocess.Popen[bytes]:  # fmt: skip
        """Like `subprocess.Popen`. Raises `OSError` when the command does not start."""
        group = 0 if os.name == "posix" else None
        with self._lock:
            if self._over:
                raise ChildProcessError("no child process is started any more")
            process = subprocess.Popen(
                command, env=env, cwd=cwd, stdin=stdin, stdout=stdout, stderr=stderr,
                process_group=group,
            )  # fmt: skip
            self._running.add(process)
        return process

    def run(
        self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path | None = None
    ) -> tuple[int, str]:
        """Exit status of a command, and what it printed to both of its streams."""
        process = self.start(
            command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        printed, _ = process.communicate()
        with self._lock:
            self._running.discard(process)
        return process.returncode, printed.decode(errors="replace")

    def end(self) -> None:
        """Kill what still runs; nothing is started afterwards."""
        with self._lock:
            self._over = True
            for process in self._running:
                kill_group(process)
            self._running.clear()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a group, and the group; wait for it."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
    process.wait()
