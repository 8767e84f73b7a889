"""Scratch directories leave with their process, or are removed by the next."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from optcompiler import scratch
from optcompiler.errors import InputError


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def python(code: str, *, check: bool = True) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import os\nfrom optcompiler import scratch\n{code}"],
        capture_output=True, text=True, check=check,
    )  # fmt: skip
    return done.stdout.strip()


def test_it_is_private_and_goes_with_its_block(temporary: Path) -> None:
    with scratch.directory() as made:
        assert made.parent == temporary
        assert made.stat().st_mode & 0o777 == 0o700
        (made / "a").mkdir()
        (made / "a" / "b").write_text("c")
    assert list(temporary.iterdir()) == []
    other = scratch.new()
    scratch.remove(other)
    scratch.remove(other)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("end", ["", "raise ValueError", "raise SystemExit(3)"])
def test_it_goes_with_the_process(temporary: Path, end: str) -> None:
    made = Path(python(f"print(scratch.new(), flush=True)\n{end}", check=False))
    assert made.parent == temporary
    assert list(temporary.iterdir()) == []


def test_a_fork_leaves_what_its_parent_made(temporary: Path) -> None:
    code = """
made = scratch.new()
if os.fork() == 0:
    scratch.remove(made)
    scratch.new()
    raise SystemExit
os.wait()
print(len(os.listdir(os.path.dirname(made))), os.path.isdir(made))
"""
    assert python(code) == "1 True"


def test_what_a_killed_process_left_is_removed_by_the_next(temporary: Path) -> None:
    dead = Path(python("print(scratch.new(), flush=True)\nos.kill(os.getpid(), 9)", check=False))
    assert dead.is_dir()
    with scratch.directory() as alive:
        (temporary / "optcompiler-scratch-mine").mkdir()
        assert python("print(os.path.isdir(scratch.new()))") == "True"
        assert not dead.exists()
        assert alive.is_dir()
    assert [p.name for p in temporary.iterdir()] == ["optcompiler-scratch-mine"]


def test_no_room_is_told(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, mode: int = 0o777) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(InputError, match="No space left on device; free some space"):
        scratch.new()
