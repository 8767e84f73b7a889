"""Tables of drops: mean over the seeds, and how far they lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.tools import TOOLS

Result = Mapping[str, Any]
LOWER_IS_BETTER = frozenset({"gpt"})


def drop(result: Result, exact: Mapping[str, float]) -> float | None:
    """How much worse than float32, in the metric's unit; positive is worse."""
    if result["score"] is None or result["subject"] not in exact:
        return None
    lost = exact[result["subject"]] - result["score"]
    return -lost if result["subject"] in LOWER_IS_BETTER else lost


def _references(results: Sequence[Result]) -> dict[str, float]:
    return {r["subject"]: r["score"] for r in results if r["tool"] == "fp32" and r["score"]}


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "failed"
    half = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.{digits}f}{half}"


def _grid(rows: Sequence[tuple[str, ...]], head: Sequence[str]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _cell(results: Sequence[Result], exact: Mapping[str, float], **wanted: Any) -> str:
    mine = [r for r in results if all(r[k] == v for k, v in wanted.items())]
    if not mine:
        return "-"
    digits = 4 if wanted["subject"] in LOWER_IS_BETTER else 2
    return _spread([d for r in mine if (d := drop(r, exact)) is not None], digits)


def drops(results: Sequence[Result]) -> str:
    """For each model a table: tools by setting and number of samples."""
    exact = _references(results)
    parts: list[str] = []
    for subject in dict.fromkeys(r["subject"] for r in results):
        mine = [r for r in results if r["subject"] == subject and r["tool"] != "fp32"]
        columns = list(dict.fromkeys((r["setting"], r["samples"]) for r in mine))
        rows = [
            (TOOLS[tool].title, *(
                _cell(mine, exact, subject=subject, tool=tool, setting=s, samples=n)
                for s, n in columns
            ))
            for tool in dict.fromkeys(r["tool"] for r in mine)
        ]  # fmt: skip
        head = ["lost", *(f"{s.upper()}, {n or 'no'} samples" for s, n in columns)]
        parts.append(f"{subject}, float32 {exact.get(subject, 0):.3f}\n\n{_grid(rows, head)}")
    return "\n\n".join(parts)


def ablation(results: Sequence[Result]) -> str:
    """Ours, by the last step of the pipeline."""
    exact = _references(results)
    mine = [r for r in results if r["tool"] == "ours"]
    steps = list(dict.fromkeys(r["variant"] for r in mine))
    rows = [
        (f"{subject}, {setting.upper()}, {samples} samples", *(
            _cell(mine, exact, subject=subject, setting=setting, samples=samples, variant=step)
            for step in steps
        ))
        for subject, setting, samples in dict.fromkeys(
            (r["subject"], r["setting"], r["samples"]) for r in mine
        )
    ]  # fmt: skip
    return _grid(rows, ["lost", *steps])


def costs(results: Sequence[Result]) -> str:
    """Seconds and memory of making, mean over everything that a tool made of a model."""
    rows: list[tuple[str, ...]] = []
    made = [r for r in results if r["score"] is not None and r["tool"] != "fp32"]
    kinds = dict.fromkeys((r["subject"], r["tool"], r["setting"], r["samples"]) for r in made)
    for subject, tool, setting, samples in kinds:
        mine = [
            r for r in made
            if (r["subject"], r["tool"], r["setting"], r["samples"])
            == (subject, tool, setting, samples)
        ]  # fmt: skip
        seconds = statistics.mean(r["seconds"] for r in mine)
        peak = statistics.mean(r["peak_mb"] for r in mine)
        title = TOOLS[tool].title
        rows.append((subject, title, setting, str(samples), f"{seconds:.0f}", f"{peak:.0f}"))
    return _grid(rows, ["model", "tool", "setting", "samples", "seconds", "peak MB"])
