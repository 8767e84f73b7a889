"""The cache: private, checked at every read, shared by processes, and never in the way."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optcompiler import cache
from optcompiler.cache import Cache, private_directory
from optcompiler.errors import CacheWarning, InputError

FACTS = {"machine": "m", "versions": {"b": "2", "a": "1"}, "threads": 1}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "made" / "here"


def entry(directory: Path) -> Path:
    (path,) = directory.glob("*.entry")
    return path


def test_what_is_put_is_got_by_the_same_facts_alone(place: Path) -> None:
    store = Cache(place)
    assert store.get("kind", FACTS) is None
    store.put("kind", FACTS, b"one\ntwo\0")
    assert Cache(place).get("kind", dict(reversed(FACTS.items()))) == b"one\ntwo\0"
    for kind, facts in (("other", FACTS), ("kind", {**FACTS, "threads": 2}), ("kind", {})):
        assert store.get(kind, facts) is None
    store.put("kind", FACTS, b"")
    assert store.get("kind", FACTS) == b""
    assert place.stat().st_mode & 0o777 == 0o700
    assert entry(place).stat().st_mode & 0o777 == 0o600


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTCOMPILER_CACHE", str(tmp_path / "named"))
    assert cache.location() == tmp_path / "named"
    monkeypatch.delenv("OPTCOMPILER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.location() == tmp_path / "optcompiler"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.location() == tmp_path / "home" / ".cache" / "optcompiler"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert str(os.geteuid()) in cache.location().name


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swap(path: Path) -> None:
    """An entry that is whole, but of other facts."""
    Cache(path.parent).put("kind", {"other": 1}, b"other")
    (other,) = set(path.parent.glob("*.entry")) - {path}
    other.replace(path)


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


DAMAGES: list[Callable[[Path], Any]] = [
    cut, flip, swap, linked, a_pipe, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"{}\n"),
    lambda p: p.write_bytes(p.read_bytes().partition(b"\n")[0]), lambda p: p.chmod(0o666),
    lambda p: p.write_bytes(p.read_bytes() + b"more"), lambda p: p.write_bytes(b"x" * (2 << 20)),
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_damaged_is_absent_and_goes(place: Path, damage: Callable[[Path], Any]) -> None:
    store = Cache(place)
    store.put("kind", FACTS, b"content")
    path = entry(place)
    damage(path)
    assert store.get("kind", FACTS) is None
    if not path.is_symlink():
        assert not path.exists()
    store.put("kind", FACTS, b"again")
    assert store.get("kind", FACTS) == (None if path.is_symlink() else b"again")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("what", ["directory", "link", "entry"])
def test_what_belongs_to_another_user_is_not_used(place: Path, what: str) -> None:
    store = Cache(place)
    store.put("kind", FACTS, b"content")
    if what == "entry":
        os.chown(entry(place), 12345, -1)
        assert store.get("kind", FACTS) is None
        return
    if what == "link":
        link = place.with_name("link")
        link.symlink_to(place)
        assert Cache(link).get("kind", FACTS) == b"content"
        store, place = Cache(link), link
    os.chown(place, 12345, -1, follow_symlinks=False)
    with pytest.raises(InputError, match="belongs to another user; set OPTCOMPILER_CACHE"):
        private_directory(place)
    with pytest.warns(CacheWarning, match="belongs to another user"):
        assert store.get("kind", FACTS) is None


def test_a_directory_that_others_may_write_is_not_used(place: Path) -> None:
    private_directory(place).chmod(0o777)
    with pytest.raises(InputError, match=r"written by other users \(mode 777\).*chmod 700"):
        private_directory(place)
    with pytest.warns(CacheWarning, match="chmod 700"):
        Cache(place).put("kind", FACTS, b"content")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("trouble", ["file", "none", "full"])
def test_trouble_costs_a_warning(
    place: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    store = Cache(place)
    if trouble == "full":
        store.put("kind", FACTS, b"old")

        def full(handle: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    elif trouble == "file":
        place.parent.mkdir()
        place.write_text("")
    else:
        store = Cache(Path("/proc/none"))
    with pytest.warns(CacheWarning, match="nothing is kept for the next compile"):
        store.put("kind", FACTS, b"new")
    if trouble == "full":
        assert store.get("kind", FACTS) == b"old"
        return
    with pytest.warns(CacheWarning), store.lock("kind", FACTS):
        assert store.get("kind", FACTS) is None


def test_a_lock_that_stays_taken_is_not_waited_for_for_ever(place: Path) -> None:
    with Cache(place).lock("kind", FACTS):
        other = Cache(place)
        with other.lock("kind", FACTS, seconds=0):
            other.put("kind", FACTS, b"anyway")
    assert other.get("kind", FACTS) == b"anyway"


MAKER = """
import os, sys, time
from pathlib import Path
from optcompiler.cache import Cache
place, told, kill = Path(sys.argv[1]), Path(sys.argv[2]), len(sys.argv) > 3
(told / f"ready-{os.getpid()}").touch()
while not (told / "go").exists():
    time.sleep(0.001)
store = Cache(place)
for number in range(20):
    facts = {"number": number}
    if store.get("kind", facts) is None:
        with store.lock("kind", facts):
            if store.get("kind", facts) is None:
                (told / f"{number}-{os.getpid()}").touch()
                if kill and number == 10:
                    os.kill(os.getpid(), 9)
                store.put("kind", facts, b"%d" % number * 1000)
    assert store.get("kind", facts) == b"%d" % number * 1000
"""


def test_several_processes_make_each_entry_once_and_one_that_dies_holds_nobody_up(
    tmp_path: Path, place: Path
) -> None:
    told = tmp_path / "told"
    told.mkdir()
    command = [sys.executable, "-c", MAKER, str(place), str(told)]
    makers = [subprocess.Popen(command) for _ in range(3)]
    mortal = subprocess.Popen([*command, "kill"])
    while len(list(told.iterdir())) < 4:
        time.sleep(0.01)
    (told / "go").touch()
    assert [maker.wait() for maker in makers] == [0, 0, 0]
    died = mortal.wait() == -9
    made = [len(list(told.glob(f"{number}-*"))) for number in range(20)]
    assert made == [2 if died and number == 10 else 1 for number in range(20)]
    assert len(list(place.glob("*.entry"))) == 20
