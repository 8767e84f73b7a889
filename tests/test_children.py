"""Child processes end with the block that started them, and take their own children along."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from optcompiler.children import Children

ENVIRONMENT = dict(os.environ)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_what_it_says_and_how_it_ends() -> None:
    with Children() as children:
        command = ["sh", "-c", "echo one; echo two >&2; exit 3"]
        assert children.run(command, env=ENVIRONMENT) == (3, "one\ntwo\n")
        with pytest.raises(FileNotFoundError):
            children.run(["no-such-command"], env=ENVIRONMENT)


def test_an_interruption_ends_children_and_grandchildren(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    script = f"sleep 600 & echo $! > {note}.part; mv {note}.part {note}; wait"
    children = Children()
    started: list[Future[tuple[int, str]]] = []

    def work() -> None:
        with ThreadPoolExecutor(1) as pool, children:
            started.append(pool.submit(children.run, ["sh", "-c", script], env=ENVIRONMENT))
            while not note.exists():
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert started[0].result()[0] == -9
    while alive(int(note.read_text())):
        time.sleep(0.01)
    with pytest.raises(ChildProcessError):
        children.run(["true"], env=ENVIRONMENT)
