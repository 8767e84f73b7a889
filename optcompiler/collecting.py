"""Python's collector of cyclic garbage, made to run less often while programs are compiled.

A program is a cyclic graph of some fifty objects a node, and every patch is a copy. With Python's
own thresholds half of the time of a large compile is spent looking through all of them again.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Generator
from contextlib import contextmanager

YOUNG = 50_000
"""New objects after which the youngest are looked through: a few copies of a usual program."""

_lock = threading.Lock()
_inside = 0
_before: tuple[int, int, int] = (0, 0, 0)


@contextmanager
def collecting_seldom() -> Generator[None]:
    """While any thread is inside, `YOUNG` is the least threshold of the youngest generation.

    A collector that is off stays off, and the thresholds are put back in the end.
    """
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = gc.get_threshold()
            if _before[0]:
                gc.set_threshold(max(_before[0], YOUNG), *_before[1:])
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                gc.set_threshold(*_before)
