"""What the ledger knows of the numbers of a layer: for `explain`, the summary and the report.

Nothing is computed anew: passes put what they saw into `Candidate.details` (`evidence`), the
planner what tuning did. A ledger may come from another program, so what is not as expected is left
out rather than relied on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from optcompiler.evidence import ACTIVATIONS, OBSERVED, WEIGHT
from optcompiler.ledger import TAKEN, TUNING, Row
from optcompiler.summary import cell, figure, grid, shorten

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

BLOCKS = "▁▂▃▄▅▆▇█"
MOST_CHOICES = 6
"""Columns of the table of sensitivities."""


# -- sensitivities --------------------------------------------------------------------------


@dataclass(frozen=True)
class Sensitivity:
    """What each choice at one site damages alone: its row of the ledger by choice.

    `taken` is the choice that is in the artifact, "" for none.
    """

    site: str
    choices: Mapping[str, Row]
    taken: str

    @property
    def worst(self) -> float:
        """The greatest damage of the choices; infinite where one gave no number."""
        damages = [row.damage or 0.0 for row in self.choices.values()]
        return math.inf if any(map(math.isnan, damages)) else max(damages)


def sensitivities(ledger: Iterable[Row]) -> list[Sensitivity]:
    """The sites of lossy candidates, with what each choice damages alone; what hurts most first."""
    sites: dict[str, dict[str, Row]] = {}
    for row in ledger:
        if not row.exact and row.damage is not None and tuning_of(row) is None:
            sites.setdefault(row.site, {})[row.choice] = row
    found = [
        Sensitivity(site, rows, next((c for c, r in rows.items() if r.outcome == TAKEN), ""))
        for site, rows in sites.items()
    ]
    return sorted(found, key=lambda s: (-s.worst, s.site))


def columns_of(found: Sequence[Sensitivity]) -> list[str]:
    """The choices that most sites have, at most `MOST_CHOICES`, in the order of the ledger."""
    counts: dict[str, int] = {}
    for site in found:
        for choice in site.choices:
            counts[choice] = counts.get(choice, 0) + 1
    most = sorted(counts, key=lambda c: -counts[c])[:MOST_CHOICES]
    return [choice for choice in counts if choice in most]


def sensitivity_table(found: Sequence[Sensitivity], limit: int | None = None) -> Table:
    """Damage alone by site and choice; a star marks what was taken."""
    columns = columns_of(found)
    table = grid(("site", "left"), *((c, "right") for c in columns), ("taken", "left"))
    for site in found[:limit]:
        cells = [
            figure(row.damage) + ("*" if c == site.taken else " ") if row is not None else ""
            for c, row in ((c, site.choices.get(c)) for c in columns)
        ]
        table.add_row(*map(cell, (shorten(site.site, 40), *cells, site.taken or "none")))
    return table


# -- one layer ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """One way to quantise a tensor: the choice that asks for it and what was found out."""

    choice: str
    taken: bool
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Tensor:
    """A tensor of a layer: what calibration saw of it, and the forms in which it was tried."""

    name: str
    observed: Mapping[str, Any]
    forms: tuple[Form, ...]

    @property
    def histogram(self) -> list[int]:
        """Counts of values other than 0 in equal parts of what was seen; empty when unknown."""
        counts = self.observed.get("histogram")
        if not isinstance(counts, list):
            return []
        known = cast("list[Any]", counts)
        return [c for c in known if isinstance(c, int) and c >= 0] if self.span else []

    @property
    def span(self) -> tuple[float, float] | None:
        """The least and the greatest value seen."""
        low, high = (_number(self.observed, key) for key in ("low", "high"))
        return (low, high) if low is not None and high is not None and low < high else None

    @property
    def ranges(self) -> dict[tuple[float, float], list[str]]:
        """The ranges of the forms, each with the choices that have it."""
        found: dict[tuple[float, float], list[str]] = {}
        for form in self.forms:
            low, high = (_number(form.facts, key) for key in ("low", "high"))
            if low is not None and high is not None:
                found.setdefault((low, high), []).append(form.choice)
        return found

    @property
    def seen(self) -> str:
        """In words."""
        if not self.observed:
            return "not seen in calibration"
        low, high = (figure(_number(self.observed, key)) for key in ("low", "high"))
        values, zeros = _number(self.observed, "values"), _number(self.observed, "zeros")
        count = f"{values:.0f} values " if values is not None else ""
        none = f", {share(zeros)} of them 0" if zeros else ""
        return f"{count}from {low} to {high} in calibration{none}"


@dataclass(frozen=True)
class Layer:
    """What the ledger knows of the numbers of one node."""

    node: str
    rows: tuple[Row, ...]
    """Rows about the node, and of passes that tuned the program it is in."""
    activations: tuple[Tensor, ...]
    weight: Tensor | None

    @property
    def tuning(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if tuning_of(row) is not None)

    def data(self) -> dict[str, Any]:
        """For JSON."""
        tensors = (*self.activations, *([self.weight] if self.weight else []))
        described = {
            t.name: {"observed": t.observed, "forms": {f.choice: f.facts for f in t.forms}}
            for t in tensors
        }
        weight = described.pop(self.weight.name) if self.weight else None
        return {
            "activations": described, "weight": weight["forms"] if weight else {},
            "tuning": [
                {"pass": row.pass_name, "choice": row.choice, "outcome": row.outcome,
                 "reason": row.reason, **dict(tuning_of(row) or {})}
                for row in self.tuning
            ],
        }  # fmt: skip


def layer_of(ledger: Iterable[Row], node: str) -> Layer:
    """What is known of a node; what is known of its neighbours' values is looked up there."""
    return next(layers_of(ledger, [node]))


def layers_of(ledger: Iterable[Row], nodes: Iterable[str]) -> Iterator[Layer]:
    """What is known of each node."""
    every = list(ledger)
    seen: dict[str, Mapping[str, Any]] = {}
    about: dict[str, list[Row]] = {}
    for row in every:
        observed = _mapping(row.details, OBSERVED)
        for name in observed:
            seen.setdefault(name, _mapping(observed, name))
        for name in dict.fromkeys((row.site, *row.nodes)):
            about.setdefault(name, []).append(row)
    tuning = [r for r in every if not r.nodes and tuning_of(r) is not None]
    for node in nodes:
        mine = about.get(node, [])
        tried = [r for r in mine if r.details.get(ACTIVATIONS) or r.details.get(WEIGHT)]
        tuned = tuning if any(r.outcome == TAKEN for r in tried) else []
        names = dict.fromkeys(n for r in tried for n in _mapping(r.details, ACTIVATIONS))
        forms = tuple(_forms(tried, WEIGHT))
        yield Layer(
            node, (*mine, *(r for r in tuned if r not in mine)),
            tuple(Tensor(n, seen.get(n, {}), tuple(_forms(tried, ACTIVATIONS, n))) for n in names),
            Tensor("weight", {}, forms) if forms else None,
        )  # fmt: skip


def _forms(rows: Sequence[Row], key: str, name: str | None = None) -> Iterator[Form]:
    for row in rows:
        facts = _mapping(row.details, key)
        facts = facts if name is None else _mapping(facts, name)
        if facts:
            yield Form(row.choice, row.outcome == TAKEN, facts)


def tuning_of(row: Row) -> Mapping[str, Any] | None:
    """Damage before and after a tuning pass, None for rows of other passes."""
    found = row.details.get(TUNING)
    return cast("Mapping[str, Any]", found) if isinstance(found, Mapping) else None


# -- as text --------------------------------------------------------------------------------


def layer_parts(layer: Layer) -> Iterator[RenderableType]:
    """What `explain` prints below the rows of a node."""
    for tensor in layer.activations:
        yield cell(f"\nactivation {tensor.name}: {tensor.seen}")
        if tensor.histogram:
            yield cell("\n".join(_drawn(tensor)))
    if layer.activations:
        table = grid(
            ("activation", "left"), ("choice", "left"), ("type", "left"), ("low", "right"),
            ("high", "right"), ("scale", "right"), ("zero", "right"), ("clipped", "right"),
            ("SQNR", "right"),
        )  # fmt: skip
        for tensor in layer.activations:
            for form in tensor.forms:
                name = shorten(tensor.name, 28)
                table.add_row(*map(cell, (name, _marked(form), *activation_cells(form))))
        yield cell("")
        yield table
    if layer.weight is not None:
        table = grid(
            ("weight", "left"), ("type", "left"), ("low", "right"), ("high", "right"),
            ("scales", "right"), ("least", "right"), ("median", "right"), ("greatest", "right"),
            ("clipped", "right"), ("SQNR", "right"),
        )  # fmt: skip
        for form in layer.weight.forms:
            table.add_row(*map(cell, (_marked(form), *weight_cells(form))))
        yield cell("")
        yield table
    if layer.activations or layer.weight:
        yield cell(
            "* is taken; the figures are those before tuning" if layer.tuning else "* is taken"
        )


def _marked(form: Form) -> str:
    return form.choice + ("*" if form.taken else "")


def activation_cells(form: Form) -> tuple[str, ...]:
    """Type, low, high, scale, zero point, share clipped and SQNR in words."""
    facts = form.facts
    return (
        str(facts.get("type", "")),
        *(figure(_number(facts, key)) for key in ("low", "high", "scale", "zero_point")),
        share(_number(facts, "clipped")), decibel(_number(facts, "sqnr_db")),
    )  # fmt: skip


def weight_cells(form: Form) -> tuple[str, ...]:
    """Type, low, high, number of scales, the least, median and greatest, share clipped, SQNR."""
    facts = form.facts
    scales = _mapping(facts, "scales")
    block = _number(facts, "block")
    return (
        str(facts.get("type", "")) + (f" blocks of {block:.0f}" if block else ""),
        *(figure(_number(facts, key)) for key in ("low", "high")),
        *(figure(_number(scales, key)) for key in ("count", "min", "median", "max")),
        share(_number(facts, "clipped")), decibel(_number(facts, "sqnr_db")),
    )  # fmt: skip


def _drawn(tensor: Tensor) -> Iterator[str]:
    """Bars, the two ends, and a line a form from end to end of the range it covers."""
    counts, span = tensor.histogram, tensor.span
    yield "  " + bars(counts)
    for (low, high), choices in tensor.ranges.items():
        if span is not None:
            line = range_line(span, (low, high), len(counts))
            yield f"  {line}  {', '.join(choices)}: {figure(low)} to {figure(high)}"


def bars(counts: Sequence[int]) -> str:
    """One character a count, as high as it is beside the largest; none for 0."""
    most = max(counts, default=0)
    return "".join(BLOCKS[math.ceil(c / most * len(BLOCKS)) - 1] if c else " " for c in counts)


def range_line(seen: tuple[float, float], chosen: tuple[float, float], width: int) -> str:
    """`chosen` as a line under bars that go from end to end of `seen`; open where it goes on."""
    scale = width / (seen[1] - seen[0])
    first, last = (round((end - seen[0]) * scale) for end in chosen)
    left, right = max(first, 0), min(last, width) - 1
    if right < left:
        return " " * width
    line = ["─"] * (right - left + 1)
    if first >= 0:
        line[0] = "├"
    if last <= width:
        line[-1] = "┤"
    return " " * left + "".join(line) + " " * (width - 1 - right)


def share(value: float | None) -> str:
    """As a percentage."""
    return "" if value is None else f"{100 * value:.3g} %"


def decibel(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"


# -- what may be anything -------------------------------------------------------------------


def _mapping(holder: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = holder.get(key)
    return cast("Mapping[str, Any]", found) if isinstance(found, Mapping) else {}


def _number(holder: Mapping[str, Any], key: str) -> float | None:
    found = holder.get(key)
    if not isinstance(found, (int, float)) or not math.isfinite(found):
        return None
    return float(found)
