"""Extents compute as ints do, at every size, and are never taken for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optcompiler.lowering.extents import (
    Extent,
    RunTimeExtent,
    Symbol,
    at,
    c_long,
    extent,
    largest,
    symbols,
    values,
)

BATCH, TOKENS = Symbol("batch", 1, 32), Symbol("tokens", 8, 128)
Formula = Callable[[Any, Any], Any]

FORMULAS: list[Formula] = [
    lambda b, t: b * 49 + 3,
    lambda b, t: 5 - b * t * t,
    lambda b, t: -(-(b * 49) // 6),
    lambda b, t: (b * t * 6 + 3) % 8,
    lambda b, t: (b * t * 6 + 3) // 4,
    lambda b, t: (b * 7 - 500) // 3,
    lambda b, t: (b - 40) % 7,
    lambda b, t: 100 // b + -100 // t,
    lambda b, t: (b * 4 + t) // b,
    lambda b, t: b * t * 64 // t,
    lambda b, t: (t // 2) % 3 + (t + 1) * (t + 1),
    lambda b, t: abs(b - 40),
    lambda b, t: 7 % t - b % 5,
]


@pytest.mark.parametrize("formula", FORMULAS)
def test_arithmetic_is_that_of_ints_in_python_and_in_c(formula: Formula) -> None:
    made = formula(extent(BATCH), extent(TOKENS))
    for b in (1, 2, 7, 31, 32):
        for t in (8, 9, 64, 127, 128):
            number = formula(b, t)
            assert at(made, {"batch": b, "tokens": t}) == number
            # C rounds towards zero; every dividend here is to be positive, where `//` is the same
            text = str(made).replace("/", "//")
            assert eval(text, {"n_batch": b, "n_tokens": t}) == number


def test_what_cancels_is_an_int() -> None:
    b = extent(BATCH)
    assert b * 6 - b * 5 - b == 0
    assert b * 64 % 8 == 0
    assert (b * 64 + 3) // b != 64
    assert b * 64 // b == 64
    assert type(b * 64 // b) is int


def test_an_extent_equals_its_like_and_no_int() -> None:
    b, t = extent(BATCH), extent(TOKENS)
    assert b * t + b == b * (t + 1)
    assert hash(b * t) == hash(t * b)
    assert b != 32
    assert b * 1 == b
    assert bool(b % 4)


def test_decisions_are_made_for_the_largest() -> None:
    b, t = extent(BATCH), extent(TOKENS)
    assert largest(b * t) == 4096
    assert largest(40 - b) == 39
    assert b >= 32
    assert not b > 32
    assert b <= 32
    assert max(b, t, 3) is t
    assert min(b, 4) == 4
    assert largest(7) == 7


@pytest.mark.parametrize("wanted", [range, int, float, lambda b: 1 / b, "abc".__getitem__])
def test_wanting_its_number_is_an_error(wanted: Callable[[Any], object]) -> None:
    with pytest.raises(RunTimeExtent, match="n_batch"):
        wanted(extent(BATCH))


def test_numpy_takes_none_either() -> None:
    with pytest.raises(TypeError):
        np.zeros(extent(BATCH))


def test_a_quotient_of_what_may_be_negative_is_an_error() -> None:
    with pytest.raises(RunTimeExtent):
        (extent(BATCH) - 5) // 2


def test_spelling_and_values() -> None:
    b, t = extent(BATCH), extent(TOKENS)
    assert str(b) == "n_batch"
    assert str(b * 49 - 1) == "(49 * n_batch - 1)"
    assert f"{-(-b // 6)}" == "((n_batch + 5) / 6)"
    assert c_long(7) == "7L"
    assert c_long(b) == "n_batch"
    assert str(extent(Symbol("a b", 1, 2))) == "n_a_b"
    assert values(b * 2) == set(range(2, 65, 2))
    assert values(3) == {3}
    assert values(extent(Symbol("n", 1, 1 << 20))) is None
    assert symbols(b * t) == {BATCH, TOKENS}
    assert symbols(3) == set()


def test_what_is_greatest_at_the_bounds() -> None:
    b, t = extent(BATCH), extent(TOKENS)
    for sized, whether in (
        (b * t * t + 3, True),
        (b - 3, False),
        (t * t * t, False),
        (t // 3, False),
    ):
        assert isinstance(sized, Extent)
        assert sized.sums_products is whether
    corners = [*(b * 2).corners({TOKENS})]
    assert {(c["batch"], c["tokens"]) for c in corners} == {(1, 8), (1, 128), (32, 8), (32, 128)}
