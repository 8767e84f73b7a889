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
