"""The schedule of distillation, and how it keeps to its time."""

from __future__ import annotations

import math
import time

from optcompiler.choices import Choices


class Clock:
    """The schedule: warm-up, cosine decay, evaluations, and how many steps there is time for.

    When the time makes it plan anew, the plans are kept in `choices`, to be followed under a lock.
    """

    def __init__(self, steps: int, minutes: float, choices: Choices) -> None:
        self.steps = steps
        self._plans: dict[str, int] = {}
        self._choices = choices
        self._key = choices.numbered("distill: steps planned after a step")
        self._seconds = 60 * minutes if choices.timed else math.inf
        self._began = time.monotonic()

    def factor(self, step: int) -> float:
        """The share of the full step size: linear over the first 5%, then a cosine to 0."""
        warm = max(1, self.steps // 20)
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / self.steps)))

    def tick(self, step: int) -> None:
        """After the first few steps, and then now and then, plan what the time allows."""
        if self._choices.locked:
            self.steps = (self._choices.get(self._key) or {}).get(str(step), self.steps)
        elif step + 1 >= 4 and step % 4 == 3 and self._seconds < math.inf:
            each = (time.monotonic() - self._began) / (step + 1)
            planned = max(step + 1, min(self.steps, int(self._seconds / each)))
            if planned != self.steps:
                self.steps = self._plans[str(step)] = planned

    def stop(self) -> None:
        """Keep the plans, if there were any but the first."""
        if self._plans:
            self._choices.keep(self._key, lambda: self._plans)

    def evaluates(self, step: int) -> bool:
        return (step + 1) % max(1, self.steps // 10) == 0 or step + 1 == self.steps
