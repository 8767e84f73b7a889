"""What an artifact holds, that it is the same twice, and that a changed one is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optcompiler.artifact import is_artifact, open_artifact, program_text
from optcompiler.errors import InputError
from optcompiler.files import sha256_of
from optcompiler.ledger import Ledger, Row
from optcompiler.program import Program
from tests.support import MLP, ROWS, make_artifact

WRONG = {"parameters": [], "result": {"kind": "code"}, "inputs": [], "outputs": []}


def contents_of(directory: Path) -> dict[str, bytes]:
    return {
        p.relative_to(directory).as_posix(): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def test_what_it_says_is_read_back(tmp_path: Path):
    program = Program.from_text(MLP)
    opened = open_artifact(make_artifact(tmp_path / "net", program))
    assert str(opened.target) == "toy:threads=1"
    assert opened.inputs == program.inputs
    assert opened.outputs == program.outputs
    assert list(opened.ledger) == ROWS
    assert opened.measurements["measured_us"] == 10.5
    assert opened.backend_info == {}
    assert opened.manifest["program_hash"] == program.content_hash()
    assert set(opened.manifest["files"]) == {"code/model.onnx", "program.txt"}
    assert set(opened.records["files"]) == {"ledger.json", "measurements.json", "summary.txt"}
    assert is_artifact(tmp_path / "net")
    assert not is_artifact(tmp_path)


def test_the_same_twice_and_nothing_of_the_place_or_time(tmp_path: Path):
    one = contents_of(make_artifact(tmp_path / "one"))
    two = contents_of(make_artifact(tmp_path / "elsewhere" / "two"))
    assert one == two
    assert not any(str(tmp_path).encode() in content for content in one.values())


def test_what_was_measured_is_not_in_the_manifest(tmp_path: Path):
    one = contents_of(make_artifact(tmp_path / "one"))
    two = contents_of(make_artifact(tmp_path / "two", measurements={"measured_us": 11.0}))
    different = {name for name in one if one[name] != two[name]}
    assert different == {"measurements.json", "summary.txt", "records.json"}


def test_odd_numbers_survive(tmp_path: Path):
    ledger = Ledger([Row("p", "s", "c", "taken", "why", False, float("inf"), float("nan"))])
    directory = make_artifact(
        tmp_path / "net", ledger=ledger, measurements={"damage": float("inf"), "x": np.float32(1)}
    )
    opened = open_artifact(directory)
    assert opened.ledger[0].saving_us == float("inf")
    assert opened.ledger[0].damage is not None
    assert np.isnan(opened.ledger[0].damage)
    json.loads((directory / "ledger.json").read_text(), parse_constant=pytest.fail)
    assert opened.measurements == {"damage": "inf", "x": 1.0}


def test_program_text_is_short():
    large = ", ".join(["1"] * 300)
    program = Program.from_text(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[2,300] x) => (float[2,300] y) <float[300] big = {{{large}}}, float[1] c = {{2}}>
        {{ [add] s = Add(x, big)
           [mul] y = Mul(s, c) }}"""
    )
    text = program_text(program)
    assert "[add] s = Add (x, big)  # s: float[2, 300]\n" in text
    assert '#   "c": FLOAT[1] {2.0}\n' in text
    assert '#   "big": FLOAT[300] sha256 ' in text
    assert len(text) < 600
    assert "big" in program.weights()


def _edit(directory: Path, **changes: Any) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _forge(directory: Path, **changes: Any) -> None:
    """Like `_edit`, and the records are made to say so."""
    _edit(directory, **changes)
    path = directory / "records.json"
    sealed = {"manifest": sha256_of(directory / "manifest.json")}
    path.write_text(json.dumps(json.loads(path.read_text()) | sealed))


def _alter(directory: Path) -> None:
    path = directory / "code" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "code" / "model.onnx").unlink(), "code/model.onnx is missing"),
        (_alter, "code/model.onnx is not the file that was compiled"),
        (lambda d: (d / "summary.txt").write_text("x"), "summary.txt is not the file"),
        (
            lambda d: (d / "code" / "extra.so").write_text("x"),
            "code/extra.so is not in the manifest",
        ),
        (lambda d: (d / "manifest.json").unlink(), "not an artifact"),
        (lambda d: (d / "manifest.json").write_text("{"), "not JSON"),
        (lambda d: (d / "manifest.json").write_text("[]"), "not one of optcompiler's"),
        (lambda d: _edit(d, format="other"), "not one of optcompiler's"),
        (lambda d: _edit(d, format_version=99), "artifact format 99"),
        (lambda d: _edit(d, files={"../x": {"sha256": "", "size_bytes": 0}}), "not a path inside"),
        (lambda d: _edit(d, files={}), "code/model.onnx is not in the manifest"),
        (lambda d: _edit(d, files=3), "not a whole artifact"),
        (lambda d: _edit(d, interface={}), "not a whole artifact"),
        (lambda d: _edit(d, versions={}), "records.json belongs to another manifest.json"),
        (lambda d: _forge(d, signature=WRONG), "not a signature"),
        (lambda d: (d / "records.json").unlink(), "records.json is missing; compile or copy"),
        (lambda d: (d / "records.json").write_text("[]"), "not a whole artifact"),
    ],
)
def test_what_was_changed_is_refused(tmp_path: Path, damage: Any, message: str):
    directory = make_artifact(tmp_path / "net")
    damage(directory)
    with pytest.raises(InputError, match=message):
        open_artifact(directory)


def test_a_linked_file_that_leads_out_is_refused(tmp_path: Path):
    directory = make_artifact(tmp_path / "net")
    shutil.move(directory / "summary.txt", tmp_path / "summary.txt")
    (directory / "summary.txt").symlink_to(tmp_path / "summary.txt")
    with pytest.raises(InputError, match="not a path inside"):
        open_artifact(directory)


def test_a_directory_that_is_not_there(tmp_path: Path):
    with pytest.raises(InputError, match="is not an artifact"):
        open_artifact(tmp_path / "none")
