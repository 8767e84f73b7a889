"""Interrupts the real program at chosen moments; the tests hold what it leaves behind.

`python -m tests.interruption` prints how long each took to end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from optcompiler.program import Program
from tests.support import MLP, make_artifact

MODEL = '''
import ctypes, os, pathlib, time

def note():
    pathlib.Path(os.environ["NOTE"]).touch()

def waits():
    note()
    time.sleep(600)

def swallows():
    note()
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass

def stuck():
    """Wait for ever in C, with the interpreter locked: no signal ends that."""
    mutex, library = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)

def native():
    note()
    stuck()

def plain():
    from optcompiler.program import Program
    return Program.from_onnx(os.environ["MODEL"]), None

def hold_the_save(wait):
    import optcompiler.files
    def sync_tree(directory):
        note()
        wait()
    optcompiler.files.sync_tree = sync_tree
    return plain()

def saving():
    return hold_the_save(lambda: time.sleep(600))

def saving_natively():
    return hold_the_save(stuck)
'''

COMPILER = """#!/bin/sh
case "$*" in *--version*) exec cc --version;; esac
echo half > "$TMPDIR/half"
sleep 600 &
touch "$NOTE"
wait
"""
"""Stands for a C compiler that takes long, with a child as gcc has."""

MOMENTS = (
    "importing", "waits", "swallows", "native", "compiler", "saving", "saving_natively",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """`left`: files and processes that should be gone; `kept`: the old artifact is as it was."""

    code: int
    seconds: float
    stdout: str
    stderr: str
    left: tuple[str, ...]
    kept: bool


def interrupt(
    moment: str, folder: Path, numbers: Sequence[int] = (signal.SIGINT,), *,
    whole_group: bool = True, arguments: Sequence[str] = (),
) -> Outcome:  # fmt: skip
    """Compile over an artifact, send `numbers` at the moment, and see what there is afterwards.

    With `whole_group` every process gets the signals, as from a terminal, else only the first.
    """
    token, note, temporary = uuid.uuid4().hex, folder / "note", folder / "tmp"
    work = folder / "work"
    for made in (temporary, work):
        made.mkdir(parents=True)
    (folder / "model.py").write_text(MODEL)
    Program.from_text(MLP).save(folder / "model.onnx")
    (folder / "cc").write_text(COMPILER)
    (folder / "cc").chmod(0o755)
    make_artifact(work / "out")
    source = "model.onnx" if moment in ("importing", "compiler") else f"model.py:{moment}"
    target = "cpu" if moment == "compiler" else "onnxruntime"
    environment = os.environ | {
        "TOKEN": token, "NOTE": str(note), "TMPDIR": str(temporary),
        "MODEL": str(folder / "model.onnx"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    if moment == "compiler":
        environment |= {"CC": str(folder / "cc"), "OPTCOMPILER_CACHE": str(folder / "cache")}
    before = contents(work / "out")
    process = subprocess.Popen(
        [sys.executable, "-m", "optcompiler", "compile", str(folder / source), "-o",
         str(work / "out"), "--target", target, *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        process_group=0, cwd=folder,
    )  # fmt: skip
    while process.poll() is None and not reached(moment, note, token):
        time.sleep(0.01)
    start = time.monotonic()
    for number in numbers:
        (os.killpg if whole_group else os.kill)(process.pid, number)
    stdout, stderr = process.communicate()
    seconds = time.monotonic() - start
    left = [str(p.relative_to(folder)) for p in temporary.rglob("*")]
    left += [str(p.relative_to(folder)) for p in work.iterdir() if p.name != "out"]
    left += [f"process {pid}" for pid in processes(token)]
    same = contents(work / "out") == before
    return Outcome(process.returncode, seconds, stdout, stderr, tuple(left), same)


def contents(directory: Path) -> dict[str, bytes]:
    files = (p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def reached(moment: str, note: Path, token: str) -> bool:
    if moment != "importing":
        return note.exists()
    for pid in processes(token):
        with contextlib.suppress(OSError):
            if "libtorch" in Path(f"/proc/{pid}/maps").read_text():
                return True
    return False


def processes(token: str) -> Iterator[int]:
    """Those that run, started with `token` in their environment."""
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if place.name.isdigit() and token.encode() in (place / "environ").read_bytes():
                yield int(place.name)


def main() -> None:
    for moment in MOMENTS:
        for number in (signal.SIGINT, signal.SIGTERM):
            with tempfile.TemporaryDirectory() as folder:
                done = interrupt(moment, Path(folder), (number,))
            name = signal.Signals(number).name
            print(
                f"{moment:16} {name:8} exit {done.code} after {done.seconds:.2f} s, "
                f"left {done.left}, old artifact kept: {done.kept}",
                flush=True,
            )


if __name__ == "__main__":
    main()
