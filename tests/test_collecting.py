"""The collector's thresholds, which belong to the whole process."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pytest

from optcompiler.collecting import YOUNG, collecting_seldom


@pytest.fixture(autouse=True)
def _own_thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_thresholds_rise_inside_and_are_put_back() -> None:
    gc.set_threshold(700, 10, 10)
    with collecting_seldom():
        with collecting_seldom():
            assert gc.get_threshold() == (YOUNG, 10, 10)
        assert gc.get_threshold() == (YOUNG, 10, 10)
    assert gc.get_threshold() == (700, 10, 10)


def test_a_failure_puts_them_back_too() -> None:
    gc.set_threshold(700, 10, 10)
    with contextlib.suppress(KeyError), collecting_seldom():
        raise KeyError
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize("own", [(0, 10, 10), (2 * YOUNG, 3, 4)])
def test_what_is_off_or_higher_already_stays(own: tuple[int, int, int]) -> None:
    gc.set_threshold(*own)
    with collecting_seldom():
        assert gc.get_threshold() == own
    assert gc.get_threshold() == own
