"""Timing several callables in one process so that a drifting machine drifts for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

BLOCK_S = 0.04
"""A turn lasts about this long, but at least three calls and at most `MOST`."""
MOST = 200
SETTLED = 0.1
"""Other tools' threads have gone to sleep when the process uses less than this share of a core."""


@dataclass(frozen=True)
class Times:
    """Microseconds of one call: median of the rounds, and the quartiles around it."""

    us: float
    low_us: float
    high_us: float


def in_turn(calls: Sequence[Callable[[], object]], rounds: int) -> list[Times]:
    """Time each in `rounds` turns. In its turn a callable is called once for warmth, then a number
    of times of which the least counts, since what else the machine does only adds to it; before
    it, what the others left spinning comes to rest."""
    counts = [_calls_in_block(call) for call in calls]
    least: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, count, found in zip(calls, counts, least, strict=True):
            settle()
            call()
            found.append(1e6 * min(_seconds(call) for _ in range(count)))
    return [_summary(found) for found in least]


def settle() -> None:
    """Wait, at most half a second, until no thread of this process spins in wait for work."""
    for _ in range(50):
        before = time.process_time()
        time.sleep(0.01)
        if time.process_time() - before < SETTLED * 0.01:
            return


def _calls_in_block(call: Callable[[], object]) -> int:
    call()
    return max(3, min(MOST, int(BLOCK_S / min(_seconds(call) for _ in range(3)))))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _summary(found: Sequence[float]) -> Times:
    if len(found) == 1:
        return Times(found[0], found[0], found[0])
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return Times(middle, low, high)
