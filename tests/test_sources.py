"""References of the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from optcompiler.errors import InputError
from optcompiler.sources import (
    calibration_from_reference,
    load_reference,
    metric_from_reference,
    model_from_reference,
)

SOURCE = """
from dataclasses import dataclass
from helper_of_it import VALUE

@dataclass
class Box:
    value: int = VALUE
    def make(): return ("model", "inputs")

def make(): return "model", ("inputs",)
def batches(): return [1, 2]
def nothing(): return None
def broken():
    raise RuntimeError("no such checkpoint")
number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "helper_of_it.py").write_text("VALUE = 4")
    path = tmp_path / "my models.py"
    path.write_text(SOURCE)
    return path


def test_functions_of_files_and_modules_load(file, tmp_path, monkeypatch):
    assert load_reference(f"{file}:make")() == ("model", ("inputs",))
    assert load_reference(f"{file}:Box.make")() == ("model", "inputs")
    assert load_reference("os.path:join")("a", "b") == "a/b"
    (tmp_path / "model_beside_me.py").write_text("def make(): return 1")
    monkeypatch.chdir(tmp_path)
    assert load_reference("model_beside_me:make")() == 1


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("os.path", "names no function"),
        (":make", "names no function"),
        ("os.path:a b", "names no function"),
        ("no_such_module_at_all:f", "there is no module 'no_such_module_at_all'"),
        ("os.nothing:f", "there is no module 'os.nothing'|is not a package"),
        ("os.path:nothing", "os.path has no 'nothing'"),
        ("nowhere/file.py:f", "nowhere/file.py: no such file"),
    ],
)
def test_references_to_nothing_are_refused(text, match):
    with pytest.raises(InputError, match=match):
        load_reference(text)


def test_what_raises_in_the_user_s_code_is_shown_with_its_line(tmp_path, file, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\ny = 1 / 0\n")
    with pytest.raises(InputError, match=r"ZeroDivisionError: division by zero at .*broken.py:2"):
        load_reference(f"{broken}:f")
    broken.write_text("def f(:\n")
    with pytest.raises(InputError, match=r"SyntaxError: .* at .*broken.py:1"):
        load_reference(f"{broken}:f")
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"not_installed_anywhere.*needs_more.py:1"):
        load_reference("needs_more:f")
    with pytest.raises(InputError, match=r"RuntimeError: no such checkpoint at .*:14 in broken"):
        model_from_reference(f"{file}:broken")


def test_models(file, tmp_path):
    assert model_from_reference(f"{file}:make") == ("model", ("inputs",))
    with pytest.raises(InputError, match=r"returned a list; return \(model, example_inputs\)"):
        model_from_reference(f"{file}:batches")
    with pytest.raises(InputError, match="no such file"):
        model_from_reference("nowhere.onnx")
    (tmp_path / "a.onnx").write_bytes(b"")
    assert model_from_reference(str(tmp_path / "a.onnx")) == (tmp_path / "a.onnx", None)
    (tmp_path / "a.pt2").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.pt2: the file is empty"):
        model_from_reference(str(tmp_path / "a.pt2"))


def test_metrics_and_calibration(file, tmp_path):
    assert metric_from_reference(f"{file}:make")
    with pytest.raises(InputError, match="is a int; name a function as the metric"):
        metric_from_reference(f"{file}:number")
    with pytest.raises(InputError, match=r"holds no \.npz files"):
        calibration_from_reference(str(tmp_path))
    np.savez(tmp_path / "0.npz", x=np.zeros(2, np.float32))
    assert calibration_from_reference(str(tmp_path)) == tmp_path
    assert calibration_from_reference(f"{file}:batches") == [1, 2]
    with pytest.raises(InputError, match="returned a NoneType; return batches"):
        calibration_from_reference(f"{file}:nothing")
    with pytest.raises(InputError, match="no such folder"):
        calibration_from_reference("nowhere")
