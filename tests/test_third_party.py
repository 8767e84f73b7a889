"""The example package, installed as a third party's is, takes part in a compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from optcompiler.program import Program

PACKAGE = Path(__file__).parent.parent / "examples" / "third_party_pass"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables under which Python finds the installed example."""
    pytest.importorskip("hatchling")
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
            "--no-build-isolation", "--target", str(target), str(PACKAGE),
        ],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    paths = [str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run(
    arguments: list[str], environment: dict[str, str], directory: Path
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from optcompiler.cli import main; main()", *arguments],
        env=environment, cwd=directory, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_package_passes_its_own_tests(environment: dict[str, str], tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(PACKAGE / "tests")],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_it_is_listed_with_its_distribution(environment: dict[str, str], tmp_path: Path):
    done = run(["plugins", "--json"], environment, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["plugins"]}
    assert rows["hardswish"]["distribution"] == "optcompiler-hardswish"
    assert rows["hardswish"]["passes"] == ["hard-activations"]


@pytest.mark.slow
def test_its_candidates_are_chosen_and_in_the_ledger(environment: dict[str, str], tmp_path: Path):
    Program.from_text(
        """<ir_version: 10, opset_import: ["": 20]>
agraph (float[1, 64, 128, 128] x) => (float[1, 64, 128, 128] y, float[1, 64, 128, 128] p) {
  [gate] s = Sigmoid (x)
  [negated] y = Neg (s)
  [probability] p = Sigmoid (y)
}
"""
    ).save(tmp_path / "net.onnx")
    rng = np.random.default_rng(0)
    (tmp_path / "batches").mkdir()
    for i in range(2):
        np.savez(
            tmp_path / "batches" / f"{i}.npz",
            x=rng.standard_normal((1, 64, 128, 128)).astype(np.float32),
        )
    done = run(
        [
            "compile", "net.onnx", "-o", "net", "--target", "onnxruntime:threads=1",
            "--calibration", "batches", "--damage", "nmse", "--max-damage", "1",
            "--pass", "hard-activations:kinds=sigmoid", "--json",
        ],
        environment, tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [options] = json.loads(done.stdout)["manifest"]["options"]["passes"]
    assert options["owner"] == "optcompiler-hardswish 0.1.0"
    assert options["options"] == {"kinds": ["sigmoid"]}
    rows = {r["site"]: r for r in json.loads((tmp_path / "net" / "ledger.json").read_text())}
    assert (rows["gate"]["choice"], rows["gate"]["outcome"]) == ("HardSigmoid", "taken")
    assert 0 < rows["gate"]["damage"] < 1
    assert (rows["probability"]["outcome"], rows["probability"]["reason"]) == (
        "declined",
        "it makes the output 'p'; probabilities would saturate at 0 and 1.",
    )
