"""A check that is a command: run as `git bisect run` does, for one program after another."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from optcompiler import scratch
from optcompiler.errors import InputError

if TYPE_CHECKING:
    from optcompiler.program import Program

SKIP = 125
PLACE = "{}"


class Command:
    """Judges programs by the exit status of a command: 0 good, 125 cannot tell, 1 to 127 bad.

    `write` puts what the command is to look at into an empty folder and says where; None when it
    cannot be made, which counts as "cannot tell". Output goes to stderr.

    Raises `InputError` for a command that cannot be run, takes longer than `seconds`, or is killed.
    """

    def __init__(
        self, text: str, seconds: float, write: Callable[[Program, Path], Path | None] | None = None
    ) -> None:
        try:
            self.words = shlex.split(text)
        except ValueError as error:
            raise InputError(f"check {text!r} cannot be read: {error}.") from error
        if not self.words:
            raise InputError("the check is empty; give a command with --check.")
        if not any(PLACE in word for word in self.words):
            self.words.append(PLACE)
        self.seconds = seconds
        self._write = write or onnx_file

    def __call__(self, program: Program) -> bool | None:
        with scratch.directory() as folder:
            path = self._write(program, folder)
            return None if path is None else self.judge(path)

    def judge(self, path: Path) -> bool | None:
        """What the command says of a file or folder."""
        words = [word.replace(PLACE, str(path)) for word in self.words]
        try:
            # fd 2 and not sys.stderr: the child writes there itself
            child = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True
            )
        except OSError as error:
            raise InputError(
                f"check {words[0]!r} cannot be run: {error.strerror}; give a program with its "
                f"arguments."
            ) from error
        try:
            code = child.wait(self.seconds)
        except subprocess.TimeoutExpired:
            raise InputError(
                f"the check had not ended after {self.seconds:g} s; give it more with "
                f"--check-seconds, or let it end itself with a status."
            ) from None
        finally:
            _end(child)
        if code < 0 or code > 127:
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            )
            raise InputError(
                f"the check {how}, which says nothing of the program; let it end with 0 for good "
                f"and 1 for bad."
            )
        return None if code == SKIP else code == 0


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the child and of what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def onnx_file(program: Program, folder: Path) -> Path:
    path = folder / "model.onnx"
    program.save(path)
    return path
