"""A limit on the time that somebody else's Python code may take, on any thread.

On the main thread the system's timer interrupts, blocking calls such as `time.sleep` included. On
other threads, and where the program uses that timer itself, a watching thread does, which reaches
Python code only. Neither reaches into a long call of C code before it returns.
"""

from __future__ import annotations

import ctypes
import inspect
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

T = TypeVar("T")

AGAIN_S = 1.0
"""Code that swallows the interruption is interrupted again after this long."""

SOON_S = 0.01


class Overtime(BaseException):
    """Raised in the code that takes too long; no `Exception`, so that its handlers let it pass."""


class TimeIsUp(Exception):
    """What `within` raises when the call was interrupted."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """`call()`; raises `TimeIsUp` when it has not returned after `seconds`.

    The interruption strikes in frames that `call` runs and never in the caller's, so no clean-up of
    the caller's is ever cut short. Calls nest, and Ctrl-C works as always.
    """
    if not math.isfinite(seconds):
        return call()
    return _by_timer(seconds, call) if _timer_is_free() else _by_watcher(seconds, call)


def _here() -> FrameType:
    """The frame of the function that asks."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back


class _Limit:
    """One running call: when it is due, and the frame below which it may be interrupted."""

    def __init__(self, seconds: float, frame: FrameType) -> None:
        self.deadline = time.monotonic() + seconds
        self.frame = frame
        self.begun = False
        self.struck = False
        self.overtime = type("Overtime", (Overtime,), {})

    def covers(self, frame: FrameType | None) -> bool:
        """Whether `frame` runs inside the call, which has begun, and not in this module's code."""
        if not self.begun or frame is None or frame.f_code in _OWN:
            return False
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None

    def run(self, call: Callable[[], T]) -> T:
        """`call()`; one that was interrupted is over, whatever it made of that."""
        try:
            self.begun = True
            result = call()
        except KeyboardInterrupt:
            raise
        except BaseException:
            if self.struck:
                raise TimeIsUp from None
            raise
        if self.struck:
            raise TimeIsUp
        return result


# -- by the system's timer --------------------------------------------------------------------

_running: list[_Limit] = []
"""Calls under the timer, outermost first; only the main thread touches it."""


def _timer_is_free() -> bool:
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        return False
    if signal.getsignal(signal.SIGALRM) is _ring:
        return True
    unused = signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    return unused and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def _by_timer(seconds: float, call: Callable[[], T]) -> T:
    limit = _Limit(seconds, _here())
    if not _running:
        signal.signal(signal.SIGALRM, _ring)
    _running.append(limit)
    _arm()
    try:
        return limit.run(call)
    finally:
        _running.pop()
        if _running:
            _arm()
        else:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _arm() -> None:
    """Set the timer to the earliest deadline; what is overdue already was interrupted once."""
    now, due = time.monotonic(), math.inf
    for limit in _running:
        left = limit.deadline - now
        due = min(due, left if left > 0 else AGAIN_S)
    signal.setitimer(signal.ITIMER_REAL, due)


def _ring(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    for limit in _running:
        if limit.deadline > now:
            continue
        if limit.covers(frame):
            _arm()
            limit.struck = True
            raise limit.overtime
        signal.setitimer(signal.ITIMER_REAL, SOON_S)
        return
    if _running:
        _arm()


# -- by a watching thread ---------------------------------------------------------------------

_frames = sys._current_frames  # pyright: ignore[reportPrivateUsage]  # documented, has no other name
_set_exception: Any = ctypes.pythonapi.PyThreadState_SetAsyncExc


def _raise_in(thread: int, kind: type[BaseException]) -> None:
    _set_exception(ctypes.c_ulong(thread), ctypes.py_object(kind))


def _by_watcher(seconds: float, call: Callable[[], T]) -> T:
    limit = _Limit(seconds, _here())
    thread = threading.get_ident()
    over = threading.Event()

    def watch() -> None:
        wait = seconds
        while not over.wait(wait):
            if limit.covers(_frames().get(thread)):
                limit.struck = True
                _raise_in(thread, limit.overtime)
            wait = AGAIN_S

    watcher = threading.Thread(target=watch, name="optcompiler-limit", daemon=True)
    watcher.start()
    try:
        return limit.run(call)
    except limit.overtime:
        raise TimeIsUp from None
    finally:
        # What is on its way arrives in here; once the watcher is gone none is sent. It is not
        # withdrawn but replaced by one that is awaited: up to Python 3.12 all threads look for an
        # exception that is not taken, and where a profiler, debugger or coverage traces them they
        # hang at the next call. So this thread does not block while the watcher may send one.
        last = False
        while True:
            try:
                over.set()
                while watcher.is_alive():
                    time.sleep(SOON_S / 100)
                if not limit.struck:
                    break
                last = True
                _raise_in(thread, limit.overtime)
                while True:
                    pass
            except limit.overtime:
                if last:
                    break


_OWN: frozenset[CodeType] = frozenset(
    f.__code__ for f in (within, _Limit.run, _by_timer, _arm, _ring, _by_watcher, _raise_in)
)
