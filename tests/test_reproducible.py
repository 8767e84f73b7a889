"""The same bytes from processes that have nothing in common but inputs, options and versions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optcompiler.program import Program
from tests.support import MLP
from tests.test_artifact import contents_of

Place = tuple[Path, dict[str, str]]
"""A working directory and the environment of a process there."""

ROOT = Path(__file__).parent.parent

SCRIPT = """
import os, sys
os.umask(int(sys.argv[1], 8))
out, locked = sys.argv[2:4]
import torch
import optcompiler as oc
from tests.nets import NETS

def batches(name, x):
    g = torch.Generator().manual_seed(3)
    if name == "bert":
        return [torch.randint(0, 100, x.shape, generator=g) for _ in range(8)]
    return [torch.rand(x.shape, generator=g) for _ in range(8)]

def compile(place, name, target, damage, lockable=False, **options):
    module, x = NETS[name]()
    lock = f"{locked}/{place}" if locked and lockable else None
    made = oc.compile(
        module, (x,), target=target, calibration=batches(name, x),
        passes=["default", "distill:steps=48"], budget=oc.Budget(max_damage=damage), damage="nmse",
        locked=lock, **options,
    )
    made.save(f"{out}/{place}")
    made.close()

stock, portable = oc.Target("onnxruntime", threads=1), oc.Target("cpu", threads=1, isa="portable")
compile("locked", "bert", stock, 1e-6, lockable=True, precision="int8")
# nominal prices: the same plan, and tuning, on every machine
compile("untimed", "digits", portable, 1e-4, precision="int8", timing=False)
"""


def environment(place: Path, **changes: str) -> dict[str, str]:
    (place / "tmp").mkdir(parents=True)
    own = {
        "OPTCOMPILER_CACHE": str(place / "cache"), "TMPDIR": str(place / "tmp"),
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    return {**os.environ, **own, **changes}


def run(place: Path, env: dict[str, str], *command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=place, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def one(tmp_path: Path) -> Place:
    place = tmp_path / "one"
    return place, environment(
        place, PYTHONHASHSEED="0", TZ="UTC", LC_ALL="C", OMP_NUM_THREADS="1"
    )  # fmt: skip


@pytest.fixture
def other(tmp_path: Path) -> Place:
    place = tmp_path / "another place" / "two"
    return place, environment(
        place, PYTHONHASHSEED="4242", TZ="Asia/Kolkata", LC_ALL="C.UTF-8", LANG="de_DE.UTF-8",
        OMP_NUM_THREADS="2", COLUMNS="50", HOME=str(place),
    )  # fmt: skip


def test_modules_compile_to_the_same_directory(one: Place, other: Place):
    (first, env), (second, other_env) = one, other
    run(first, env, "-c", SCRIPT, "022", "made", "")
    run(second, other_env, "-c", SCRIPT, "077", str(second / "made"), str(first / "made"))
    for place in ("locked", "untimed"):
        expected = contents_of(first / "made" / place)
        assert contents_of(second / "made" / place) == expected
        words = [str(first.parent).encode(), torch.__file__.encode()]
        assert not [n for n, content in expected.items() if any(w in content for w in words)]
    ledger = (first / "made" / "untimed" / "ledger.json").read_text()
    assert "kd 48 steps" in ledger


def test_a_file_compiles_to_the_same_directory_wherever_it_lies(one: Place, other: Place):
    (first, env), (second, other_env) = one, other
    command = ("-m", "optcompiler", "compile", "--target", "onnxruntime:threads=1")
    for place, name in ((first, "net.onnx"), (second, "other name.onnx")):
        Program.from_text(MLP).save(place / name)
    run(first, env, *command, "net.onnx", "-o", "made")
    lock = str(first / "made")
    run(second, other_env, *command, str(second / "other name.onnx"), "-o", "b", "--locked", lock)
    assert contents_of(second / "b") == contents_of(first / "made")
    done = subprocess.run(
        [sys.executable, *command, "net.onnx", "-o", "c", "--locked", lock, "--precision", "fp32"],
        cwd=first, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "options precision is fp32, locked is auto" in line
    assert not (first / "c").exists()
