"""Budgets: what is refused, which damage holds, and what the manifest says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from optcompiler.budget import DEFAULT_MAX_DAMAGE, Budget
from optcompiler.errors import InputError

LIMITS = ("max_drop", "max_damage", "max_latency_ms", "max_size_mb", "search_minutes")


def accuracy(model: Callable[..., Any]) -> float:
    return 1.0


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("limit", [-1, float("nan")])
def test_a_limit_is_a_number_that_is_not_negative(name: str, limit: float) -> None:
    with pytest.raises(InputError, match=rf"{name}={limit!r}; give a number that is 0 or more"):
        Budget(**{"metric": accuracy, name: limit})


@pytest.mark.parametrize("name", LIMITS)
def test_zero_and_infinity_are_limits(name: str) -> None:
    for limit in (0, float("inf")):
        assert getattr(Budget(**{"metric": accuracy, name: limit}), name) == limit


def test_a_drop_needs_a_metric() -> None:
    with pytest.raises(InputError, match="max_drop needs a metric"):
        Budget(max_drop=0.5)


def test_the_damage_that_holds() -> None:
    assert Budget().damage_limit == DEFAULT_MAX_DAMAGE
    assert Budget(metric=accuracy).damage_limit == DEFAULT_MAX_DAMAGE
    assert Budget(max_damage=0.3).damage_limit == 0.3
    assert Budget(max_damage=0.0).damage_limit == 0.0
    assert Budget(max_drop=0.5, metric=accuracy).damage_limit == float("inf")
    assert Budget(max_drop=0.5, metric=accuracy, max_damage=0.3).damage_limit == 0.3


def test_a_drop_is_positive_when_worse() -> None:
    assert Budget().drop(0.9, 0.7) == pytest.approx(0.2)
    assert Budget(larger_is_better=False).drop(0.9, 0.7) == pytest.approx(-0.2)


def test_description_is_json() -> None:
    described = Budget(max_drop=0.5, metric=accuracy, larger_is_better=False).describe()
    assert json.loads(json.dumps(described, allow_nan=False)) == {
        "max_drop": 0.5, "max_damage": None, "damage_limit": None, "max_latency_ms": None,
        "max_size_mb": None, "search_minutes": None, "metric": "accuracy",
        "larger_is_better": False,
    }  # fmt: skip
    assert Budget().describe()["metric"] is None
