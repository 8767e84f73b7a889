"""Tables of latencies beside peers: which peer is best, ratios, fractions of peak, means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]
"""What `measuring.measure` gives for one model, batch and number of threads."""

OURS = "optcompiler"


@dataclass(frozen=True)
class Row:
    """One model at one batch, number of threads and precision.

    `spread` is half the distance of the quartiles over the median. `of_peak` is by instructions
    that some core of this kind has. `speed_up` is against one thread of the same artifact, None
    where there is but one.
    """

    model: str
    batch: int
    threads: int
    precision: str
    us: float
    spread: float
    peers_us: Mapping[str, float]
    of_peak: Mapping[str, float]
    speed_up: float | None

    @property
    def best(self) -> tuple[str, float] | None:
        """The quickest peer and its microseconds; None where no peer runs this."""
        return min(self.peers_us.items(), key=lambda pair: pair[1], default=None)

    @property
    def ratio(self) -> float | None:
        """The best peer's time over ours: above one, ours is quicker."""
        return self.best[1] / self.us if self.best else None


def row_of(result: Result, precision: str) -> Row | None:
    """The row of one precision, or None where ours did not run at it."""
    times = {(t["who"], t["threads"]): t for t in result["times"] if t["precision"] == precision}
    threads = result["threads"]
    ours = times.pop((OURS, threads), None)
    single = times.pop((OURS, 1), None)
    if ours is None:
        return None
    rate = result["operations"] / ours["us"] / 1e3
    return Row(
        model=result["model"], batch=result["batch"], threads=threads, precision=precision,
        us=ours["us"], spread=(ours["high_us"] - ours["low_us"]) / 2 / ours["us"],
        peers_us={who: t["us"] for (who, _), t in times.items()},
        of_peak={
            name: rate / (threads * peak)
            for name, peak in result["peaks"].get(precision, {}).items()
        },
        speed_up=single["us"] / ours["us"] if single else None,
    )  # fmt: skip


def geometric_mean(values: Iterable[float]) -> float:
    """Raises `ValueError` for no values, or one that is not above zero."""
    logarithms = [math.log(value) for value in values]
    if not logarithms:
        raise ValueError("the geometric mean of nothing")
    return math.exp(sum(logarithms) / len(logarithms))


def table(results: Sequence[Result], precision: str) -> str:
    """The rows of one precision in Markdown, and the means below; "" where there is none."""
    rows = [row for result in results if (row := row_of(result, precision))]
    if not rows:
        return ""
    peers = list(dict.fromkeys(who for row in rows for who in row.peers_us))
    peaks = list(dict.fromkeys(name for row in rows for name in row.of_peak))
    head = [
        "model", "batch", "threads", "ours µs", "±", *(f"{who} µs" for who in peers), "best peer",
        "× best peer", *(f"of {name}" for name in peaks), "× one thread",
    ]  # fmt: skip
    lines = [_line(head), "|---|" + "--:|" * (len(head) - 1)]
    for row in rows:
        lines.append(_line([
            row.model, str(row.batch), str(row.threads), f"{row.us:.0f}", f"{row.spread:.0%}",
            *(_number(row.peers_us.get(who), ".0f") for who in peers),
            row.best[0] if row.best else "-", _number(row.ratio, ".2f"),
            *(_number(row.of_peak.get(name), ".0%") for name in peaks),
            _number(row.speed_up, ".2f"),
        ]))  # fmt: skip
    return "\n".join([*lines, "", *means(rows)])


def means(rows: Sequence[Row]) -> list[str]:
    """A line of geometric means for each batch and number of threads, and one for all."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"batch {row.batch}, {_threads(row.threads)}", []).append(row)
    if len(groups) > 1:
        groups["all"] = list(rows)
    lines: list[str] = []
    for label, members in groups.items():
        ratios = [row.ratio for row in members if row.ratio is not None]
        speed_ups = [row.speed_up for row in members if row.speed_up is not None]
        said: list[str] = []
        if ratios:
            said.append(
                f"{geometric_mean(ratios):.2f}× the best peer (least {min(ratios):.2f}×, "
                f"{sum(r >= 1 for r in ratios)} of {len(ratios)} at least as quick)"
            )
        if speed_ups:
            said.append(f"{geometric_mean(speed_ups):.2f}× one thread")
        if said:
            lines.append(f"{label}: geometric mean {'; '.join(said)}")
    return lines


def remarks(results: Sequence[Result]) -> list[str]:
    """Who failed at what, what was left in float, and whose float numbers are not eager's."""
    lines: list[str] = []
    for result in results:
        where = f"{result['model']}, batch {result['batch']}, {_threads(result['threads'])}"
        for failure in result["failed"]:
            lines.append(
                f"{where}: {failure['who']} {failure['precision']} failed and is not counted: "
                f"{failure['reason']}"
            )
        lines += [f"{where}: left in float, {note}" for note in result["notes"]]
        for entry in result["times"]:
            if entry["precision"] == "fp32" and not entry["error"] < 1e-3:
                lines.append(
                    f"{where}: {entry['who']} fp32 differs from eager by {entry['error']:.1e}"
                )
    return lines


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
