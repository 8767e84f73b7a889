"""Atomic writes, JSON of one spelling, paths that stay inside."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from optcompiler import files
from optcompiler.errors import InputError


@dataclass
class Point:
    x: int
    where: Path


def test_json_is_sorted_plain_and_strict():
    value = {
        "b": np.float32(0.5), "a": {np.int64(2), np.int64(1)}, "p": Point(1, Path("x/y")),
        "c": (True, None), "n": float("nan"), "i": -np.inf, "v": np.arange(2), 3: "key",
    }  # fmt: skip
    text = files.to_json(value)
    assert list(json.loads(text)) == sorted(map(str, value))
    assert json.loads(text, parse_constant=pytest.fail) == {
        "3": "key", "a": [1, 2], "b": 0.5, "c": [True, None], "i": "-inf", "n": "nan",
        "p": {"x": 1, "where": "x/y"}, "v": [0, 1],
    }  # fmt: skip
    assert text.endswith("}\n")
    assert files.number("-inf") == -np.inf
    named = files.plain([object(), Point, test_json_is_sorted_plain_and_strict])
    assert named == [
        "<builtins.object>",
        f"<{__name__}.Point>",
        f"<{__name__}.test_json_is_sorted_plain_and_strict>",
    ]


def test_write_text_replaces_or_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    files.write_text(path, "one\n")
    files.write_text(path, "two\n")
    assert path.read_bytes() == b"two\n"

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "three\n")
    assert path.read_bytes() == b"two\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../up", "a/../../up", "a\\b", "C:/x", "", "link/x"]
)
def test_paths_that_lead_out_are_refused(tmp_path: Path, name: str):
    directory = tmp_path / "d"
    directory.mkdir()
    (directory / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="not a path inside"):
        files.inside(directory, name)


def test_paths_that_stay_inside(tmp_path: Path):
    assert files.inside(tmp_path, "a/b.txt") == tmp_path / "a/b.txt"


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    destination = tmp_path / "deep" / "net"
    for content in ("one", "two"):
        with files.replacing_directory(destination, lambda d: None) as fresh:
            (fresh / content).write_text(content)
        assert [p.name for p in destination.iterdir()] == [content]
        assert [p.name for p in destination.parent.iterdir()] == ["net"]


def test_a_failure_while_filling_changes_nothing(tmp_path: Path):
    destination = tmp_path / "net"
    destination.mkdir()
    (destination / "old").write_text("old")

    def fill() -> None:
        with files.replacing_directory(destination, lambda d: None) as fresh:
            (fresh / "new").write_text("new")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fill()
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    assert [p.name for p in destination.iterdir()] == ["old"]


def test_a_failure_between_two_renames_brings_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    destination = tmp_path / "net"
    destination.mkdir()
    (destination / "old").write_text("old")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with (
        pytest.raises(OSError, match="Input/output"),
        files.replacing_directory(destination, lambda d: None) as fresh,
    ):
        (fresh / "new").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    assert [p.name for p in destination.iterdir()] == ["old"]


def test_what_check_refuses_stays(tmp_path: Path):
    destination = tmp_path / "net"
    destination.mkdir()

    def refuse(directory: Path) -> None:
        raise InputError("no")

    with pytest.raises(InputError), files.replacing_directory(destination, refuse):
        pytest.fail("the body must not run")
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_files_under_lists_links_without_following(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert files.files_under(tmp_path) == ["a/f", "loop"]
