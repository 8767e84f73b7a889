"""Ctrl-C and SIGTERM end the program at any moment, with one line, and leave what was there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interruption import MOMENTS, interrupt
from tests.support import make_artifact

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")

LINES = {
    signal.SIGINT: "optcompiler: interrupted.\n",
    signal.SIGTERM: "optcompiler: interrupted by SIGTERM.\n",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c(tmp_path: Path, moment: str) -> None:
    """What interrupts sleeps for ten minutes; the time that ending takes is printed by
    `python -m tests.interruption`."""
    done = interrupt(moment, tmp_path)
    assert (done.code, done.stderr) == (130, LINES[signal.SIGINT])
    assert done.left == ()
    assert done.kept
    assert done.stdout == ""


@pytest.mark.parametrize("moment", ["waits", "native"])
def test_sigterm_to_the_first_process_alone(tmp_path: Path, moment: str) -> None:
    done = interrupt(moment, tmp_path, [signal.SIGTERM], whole_group=False, arguments=["--json"])
    assert (done.code, done.stderr) == (143, LINES[signal.SIGTERM])
    assert json.loads(done.stdout)["error"] == {
        "kind": "Interrupted", "message": "interrupted by SIGTERM.", "exit_code": 143,
    }  # fmt: skip
    assert done.left == ()
    assert done.kept


@pytest.mark.parametrize("moment", ["waits", "swallows"])
def test_more_signals_change_nothing(tmp_path: Path, moment: str) -> None:
    numbers = [signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT]
    done = interrupt(moment, tmp_path, numbers)
    assert done.stderr in LINES.values()
    assert done.code in (130, 143)
    assert done.left == ()
    assert done.kept


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "model.py").write_text(f"import os, signal\ndef model():\n    {code}\n")
    return subprocess.run(
        [sys.executable, "-m", "optcompiler", "inspect", str(folder / "model.py:model")],
        capture_output=True, text=True, env=os.environ | {"TMPDIR": str(folder)},
    )  # fmt: skip


def test_a_crash_in_native_code_is_an_internal_error(tmp_path: Path) -> None:
    done = run("os.kill(os.getpid(), signal.SIGSEGV)", tmp_path)
    assert done.returncode == 70
    assert "internal error: RuntimeError: ended by SIGSEGV in native code" in done.stderr
    (place,) = tmp_path.glob("optcompiler-crash-*")
    assert str(place) in done.stderr
    assert "model.py:model" in (place / "command.txt").read_text()


def test_a_process_that_was_killed_is_told(tmp_path: Path) -> None:
    done = run("os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    assert done.returncode == 137
    assert done.stderr.startswith("optcompiler: killed by SIGKILL; ")


def test_under_nohup_a_closed_terminal_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import os, signal\ndef model():\n    os.kill(os.getppid(), signal.SIGHUP)\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n    return 'done'\n"
    )
    command = f"trap '' HUP; exec {sys.executable} -m optcompiler inspect {tmp_path}/model.py:model"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert "returned a str" in done.stderr


def test_when_the_waiting_process_is_killed_the_working_one_goes_too(tmp_path: Path) -> None:
    """Nobody is left to remove its scratch directory; the next process does."""
    done = interrupt("saving_natively", tmp_path, [signal.SIGKILL], whole_group=False)
    assert (done.code, done.stderr, done.kept) == (-9, "", True)
    assert [left for left in done.left if left.startswith("process")] == []
    assert any("optcompiler-scratch-" in left for left in done.left)
    assert any(".out." in left for left in done.left)
    net = make_artifact(tmp_path / "made")
    code = "from optcompiler.compiled import load; load({!r}, registry=registry()).save({!r})"
    code = "from optcompiler import scratch; from tests.toy import registry; scratch.new(); " + code
    subprocess.run(
        [sys.executable, "-c", code.format(str(net), str(tmp_path / "work" / "out"))],
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp"), "ORT_DISABLE_TELEMETRY": "1"},
        check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert list((tmp_path / "tmp").iterdir()) == []
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["out"]


def test_ctrl_c_reaches_a_job_that_a_script_put_into_the_background(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = interrupt("waits", tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.code, done.stderr) == (130, LINES[signal.SIGINT])
