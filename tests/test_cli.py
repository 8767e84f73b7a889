"""The command line: results, JSON, exit codes, and what happens when something breaks."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import optcompiler.compiler
from optcompiler._version import __version__
from optcompiler.cli import main
from optcompiler.compiled import Compiled
from optcompiler.errors import GateError, PluginError, ToolchainError, UnsupportedOperatorError
from optcompiler.program import Program
from optcompiler.progress import ConsoleProgress, Silent, progress_on
from tests.support import MLP, make_artifact
from tests.toy import Harden, ToyBackend, registry, sigmoid_net


def run(*arguments: str | Path) -> Result:
    plugins = registry(None, Harden)
    return CliRunner().invoke(main, [str(a) for a in arguments], obj=lambda: plugins)


def answer(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    """What the command prints as JSON."""
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture(autouse=True)
def _nominal_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optcompiler.device.measure", lambda *_: None)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return make_artifact(tmp_path / "net")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "mlp.onnx"
    Program.from_text(MLP).save(path)
    return path


# -- compile --------------------------------------------------------------------------------


def test_compile_writes_an_artifact(tmp_path: Path):
    sigmoid_net([1.0, 0.5]).save(tmp_path / "m.onnx")
    out = tmp_path / "build" / "net"
    shared = ("compile", tmp_path / "m.onnx", "-o", out, "--target", "toy")
    data = answer(*shared, "--pass", "harden", "--max-damage", "1")
    assert data["artifact"] == str(out)
    assert data["manifest"]["target"].startswith("toy:")
    assert data["ledger"]["taken"] + data["ledger"]["rejected"] > 0
    assert [p["name"] for p in data["manifest"]["options"]["passes"]] == ["harden"]
    result = run(*shared, "--precision", "fp32")
    assert result.exit_code == 0, result.output
    assert f"written to {out}" in result.stdout
    assert result.stderr == ""
    assert run("verify", out, "--against", tmp_path / "m.onnx").exit_code == 0


def fake_compile(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> dict[str, Any]:
    given: dict[str, Any] = {}

    def compile(model: Any, example_inputs: Any, **options: Any) -> Any:
        given.update(options, model=model, example_inputs=example_inputs)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(optcompiler.compiler, "compile", compile)
    return given


def test_compile_passes_its_options_on(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    compiled = Compiled(make_artifact(tmp_path / "made"), ToyBackend(), owned=True)
    given = fake_compile(monkeypatch, compiled)
    (tmp_path / "metrics.py").write_text("def score(model):\n    return 1.0\n")
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "0.npz", x=np.zeros((2, 4), np.float32))
    result = run(
        "compile", model, "-o", tmp_path / "out", "--target", "toy:threads=2",
        "--metric", f"{tmp_path}/metrics.py:score", "--max-drop", "0.5", "--max-latency-ms", "3",
        "--max-size-mb", "4", "--search-minutes", "5", "--calibration", tmp_path / "data",
        "--pass", "default", "--pass", "harden", "--dynamic", "x:0=batch",
        "--dynamic", "x:1=width", "--seed", "7", "--precision", "int8", "--damage", "nmse",
        "--on-fault", "stop", "--time-limit", "2.5", "--reproducers", tmp_path / "faults",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert given["model"].content_hash() == optcompiler.Program.from_onnx(model).content_hash()
    assert given["example_inputs"] is None
    assert given["passes"] == ["default", "harden"]
    assert given["dynamic"] == {"x": {0: "batch", 1: "width"}}
    assert (str(given["target"]), given["precision"], given["seed"]) == ("toy:threads=2", "int8", 7)
    assert given["calibration"] == tmp_path / "data"
    assert (given["on_fault"], given["time_limit_s"]) == ("stop", 2.5)
    assert given["reproducers"] == tmp_path / "faults"
    budget = given["budget"].describe()
    assert (budget["metric"], budget["max_drop"], budget["search_minutes"]) == ("score", 0.5, 5)
    assert not (tmp_path / "made").exists()
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_a_gate_that_fails_leaves_nothing_behind(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    error = GateError("latency in ms is 4, over 3: no plan found meets the budget.")
    best = Compiled(make_artifact(tmp_path / "best"), ToyBackend(), owned=True)
    error.compiled = best  # type: ignore[attr-defined]
    fake_compile(monkeypatch, error)
    result = run("compile", model, "-o", tmp_path / "out", "--target", "toy", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "error": {"kind": "GateError", "message": str(error), "exit_code": 1}
    }
    assert result.stderr == f"optcompiler: {error}\n"
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "best").exists()


def test_the_best_artifact_is_kept_on_demand(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    error = GateError("the size is over the limit.")
    best = Compiled(make_artifact(tmp_path / "best"), ToyBackend(), owned=True)
    error.compiled = best  # type: ignore[attr-defined]
    fake_compile(monkeypatch, error)
    result = run("compile", model, "-o", tmp_path / "out", "--keep-best", tmp_path / "kept")
    assert result.exit_code == 1
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "kept" / "manifest.json").is_file()


def test_compile_refuses_a_place_that_is_taken_before_it_starts(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    given = fake_compile(monkeypatch, RuntimeError("must not run"))
    (tmp_path / "mine.txt").write_text("x")
    result = run("compile", model, "-o", tmp_path)
    assert result.exit_code == 2
    assert "not an optcompiler artifact" in result.stderr
    assert not given


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnsupportedOperatorError("no Foo for node 'a'."), 3),
        (ToolchainError("no C compiler."), 4),
        (PluginError("plugin broke."), 5),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, error: Any, code: int
):
    fake_compile(monkeypatch, error)
    result = run("compile", model, "-o", tmp_path / "out", "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout)["error"]["exit_code"] == code
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_an_internal_error_writes_a_reproducer(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    fake_compile(monkeypatch, ZeroDivisionError("by \x1b[31mzero"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    result = run("compile", model, "-o", tmp_path / "out dir", "--json")
    assert result.exit_code == 70
    place = Path(json.loads(result.stdout)["error"]["reproducer"])
    assert str(place) in result.stderr
    assert "\x1b" not in result.stderr
    assert "Traceback" not in result.stderr
    assert "ZeroDivisionError" in (place / "traceback.txt").read_text()
    assert f"'{tmp_path}/out dir'" in (place / "command.txt").read_text()
    assert json.loads((place / "versions.json").read_text())["optcompiler"] == __version__


@pytest.mark.parametrize(
    "arguments",
    [
        ["compile"],
        ["nonsense"],
        ["compile", "m.onnx", "-o", "x", "--seed", "many"],
        ["compile", "m.onnx", "-o", "x", "--dynamic", "x:y"],
        ["compile", "m.onnx", "-o", "x", "--dynamic", "n=1..x"],
        ["compile", "m.onnx", "-o", "x", "--dynamic", "x=n=1..2"],
        ["compile", "m.onnx", "-o", "x", "--dynamic", "n", "--dynamic", "x:0=n"],
        ["compile", "no-such.onnx", "-o", "x"],
        ["compile", "no.module.anywhere:f", "-o", "x"],
        ["compile", "no-such.onnx", "-o", "x", "--max-drop", "1"],
        ["inspect", "no-such.onnx"],
        ["verify", "no-such-directory"],
        ["bench", "no-such-directory"],
        ["explain", "no-such-directory"],
        ["passes", "no-such-pass"],
        ["device", "--target", "no-such-target"],
    ],
)
def test_bad_usage_is_two(arguments: list[str]):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    error = answer(*arguments, code=2)["error"]
    assert error["exit_code"] == 2
    assert error["message"]


def test_one_symbol_for_the_first_axis_of_every_input(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    given = fake_compile(monkeypatch, GateError("no."))
    assert run("compile", model, "-o", tmp_path / "out", "--dynamic", "batch").exit_code == 1
    assert given["dynamic"] == "batch"
    for texts, taken in (
        (["batch=1..32"], {"batch": (1, 32)}),
        (["x:1=width=3..9", "x:0=n"], {"x": {1: "width", 0: "n"}, "width": (3, 9)}),
    ):
        options = [word for text in texts for word in ("--dynamic", text)]
        assert run("compile", model, "-o", tmp_path / "out", *options).exit_code == 1
        assert given["dynamic"] == taken


# -- looking --------------------------------------------------------------------------------


def test_inspect_a_model(model: Path):
    data = answer("inspect", model)
    port = {"name": "x", "dtype": "FLOAT", "shape": [2, 4], "kind": "tensor"}
    assert data["inputs"] == [port]
    assert data["operators"] == {"MatMul": 1, "Add": 1, "Relu": 1}
    assert data["macs"] == 2 * 4 * 3
    assert data["weight_bytes"] == (12 + 3) * 4
    text = run("inspect", model).stdout
    assert "x: float[2, 4]" in text
    assert "MatMul: 1" in text


def test_inspect_an_artifact(net: Path):
    data = answer("inspect", net)
    assert data["target"] == "toy:threads=1"
    assert "code/model.onnx" in data["files"]
    assert "precision: fp32" in run("inspect", net).stdout


def test_explain(net: Path):
    data = answer("explain", net, "gemm")
    assert [r["outcome"] for r in data["rows"]] == ["taken", "rejected"]
    assert [k["name"] for k in data["kernels"]] == ["k0"]
    assert data["program"].startswith("[gemm] h = MatMul")
    text = run("explain", net, "gemm").stdout
    for word in ("a kernel less", "over the limit", "k0", "MatMul"):
        assert word in text
    assert "no integer kernel for Relu" in run("explain", net).stdout


def test_explain_an_unknown_node(net: Path):
    result = run("explain", net, "gemn")
    assert result.exit_code == 2
    assert "gemm" in result.stderr


def test_bench(net: Path, tmp_path: Path):
    data = answer("bench", net, "--seconds", "0", "--threads", "1")
    (row,) = data["runs"]
    assert row["calls"] >= 10
    assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
    both = answer("bench", net, "--against", make_artifact(tmp_path / "b"), "--seconds", "0")
    first, second = both["runs"]
    assert first["calls"] == second["calls"]
    assert both["speedup"] == pytest.approx(second["median_us"] / first["median_us"])
    assert "as fast as" in run("bench", net, "--against", net, "--seconds", "0").stdout


def test_a_limit_on_the_size_of_files_is_no_room(tmp_path: Path, model: Path):
    limited = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "runpy.run_module('optcompiler', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, "compile", model, "-o", tmp_path / "out", "--target",
         "cpu:threads=1", "--no-timing", "--precision", "fp32"],
        capture_output=True, text=True,
        env={**os.environ, "OPTCOMPILER_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert "ulimit -f" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["compile", "bisect"])
def test_names_of_passes_are_checked_before_the_model_is_read(tmp_path: Path, command: str):
    (tmp_path / "net.py").write_text("raise SystemExit('it was read')")
    more = ("-o", tmp_path / "out") if command == "compile" else ("--check", "true")
    shared = (command, f"{tmp_path}/net.py:model", *more, "--target", "toy", "--pass")
    result = run(*shared, "hardn")
    assert result.exit_code == 2
    assert "hardn" in result.stderr
    assert "no option 'x'" in run(*shared, "harden:x=1").stderr


def test_verify(net: Path, model: Path):
    assert answer("verify", net)["files"] == 7
    data = answer("verify", net, "--against", model)
    assert data["max_error"] <= 1e-5
    assert data["same_teacher"]
    assert data["tolerance"] == 1e-3


def test_verify_finds_an_altered_file(net: Path):
    (net / "ledger.json").write_text("[]")
    result = run("verify", net)
    assert result.exit_code == 2
    assert "ledger.json is not the file" in result.stderr


def test_verify_finds_other_numbers(net: Path, tmp_path: Path):
    program = Program.from_text(MLP.replace("12}", "13}"))
    program.save(tmp_path / "other.onnx")
    result = run("verify", net, "--against", tmp_path / "other.onnx")
    assert result.exit_code == 1
    assert "output 'y' differs" in result.stderr
    allowed = answer("verify", net, "--against", tmp_path / "other.onnx", "--tolerance", "9")
    assert not allowed["same_teacher"]
    assert answer("verify", net, "--against", tmp_path / "other.onnx", code=1)["error"]


SYMBOLIC = MLP.replace("float[2,4] x", "float[N,4] x").replace("float[2,3] y", "float[N,3] y")
MODULE = """
import torch

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()), (torch.ones(2, 4),)
"""


def test_verify_imports_a_module_with_the_symbols_that_it_was_compiled_with(tmp_path: Path):
    (tmp_path / "net.py").write_text(MODULE)
    reference, out = f"{tmp_path}/net.py:model", tmp_path / "out"
    compiled = ("compile", reference, "-o", out, "--precision", "fp32")
    assert run(*compiled, "--dynamic", "batch", "--target", "toy:size.batch=1").exit_code == 0
    data = answer("verify", out, "--against", reference)
    assert data["same_teacher"]
    assert data["max_error"] <= 1e-5
    assert run(*compiled, "--target", "toy").exit_code == 0
    assert answer("verify", out, "--against", reference)["same_teacher"]


@pytest.mark.parametrize("target", ["toy:size.N=3", "toy"])
def test_verify_knows_a_model_whose_sizes_were_bound(tmp_path: Path, target: str):
    Program.from_text(SYMBOLIC).save(tmp_path / "model.onnx")
    example = None if "size" in target else (np.ones((3, 4), np.float32),)
    with optcompiler.compile(
        tmp_path / "model.onnx", example, target=target, registry=registry(None), timing=False
    ) as compiled:
        compiled.save(tmp_path / "out")
    data = answer("verify", tmp_path / "out", "--against", tmp_path / "model.onnx")
    assert data["same_teacher"]
    assert data["max_error"] <= 1e-5


def test_verify_against_another_size(net: Path, tmp_path: Path):
    Program.from_text(MLP.replace("[2,", "[5,")).save(tmp_path / "other.onnx")
    result = run("verify", net, "--against", tmp_path / "other.onnx")
    assert result.exit_code == 2
    assert "x: float[5, 4]" in result.stderr


def test_verify_against_what_onnx_runtime_cannot_run(tmp_path: Path):
    text = MLP.replace("[act] y = Relu(s)", "[act] y = GatherElements <axis: int = 0> (s, far)")
    program = Program.from_text(
        text.replace("[3] b", "[3] b").replace(
            "b = {0.5,-1,2}>", "b = {0.5,-1,2}, int64[2,3] far = {9,9,9,9,9,9}>"
        )
    )
    net = make_artifact(tmp_path / "net", program)
    program.save(tmp_path / "model.onnx")
    result = run("verify", net, "--against", tmp_path / "model.onnx")
    assert result.exit_code == 2
    assert "cannot run it on random inputs" in result.stderr


def test_verify_against_another_interface(net: Path, tmp_path: Path):
    Program.from_text(MLP.replace("x", "z")).save(tmp_path / "other.onnx")
    result = run("verify", net, "--against", tmp_path / "other.onnx")
    assert result.exit_code == 2
    assert "z: float[2, 4]" in result.stderr


def test_diff(net: Path, tmp_path: Path, model: Path):
    program = Program.from_text(MLP.replace("Relu", "Sigmoid").replace("[bias]", "[shift]"))
    other = make_artifact(tmp_path / "other", program, measurements={"measured_us": 21.0})
    data = answer("diff", net, other)
    assert set(data["nodes"]["removed"]) == {"bias"}
    assert set(data["nodes"]["added"]) == {"shift"}
    assert set(data["nodes"]["changed"]) == {"act"}
    assert data["measurements"]["measured_us"] == [10.5, 21.0]
    assert not data["same_code"]
    text = run("diff", net, other).stdout
    assert "  - [act] y = Relu (s)  # y: float[2, 3]" in text
    assert "  + [act] y = Sigmoid (s)" in text
    assert "10.5 -> 21 (0.50x)" in text
    assert "no difference" in run("diff", model, model).stdout


def test_plugins_and_passes():
    assert [p["backends"] for p in answer("plugins")["plugins"]] == [["toy"]]
    assert "toy" in run("plugins").stdout
    (row,) = answer("passes")["passes"]
    assert (row["name"], row["stage"], row["default"]) == ("harden", "reduce", True)
    assert "harden" in run("passes").stdout
    text = run("passes", "harden").stdout
    assert "Sigmoid becomes HardSigmoid" in text
    assert "stage reduce" in text


def test_device():
    data = answer("device", "--target", "toy:threads=1")
    assert data["target"] == "toy:threads=1"
    assert data["profile"]["estimated"]
    assert "nominal, not measured here" in run("device", "--target", "toy:threads=1").stdout


# -- the process ----------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "word"), [("--help", "bench"), ("--version", __version__)])
def test_help_and_version_load_nothing_heavy(option: str, word: str):
    code = """
import sys, time
from optcompiler.cli import main
try:
    main(sys.argv[1:])
except SystemExit as done:
    assert not done.code
heavy = {"torch", "onnx", "onnx_ir", "onnxruntime", "numpy", "rich", "networkx"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert time.process_time() < 0.3, time.process_time()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, option], check=True, capture_output=True, text=True
    )
    assert word in done.stdout


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "optcompiler", "--version"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split()[-1] == __version__


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes that break")
def test_a_broken_pipe_is_quiet(net: Path):
    reader, writer = os.pipe()
    os.close(reader)
    code = f"from optcompiler.cli import main; main(['explain', {str(net)!r}])"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 141


def test_text_is_not_cut_by_names_from_the_model(tmp_path: Path):
    program = Program.from_text(MLP)
    node = program.node("act")
    assert node is not None
    node.name = "evil\x1b[2J[bold]"
    made = make_artifact(tmp_path / "net", program)
    for arguments in (("explain", made), ("diff", made, made), ("inspect", made)):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.stdout


def test_verify_counts_nan_as_different(tmp_path: Path):
    from optcompiler.cli.verify import _error  # pyright: ignore[reportPrivateUsage]

    nan, one = np.array([np.nan, 1.0]), np.array([1.0, 1.0])
    assert _error(nan, nan) == 0
    assert _error(nan, one) == float("inf")
    assert _error(one, nan) == float("inf")
    assert _error(one, one[:1]) == float("inf")
    assert _error(np.array([2.0, 4.0]), np.array([2.0, 5.0])) == 0.25


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(progress_on(io.StringIO()), Silent)
    terminal = Terminal()
    progress = progress_on(terminal)
    assert isinstance(progress, ConsoleProgress)
    seen = [(a, b) for a in progress.track([1, 2], "outer [x]") for b in progress.track([3], "in")]
    assert seen == [(1, 3), (2, 3)]
    next(iter(progress.track([1, 2], "left early")))
    progress.note("[note] as it is")
    shown = terminal.getvalue()
    assert "outer [x]" in shown
    assert "ETA" in shown
    assert "[note] as it is" in shown
    assert list(Silent().track([1, 2], "nothing")) == [1, 2]
