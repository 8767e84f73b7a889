"""What may be lost and what must be reached."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from optcompiler.errors import InputError

Metric = Callable[[Callable[..., Any]], float]
"""`metric(model)` calls `model` as the traced module is called and returns a score."""

DEFAULT_MAX_DAMAGE = 0.01


@dataclass(frozen=True)
class Budget:
    """Limits of a compile; None means no limit.

    `max_drop`: how much `metric` may fall below the teacher's, in the metric's own unit. `metric`
    takes a callable with the model's own signature and returns a float; larger is better unless
    `larger_is_better` is False. `max_damage`: loss of agreement with the teacher on calibration
    data, in the unit of the damage measure (see `damage`). `max_latency_ms` (median, measured on
    the finished artifact), `max_size_mb` (weights and code, 10^6 bytes) and `search_minutes` (after
    which the best plan so far is taken).
    Where weights are larger than `max_size_mb`, what makes them smaller is taken too though it
    saves no time.

    When neither `max_drop` nor `max_damage` is given, lossy rewrites are held to a damage of
    `DEFAULT_MAX_DAMAGE`. Raises `InputError` for a negative limit or a drop without a metric.
    """

    max_drop: float | None = None
    metric: Metric | None = None
    larger_is_better: bool = True
    max_damage: float | None = None
    max_latency_ms: float | None = None
    max_size_mb: float | None = None
    search_minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_drop", "max_damage", "max_latency_ms", "max_size_mb", "search_minutes"):
            limit = getattr(self, name)
            if limit is not None and not limit >= 0:
                raise InputError(f"budget: {name}={limit!r}; give a number that is 0 or more.")
        if self.max_drop is not None and self.metric is None:
            raise InputError("budget: max_drop needs a metric; pass metric=... or use max_damage.")

    @property
    def damage_limit(self) -> float:
        """The damage that holds: infinite when only the metric decides."""
        if self.max_damage is not None:
            return self.max_damage
        return float("inf") if self.max_drop is not None else DEFAULT_MAX_DAMAGE

    @property
    def allows_loss(self) -> bool:
        """Whether the user says what may be lost, rather than the default limit."""
        return self.metric is not None or self.max_damage is not None

    def drop(self, teacher: float, student: float) -> float:
        """How much worse `student` scores, positive when worse."""
        return teacher - student if self.larger_is_better else student - teacher

    def refuse_clocks(self) -> None:
        """Raises `InputError` for a limit that needs a clock."""
        for name in ("max_latency_ms", "search_minutes"):
            if getattr(self, name) is not None:
                raise InputError(
                    f"budget: {name}={getattr(self, name)} needs a clock, and nothing is to be "
                    f"timed; leave it out, or compile with timing."
                )

    def gates(
        self, damage: float | None, drop: float | None, measured_us: float | None, size: int
    ) -> list[dict[str, Any]]:
        """Name, limit, value and whether it passed, of each limit whose value is known."""
        values = [
            ("metric drop", self.max_drop, drop),
            ("damage", self.max_damage, damage),
            ("latency in ms", self.max_latency_ms, measured_us and measured_us / 1000),
            ("size in MB", self.max_size_mb, size / 1e6),
        ]
        return [
            {"name": name, "limit": limit, "value": value, "passed": value <= limit}
            for name, limit, value in values
            if limit is not None and value is not None and math.isfinite(limit)
        ]

    def describe(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        limits = {
            "max_drop": self.max_drop,
            "max_damage": self.max_damage,
            "damage_limit": self.damage_limit,
            "max_latency_ms": self.max_latency_ms,
            "max_size_mb": self.max_size_mb,
            "search_minutes": self.search_minutes,
        }
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in limits.items()}
        metric = getattr(self.metric, "__qualname__", type(self.metric).__name__)
        return finite | {
            "metric": metric if self.metric else None,
            "larger_is_better": self.larger_is_better,
        }
