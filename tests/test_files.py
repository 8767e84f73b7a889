"""Atomic writes, JSON of one spelling, paths that stay inside."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from optcompiler import claims, files
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
    with pytest.raises(InputError, match=r"a\.txt: No space left on device; free some space"):
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


def test_links_are_followed_and_permissions_kept(tmp_path: Path):
    path, link = tmp_path / "a.txt", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    files.write_text(link, "new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    os.mkfifo(tmp_path / "pipe")
    for other in ("pipe", "."):
        with pytest.raises(InputError, match=r"it is not a file; choose another place\."):
            files.write_text(tmp_path / other, "new")
    with pytest.raises(InputError, match=r"cannot write .*: No such file or directory"):
        files.write_text(tmp_path / "none" / "a.txt", "new")


@pytest.mark.parametrize("name", ["net", "n" * 250])
def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(tmp_path: Path, name: str):
    destination = tmp_path / name
    stem = files._stem(destination)  # pyright: ignore[reportPrivateUsage]
    for suffix in (".new", ".tmp"):
        claims.claim(tmp_path, stem, suffix, folder=suffix == ".new", mode=0o700).release()
    (next(tmp_path.glob("*.new")) / "half").write_text("written")
    (tmp_path / ".net.mine.new").write_text("mine")
    with claims_held(tmp_path, stem) as held:
        with files.replacing_directory(destination, lambda _: None) as fresh:
            (fresh / "a").write_text("whole")
        assert {p.name for p in tmp_path.iterdir()} == {name, ".net.mine.new", held.name}
    assert (destination / "a").read_text() == "whole"


@contextlib.contextmanager
def claims_held(parent: Path, stem: str) -> Iterator[Path]:
    held = claims.claim(parent, stem, ".new", folder=True, mode=0o700)
    try:
        yield held.path
    finally:
        held.release()


def test_an_old_directory_that_was_put_aside_comes_back(tmp_path: Path):
    aside = tmp_path / ".net.0123456789ab.old"
    aside.mkdir()
    (aside / "old").write_text("old")

    def refuse(directory: Path) -> None:
        raise InputError("no")

    with pytest.raises(InputError), files.replacing_directory(tmp_path / "net", refuse):
        pytest.fail("the body must not run")
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    assert (tmp_path / "net" / "old").read_text() == "old"


def test_parents_that_were_made_go_when_nothing_is_written(tmp_path: Path):
    def fill() -> None:
        with files.replacing_directory(tmp_path / "a" / "b" / "net", lambda _: None):
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_files_that_belong_together_arrive_before_the_one_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a"
    path.write_text("old")
    order: list[str] = []
    replace = Path.replace

    def noted(self: Path, target: Path) -> Path:
        order.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    with files.replacing_files(path) as folder:
        for name in ("a", "a.1", "Z"):
            (folder / name).write_text(name)
    assert order[-1] == "a"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Z", "a", "a.1"]
    assert path.read_text() == "a"


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
        pytest.raises(InputError, match="Input/output"),
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
