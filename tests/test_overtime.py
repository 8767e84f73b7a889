"""Interrupting code that does not end: on the main thread and others, nested, stubborn, and never
outside the call."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from optcompiler import overtime
from optcompiler.overtime import Overtime, TimeIsUp, within

BRIEF = 0.05


def forever() -> None:
    while True:
        pass


def here(test: Callable[[], Any]) -> None:
    test()


def elsewhere(test: Callable[[], Any]) -> None:
    """Run in a thread; what it raises is raised here."""
    failed: list[BaseException] = []

    def body() -> None:
        try:
            test()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(300)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


def occupied(test: Callable[[], Any]) -> None:
    """On the main thread of a program that uses the timer itself."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        test()
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=[here, elsewhere, occupied])
def place(request: pytest.FixtureRequest) -> Callable[[Callable[[], Any]], None]:
    return request.param


def test_what_ends_in_time_is_left_alone(place: Callable[..., None]) -> None:
    def test() -> None:
        assert within(5, lambda: 7) == 7
        with pytest.raises(KeyError):
            within(5, lambda: {}["nothing"])
        assert within(float("inf"), lambda: 7) == 7

    place(test)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def test_a_loop_is_stopped(place: Callable[..., None]) -> None:
    def test() -> None:
        with pytest.raises(TimeIsUp):
            within(BRIEF, forever)

    place(test)


def test_an_endless_generator_is_stopped(place: Callable[..., None]) -> None:
    def numbers() -> Iterator[int]:
        while True:
            yield 1

    def test() -> None:
        with pytest.raises(TimeIsUp):
            within(BRIEF, lambda: sum(numbers()))

    place(test)


def test_handlers_do_not_swallow_it(
    place: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overtime, "AGAIN_S", BRIEF)

    def stubborn() -> None:
        for _ in range(3):
            with contextlib.suppress(Exception):
                forever()
        raise AssertionError

    def very_stubborn() -> None:
        with contextlib.suppress(BaseException):
            forever()
        forever()

    def test() -> None:
        with pytest.raises(TimeIsUp):
            within(BRIEF, stubborn)
        with pytest.raises(TimeIsUp):
            within(BRIEF, very_stubborn)

    place(test)


def test_what_was_interrupted_is_over_whatever_it_returns(place: Callable[..., None]) -> None:
    def unimpressed() -> int:
        with contextlib.suppress(BaseException):
            forever()
        return 3

    def offended() -> None:
        try:
            forever()
        except BaseException as error:
            raise ValueError("interrupted") from error

    def test() -> None:
        for call in (unimpressed, offended):
            with pytest.raises(TimeIsUp):
                within(BRIEF, call)

    place(test)


def test_limits_nest(place: Callable[..., None]) -> None:
    def outer_first() -> None:
        with contextlib.suppress(TimeIsUp):
            within(60, forever)
        raise AssertionError

    def inner_first() -> int:
        with pytest.raises(TimeIsUp):
            within(BRIEF, forever)
        return 3

    def test() -> None:
        with pytest.raises(TimeIsUp):
            within(BRIEF, outer_first)
        assert within(60, inner_first) == 3

    place(test)


def test_sleep_is_interrupted_on_the_main_thread() -> None:
    start = time.monotonic()
    with pytest.raises(TimeIsUp):
        within(BRIEF, lambda: time.sleep(30))
    assert time.monotonic() - start < 10


def test_ctrl_c_goes_through(place: Callable[..., None]) -> None:
    def pressed() -> None:
        raise KeyboardInterrupt

    def test() -> None:
        with pytest.raises(KeyboardInterrupt):
            within(5, pressed)

    place(test)


def test_nothing_strikes_outside(place: Callable[..., None]) -> None:
    """Calls that end just as their time does: either outcome, and nothing afterwards."""

    def test() -> None:
        outcomes: set[str] = set()
        for step in range(200):
            ends = time.monotonic() + 0.002 + (step % 7 - 3) * 3e-4

            def busy(ends: float = ends) -> None:
                while time.monotonic() < ends:
                    pass

            try:
                within(0.002, busy)
                outcomes.add("ended")
            except TimeIsUp:
                outcomes.add("stopped")
            for _ in range(1000):
                pass
        assert outcomes == {"ended", "stopped"}

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        place(test)
    except Overtime:
        pytest.fail("struck outside of the call")
    finally:
        sys.setswitchinterval(interval)


AFTERWARDS = """
import cProfile, threading
from optcompiler.overtime import TimeIsUp, within

def limited():
    within(60, lambda: 7)
    try:
        within(0.05, lambda: [None for _ in iter(int, 1)])
    except TimeIsUp:
        print("stopped")

thread = threading.Thread(target=limited)
thread.start()
thread.join()
profile = cProfile.Profile()
profile.runcall(lambda: sum(map(abs, range(9))))
print(len(profile.getstats()) > 0)
"""


def test_a_profiler_can_be_used_afterwards() -> None:
    """Python up to 3.12 hangs there when an asynchronous exception was withdrawn."""
    done = subprocess.run(
        [sys.executable, "-c", AFTERWARDS], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["stopped", "True"]
