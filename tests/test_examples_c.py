"""The C example, built by CMake, and the C snippet of the README."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.test_docs import ROOT, blocks

EXAMPLE = ROOT / "examples" / "c"


def ran(command: Sequence[str | Path], cwd: Path, **options: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the artifact of the README's command, in float to be quick."""
    place = tmp_path_factory.mktemp("c")
    ran(
        [sys.executable, "-m", "optcompiler", "compile", f"{ROOT}/examples/digits.py:model",
         "--dynamic", "batch", "--target", "cpu:size.batch=1,threads=1", "--precision", "fp32",
         "--no-timing", "-o", "build/digits", "--depfile", "build/digits.d"],
        place,
    )  # fmt: skip
    return place


@pytest.mark.slow
def test_the_cmake_project_finds_the_library_and_reads_digits(place: Path) -> None:
    if not shutil.which("cmake"):
        pytest.skip("no cmake; the dev extra installs it")
    code = place / "build" / "digits" / "code"
    ran(["cmake", "-S", EXAMPLE, "-B", "build/c", f"-DCMAKE_PREFIX_PATH={code}"], place)
    ran(["cmake", "--build", "build/c"], place)
    images = (EXAMPLE / "digits.txt").read_text()
    for program in ("classify", "classify_static"):
        told = ran([f"build/c/{program}", code / "digits.weights"], place, input=images)
        assert told.split() == ["7", "0", "4"]
    failed = subprocess.run([place / "build/c/classify", "nothing"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "usage" in failed.stderr


@pytest.mark.slow
def test_the_snippet_of_the_readme_runs(place: Path) -> None:
    if not shutil.which("pkg-config"):
        pytest.skip("no pkg-config")
    (snippet,) = blocks(ROOT / "README.md", "c")
    (place / "main.c").write_text(snippet)
    shell = next(b for b in blocks(ROOT / "README.md", "sh") if "pkg-config" in b)
    score, *checked = ran(["sh", "-ec", shell], place).splitlines()
    assert isinstance(float(score), float)
    assert any("values agree" in line for line in checked)
    build = shell.replace("\\\n", "").splitlines()[0]
    ran(["sh", "-ec", f"{build} -Wall -Wextra -Werror"], place)


@pytest.mark.slow
def test_the_depfile_names_the_model(place: Path) -> None:
    assert f"{ROOT}/examples/digits.py" in (place / "build" / "digits.d").read_text()
