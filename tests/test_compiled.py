"""Calling, saving, loading and closing an artifact."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optcompiler import files
from optcompiler.compiled import Compiled, load
from optcompiler.errors import InputError
from optcompiler.plugins import Registry
from optcompiler.program import Program
from tests.support import (
    MLP,
    ROWS,
    make_artifact,
    random_inputs,
    run_onnx,
)
from tests.toy import ToyBackend, registry

X = np.arange(8, dtype=np.float32).reshape(2, 4)


def make(directory: Path, model: Program | None = None, **options: Any) -> Compiled:
    make_artifact(directory, model)
    return Compiled(directory, ToyBackend(), owned=options.pop("owned", False), **options)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_numpy_in_numpy_out(tmp_path: Path):
    program = Program.from_text(MLP)
    compiled = make(tmp_path / "net", program)
    expected = run_onnx(program, {"x": X})[0]
    for result in (compiled(X), compiled(x=X)):
        assert isinstance(result, tuple)
        np.testing.assert_array_equal(result[0], expected)
    np.testing.assert_array_equal(compiled.run({"x": X})[0], expected)


def test_torch_in_torch_out(tmp_path: Path):
    torch = pytest.importorskip("torch")
    compiled = make(tmp_path / "net")
    (result,) = compiled(torch.from_numpy(X))
    assert isinstance(result, torch.Tensor)
    np.testing.assert_array_equal(result.numpy(), compiled(X)[0])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "'x'"),
        ({"x": X, "z": X}, "leave out z"),
        ({"x": X.astype(np.float64)}, "float64"),
        ({"x": X[:, :3]}, r"\[2, 3\]"),
        ({"x": X[0]}, r"\[4\]"),
    ],
)
def test_inputs_that_do_not_fit(tmp_path: Path, inputs: dict[str, np.ndarray], message: str):
    compiled = make(tmp_path / "net")
    with pytest.raises(InputError, match=message):
        compiled.run(inputs)


def test_runner_gets_contiguous_arrays(tmp_path: Path):
    compiled = make(tmp_path / "net")
    np.testing.assert_array_equal(compiled(np.asfortranarray(X))[0], compiled(X)[0])


def test_outputs_that_are_not_finite_are_returned(tmp_path: Path):
    program = Program.from_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[3] x) => (float[3] y) { [log] y = Log(x) }"""
    )
    compiled = make(tmp_path / "net", program)
    (y,) = compiled(np.array([-1, 0, 1], np.float32))
    assert np.isnan(y[0])
    assert np.isneginf(y[1])
    assert y[2] == 0


def test_symbolic_dimensions(tmp_path: Path):
    program = Program.from_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[n,2] a, float[n,2] b) => (float[n,2] y) { [add] y = Add(a, b) }"""
    )
    compiled = make(tmp_path / "net", program)
    two, three = np.ones((2, 2), np.float32), np.ones((3, 2), np.float32)
    assert compiled(three, b=three)[0].shape == (3, 2)
    with pytest.raises(InputError, match="'n'"):
        compiled(two, three)


def test_what_it_knows(tmp_path: Path):
    program = Program.from_text(MLP)
    compiled = make(tmp_path / "net", program, program=program)
    assert compiled.program is program
    assert compiled.inputs == program.inputs
    assert compiled.outputs == program.outputs
    assert list(compiled.ledger) == ROWS
    assert compiled.measurements["damage"] == 0.004
    assert str(compiled.target) == "toy:threads=1"
    assert compiled.summary() == (tmp_path / "net" / "summary.txt").read_text()
    assert compiled.profile({"x": X}) is None
    assert "x: float[2, 4]" in repr(compiled)


def test_report_is_one_page_and_escaped(tmp_path: Path):
    program = Program.from_text(MLP)
    evil = "<script>alert(1)</script>&\"'"
    node = program.node("act")
    assert node is not None
    node.name = evil
    compiled = make(tmp_path / "net", program)
    page = compiled.report(tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert all(row.reason in page for row in ROWS)
    with pytest.raises(InputError, match="cannot write"):
        compiled.report(tmp_path / "none" / "report.html")


def test_save_and_load(tmp_path: Path):
    compiled = make(tmp_path / "net")
    saved = compiled.save(tmp_path / "deep" / "build" / "net")
    assert names(tmp_path / "deep" / "build") == ["net"]
    with load(saved, registry=registry(), threads=3) as loaded:
        assert loaded.threads == 3
        assert loaded.program is None
        np.testing.assert_array_equal(loaded(X)[0], compiled(X)[0])
    assert saved.is_dir()
    assert compiled.save(compiled.directory) == compiled.directory


def test_save_replaces_an_artifact_and_an_empty_directory(tmp_path: Path):
    compiled = make(tmp_path / "net")
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", make_artifact(tmp_path / "old", measurements={})):
        compiled.save(place)
        with load(place, registry=registry()) as loaded:
            assert loaded.measurements["damage"] == 0.004


def test_save_refuses_what_is_not_an_artifact(tmp_path: Path):
    compiled = make(tmp_path / "net")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(InputError, match="choose another"):
            compiled.save(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"
    assert (tmp_path / "file").read_text() == "x"


def test_a_failure_while_saving_keeps_the_old_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiled = make(tmp_path / "net")
    old = make_artifact(tmp_path / "out" / "old", measurements={"damage": 1.0})
    shutil.rmtree(tmp_path / "out" / "old-code", ignore_errors=True)
    copied: list[Any] = []
    copy = shutil.copyfile

    def fails_later(source: Any, target: Any) -> Any:
        if len(copied) == 2:
            raise OSError(28, "No space left on device")
        copied.append(target)
        return copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", fails_later)
        with pytest.raises(InputError, match="No space left on device"):
            compiled.save(old)

    def interrupted(directory: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_tree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compiled.save(old)
    assert names(tmp_path / "out") == ["old"]
    with load(old, registry=registry()) as loaded:
        assert loaded.measurements == {"damage": 1.0}


def test_load_refuses(tmp_path: Path):
    directory = make_artifact(tmp_path / "net")
    with pytest.raises(InputError, match="threads=0"):
        load(directory, threads=0, registry=registry())
    with pytest.raises(InputError, match="no target 'toy'"):
        load(directory, registry=Registry(load=()))
    (directory / "code" / "model.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="not the file that was compiled"):
        load(directory, registry=registry())


def test_close_releases_and_removes_what_is_owned(tmp_path: Path):
    compiled = make(tmp_path / "net", owned=True)
    compiled(X)
    compiled.close()
    compiled.close()
    assert not (tmp_path / "net").exists()
    with pytest.raises(InputError, match="was closed"):
        compiled(X)


def test_collected_means_removed(tmp_path: Path):
    compiled = make(tmp_path / "net", owned=True)
    compiled(X)
    del compiled
    gc.collect()
    assert not (tmp_path / "net").exists()


def test_threads_take_turns(tmp_path: Path):
    compiled = make(tmp_path / "net")
    expected = compiled(X)[0]
    results: list[bool] = []

    def work() -> None:
        for _ in range(5):
            results.append(np.array_equal(compiled(X)[0], expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 20


def test_loading_imports_no_torch(tmp_path: Path):
    directory = make_artifact(tmp_path / "net")
    np.save(tmp_path / "x.npy", X)
    code = f"""
import sys, numpy as np
from optcompiler.artifact import open_artifact
from optcompiler.compiled import Compiled, load
artifact = open_artifact({str(directory)!r})
inputs = artifact.signature.bind((np.load({str(tmp_path / "x.npy")!r}),), {{}})
artifact.signature.restore([inputs["x"]], like_torch=False)
assert "torch" not in sys.modules
assert "onnxruntime" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_random_inputs_run(tmp_path: Path):
    program = Program.from_text(MLP)
    compiled = make(tmp_path / "net", program)
    inputs = random_inputs(program, 3)
    np.testing.assert_allclose(compiled.run(inputs)[0], run_onnx(program, inputs)[0], rtol=1e-5)


SAVER = """
import sys, time
from pathlib import Path
from optcompiler.compiled import load
from tests.toy import registry
made, there, told = map(Path, sys.argv[1:])
with load(made, registry=registry()) as compiled:
    (told / made.name).touch()
    while not (told / "go").exists():
        time.sleep(0.001)
    for _ in range(30):
        compiled.save(there)
"""


def test_two_processes_save_to_one_place(tmp_path: Path):
    told = tmp_path / "told"
    told.mkdir()
    makers = []
    for name in ("one", "two"):
        made = make_artifact(tmp_path / name, measurements={"damage": name})
        command = [sys.executable, "-c", SAVER, str(made), str(tmp_path / "out" / "net"), str(told)]
        makers.append(subprocess.Popen(command, cwd=Path(__file__).parent.parent))
    while len(names(told)) < 2:
        time.sleep(0.01)
    (told / "go").touch()
    assert [maker.wait() for maker in makers] == [0, 0]
    assert names(tmp_path / "out") == ["net"]
    with load(tmp_path / "out" / "net", registry=registry()) as loaded:
        assert loaded.measurements["damage"] in ("one", "two")
