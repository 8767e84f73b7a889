"""`compile --depfile`: what was read, spelled so that make builds again when it changes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optcompiler.depfile import write_depfile
from optcompiler.errors import InputError
from optcompiler.program import Program
from tests.support import MLP
from tests.test_cli import run

NET = """
import torch
from parts import width

def model():
    return torch.nn.Linear(width(), 2), (torch.zeros(2, width()),)

def score(model):
    from scoring import points
    return points()
"""


def prerequisites(depfile: str) -> list[str]:
    """The target and what it depends on; no name here holds a space."""
    rule, *phony = Path(depfile).read_text().replace("\\\n", "").split("\n\n")
    target, _, names = rule.partition(": ")
    assert [p.strip() for p in phony] == [f"{n}:" for n in names.split()]
    return [target, *names.split()]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("optcompiler.device.measure", lambda *_: None)


def test_a_model_file_its_data_and_the_calibration_folder() -> None:
    for folder in ("in", "data"):
        Path(folder).mkdir()
    ir.save(
        Program.from_text(MLP).model,
        "in/net.onnx",
        external_data="net.data",
        size_threshold_bytes=0,
    )
    for name in ("b", "a"):
        np.savez(f"data/{name}.npz", x=np.zeros((2, 4), np.float32))
    result = run(
        "compile", "in/net.onnx", "--target", "toy", "--calibration", "data", "-o", "build/net",
        "--depfile", "build/net.d",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert prerequisites("build/net.d") == [
        "build/net/manifest.json", "in/net.onnx", "in/net.data", "data/a.npz", "data/b.npz",
    ]  # fmt: skip
    result = run(
        "compile", "in/net.onnx", "--target", "toy", "--calibration", "data", "-o", "b",
        "--locked", "build/net", "--depfile", "b.d",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "build/net/lock.json" in prerequisites("b.d")


def test_python_files_and_what_they_import() -> None:
    Path("net.py").write_text(NET)
    Path("parts.py").write_text("def width():\n    return 3\n")
    Path("scoring.py").write_text("def points():\n    return 1.0\n")
    Path("unused.py").write_text("")
    result = run(
        "compile", "net.py:model", "--target", "toy", "--metric", "net.py:score", "-o", "out",
        "--depfile", "out.d",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert prerequisites("out.d") == ["out/manifest.json", "net.py", "parts.py", "scoring.py"]


def test_a_depfile_does_not_lie_in_the_artifact() -> None:
    Program.from_text(MLP).save("net.onnx")
    result = run("compile", "net.onnx", "--target", "toy", "-o", "out", "--depfile", "out/net.d")
    assert result.exit_code == 2
    assert "put it beside" in result.output
    assert not Path("out").exists()


HARD = ("a b", "c#d", "e$f", "g\\ h", "100%", "ünet", "i:j")


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_builds_again_what_is_older_than_an_input() -> None:
    makefile = "t/net.json:\n\t@mkdir -p t; touch $@; echo built\n-include net.d\n"
    Path("Makefile").write_text(makefile)
    for name in HARD:
        Path(name).touch()
    write_depfile(Path("net.d"), Path("t/net.json"), HARD)
    assert made() == "built"
    assert made() == ""
    for at, name in enumerate(HARD):
        later = Path("t/net.json").stat().st_mtime + 10 * (at + 1)
        os.utime(name, (later, later))
        assert made() == "built", name
        os.utime("t/net.json", (later, later))
        assert made() == "", name
    Path(HARD[0]).unlink()
    assert made() == "built"


def made() -> str:
    done = subprocess.run(["make", "-s", "t/net.json"], check=True, capture_output=True, text=True)
    return re.sub("make: .*", "", done.stdout).strip()


def test_a_line_break_has_no_spelling(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line break"):
        write_depfile(tmp_path / "net.d", Path("out"), ["a\nb"])
