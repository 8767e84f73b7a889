from __future__ import annotations

import pytest

from optcompiler.errors import InputError
from optcompiler.target import Target


def test_text_round_trip() -> None:
    target = Target("cpu", threads=2, sizes={"batch": 4}, isa="avx2")
    assert str(target) == "cpu:threads=2,size.batch=4,isa=avx2"
    assert Target.parse(str(target)) == target
    assert hash(Target.parse(str(target))) == hash(target)
    assert Target.parse(target) is target


def test_threads_default_to_the_cores_there_are() -> None:
    assert Target("cpu").threads >= 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("cpu:avx2", "not key=value"),
        ("cpu:threads=two", "whole number"),
        ("cpu:threads=0", "1 or more"),
    ],
)
def test_bad_text(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Target.parse(text)


def test_immutable() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        Target("cpu").threads = 3


def test_bounds_of_a_size() -> None:
    target = Target("cpu", threads=1, sizes={"batch": (1, 32), "tokens": 64, "same": (3, 3)})
    assert str(target) == "cpu:threads=1,size.same=3,size.tokens=64,size.batch=1..32"
    assert Target.parse(str(target)) == target
    assert target.bounds == {"batch": (1, 32)}
    assert target.most == {"batch": 32}
    assert target.sizes == {"same": 3, "tokens": 64}
    assert target.named("x").bounds == target.bounds
    assert Target("cpu").completed(target).bounds == {}
    assert Target("cpu", sizes={"n": 2}).sized({"m": (1, 4)}).all_sizes == {"n": 2, "m": (1, 4)}
    with pytest.raises(InputError, match=r"dynamic says batch=1\.\.8"):
        target.sized({"batch": (1, 8)})


@pytest.mark.parametrize("text", ["size.n=4..2", "size.n=0..2", "size.n=1..2..3", "size.n=1..x"])
def test_bad_bounds(text: str) -> None:
    with pytest.raises(InputError, match=r"from more to less|1 or more|key=value"):
        Target.parse(f"cpu:{text}")
