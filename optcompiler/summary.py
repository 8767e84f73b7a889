"""The summary: what an artifact gained and lost, and why, as a table of fixed width."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from optcompiler.ledger import (
    DECLINED,
    QUARANTINED,
    REJECTED,
    REVERTED,
    ROLLED_BACK,
    TAKEN,
    Ledger,
    Row,
)

WIDTH = 100
_ROWS_PER_PASS = 12
_KERNELS = 10
_SITES = 8
_ORDER = {TAKEN: 0, REVERTED: 1, ROLLED_BACK: 2, QUARANTINED: 3, REJECTED: 4, DECLINED: 5}


@dataclass(frozen=True)
class Comparison:
    """One line of the before-and-after table; an empty text where nothing is known."""

    label: str
    before: str
    after: str
    ratio: str


def render(
    manifest: Mapping[str, Any], ledger: Ledger, measurements: Mapping[str, Any], width: int = WIDTH
) -> str:
    """The summary as text, `width` columns wide and without colour."""
    return to_text(_parts(manifest, ledger, measurements), width)


def to_text(parts: Iterable[RenderableType], width: int = WIDTH) -> str:
    """Rich renderables as plain text with no trailing blanks."""
    stream = io.StringIO()
    console = Console(
        file=stream, width=width, no_color=True, force_terminal=False, force_jupyter=False,
        legacy_windows=False, markup=False, highlight=False, emoji=False, color_system=None,
        _environ={},
    )  # fmt: skip
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _parts(
    manifest: Mapping[str, Any], ledger: Ledger, measurements: Mapping[str, Any]
) -> Iterable[RenderableType]:
    yield header(manifest)
    table = grid(("", "left"), ("before", "right"), ("after", "right"), ("ratio", "right"))
    for line in comparisons(measurements):
        table.add_row(*map(cell, (line.label, line.before, line.after, line.ratio)))
    if table.row_count:
        yield cell("")
        yield table
    if gates := measurements.get("gates"):
        yield cell("")
        yield _gates(gates)
    yield from _ledger(ledger)
    yield from _sensitivity(ledger)
    if kernels := measurements.get("kernels"):
        yield cell("")
        yield kernel_table(kernels, limit=_KERNELS)
        if error := kernel_error(kernels):
            yield cell(error)


def header(manifest: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for label, value in facts(manifest):
        table.add_row(cell(label), cell(value))
    return table


def facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the manifest says of the compile: label and value."""
    options: Mapping[str, Any] = manifest.get("options") or {}
    known = [
        ("target", str(manifest.get("target", ""))),
        ("precision", _spell(options.get("precision"))),
        ("budget", budget_text(options.get("budget"))),
        ("optcompiler", str(manifest.get("optcompiler", ""))),
        ("program", str(manifest.get("program_hash", ""))[:16]),
    ]
    known += [
        ("quarantined", f"{f['pass']} ({f['owner']}): {f['reason']}")
        for f in options.get("quarantined") or ()
    ]
    return [(label, value) for label, value in known if value]


def budget_text(budget: Any) -> str:
    if not isinstance(budget, Mapping):
        return _spell(budget)
    items = cast("Mapping[str, Any]", budget).items()
    set_ = {k: v for k, v in items if v is not None and k != "larger_is_better"}
    if "max_damage" in set_ or "max_drop" in set_:
        set_.pop("damage_limit", None)
    return ", ".join(f"{k.replace('_', ' ')} {_spell(v)}" for k, v in set_.items())


def comparisons(m: Mapping[str, Any]) -> list[Comparison]:
    """Latency, work, size and agreement, before and after, as far as they are known."""
    none: Mapping[str, Any] = {}
    macs: Mapping[str, Any] = m.get("macs") or none
    size: Mapping[str, Any] = m.get("size_bytes") or none
    metric: Mapping[str, Any] = m.get("metric") or none
    lines = [
        _compare("latency measured", m.get("baseline_us"), m.get("measured_us"), micros),
        _compare(
            "latency predicted", m.get("baseline_predicted_us"), m.get("predicted_us"), micros
        ),
        _compare("multiply-accumulates", macs.get("before"), macs.get("after"), count),
        _compare("size", size.get("before"), size.get("after"), size_text),
    ]
    if metric:
        drop = metric.get("drop")
        lines.append(
            Comparison(
                "metric",
                figure(metric.get("teacher")),
                figure(metric.get("student")),
                "" if drop is None else f"drop {figure(drop)}",
            )
        )
    if m.get("damage") is not None:
        label = f"damage ({m.get('damage_measure') or 'kl'})"
        if m.get("damage_data"):
            label += f" on {m['damage_data']}"
        lines.append(Comparison(label, "0", figure(m["damage"]), ""))
    return [line for line in lines if line.before or line.after]


def _compare(label: str, before: Any, after: Any, spell: Any) -> Comparison:
    ratio = ""
    if before is not None and after is not None and float(before) > 0 and float(after) > 0:
        ratio = f"{float(before) / float(after):.2f}x"
    return Comparison(
        label,
        "" if before is None else spell(before),
        "" if after is None else spell(after),
        ratio,
    )


def _gates(gates: Sequence[Mapping[str, Any]]) -> Table:
    table = grid(("gate", "left"), ("limit", "right"), ("value", "right"), ("", "left"))
    for gate in gates:
        passed = "passed" if gate.get("passed") else "FAILED"
        table.add_row(
            *map(
                cell,
                (gate.get("name"), figure(gate.get("limit")), figure(gate.get("value")), passed),
            )
        )
    return table


def grouped(ledger: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by pass, passes in the order of their first row; what was taken first in each."""
    groups: dict[str, list[Row]] = {}
    for row in ledger:
        groups.setdefault(row.pass_name, []).append(row)
    for rows in groups.values():
        rows.sort(key=lambda r: _ORDER.get(r.outcome, 9))
    return groups


def counts(rows: Iterable[Row]) -> str:
    """ "3 taken, 1 rejected"."""
    number: dict[str, int] = {}
    for row in rows:
        number[row.outcome] = number.get(row.outcome, 0) + 1
    return ", ".join(
        f"{number[k]} {k}" for k in sorted(number, key=lambda k: (_ORDER.get(k, 9), k))
    )


def _ledger(ledger: Ledger) -> Iterable[RenderableType]:
    for name, rows in grouped(ledger).items():
        yield cell(f"\n{name}: {counts(rows)}")
        yield row_table(rows[:_ROWS_PER_PASS])
        if len(rows) > _ROWS_PER_PASS:
            left = len(rows) - _ROWS_PER_PASS
            yield cell(
                f"  and {left} more: {counts(rows[_ROWS_PER_PASS:])}; all are in ledger.json"
            )


def _sensitivity(ledger: Ledger) -> Iterable[RenderableType]:
    from optcompiler.explaining import sensitivities, sensitivity_table

    found = [s for s in sensitivities(ledger) if len(s.choices) > 1]
    if found:
        yield cell("\nwhat each choice damages alone, * is taken")
        yield sensitivity_table(found, _SITES)
        if len(found) > _SITES:
            yield cell(f"  and {len(found) - _SITES} more that hurt less")


def row_table(rows: Iterable[Row], *, with_pass: bool = False) -> Table:
    """A table of ledger rows."""
    head = [("site", "left"), ("choice", "left"), ("outcome", "left"), ("saves us", "right"),
            ("damage", "right"), ("reason", "left")]  # fmt: skip
    table = grid(*([("pass", "left"), *head] if with_pass else head), wrap=True)
    for row in rows:
        cells = (
            shorten(row.site, 36), shorten(row.choice, 18), row.outcome, figure(row.saving_us),
            "exact" if row.exact and row.outcome != DECLINED else figure(row.damage), row.reason,
        )  # fmt: skip
        table.add_row(*map(cell, (row.pass_name, *cells) if with_pass else cells))
    return table


def kernel_table(kernels: Sequence[Mapping[str, Any]], limit: int | None = None) -> Table:
    """The slowest kernels, by what was measured where that is known."""
    table = grid(
        ("kernel", "left"), ("kind", "left"), ("dtype", "left"), ("predicted us", "right"),
        ("measured us", "right"), ("nodes", "left"),
    )  # fmt: skip
    for k in slowest(kernels)[:limit]:
        nodes = [str(n) for n in k.get("nodes") or ()]
        table.add_row(
            *map(cell, (
                shorten(str(k.get("name", "")), 28), k.get("kind"), k.get("dtype"),
                figure(k.get("predicted_us")), figure(k.get("measured_us")),
                shorten(", ".join(nodes), 40),
            ))
        )  # fmt: skip
    return table


def slowest(kernels: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    def cost(kernel: Mapping[str, Any]) -> float:
        measured = kernel.get("measured_us")
        return float(measured if measured is not None else kernel.get("predicted_us") or 0)

    return sorted(kernels, key=cost, reverse=True)


def kernel_error(kernels: Iterable[Mapping[str, Any]]) -> str:
    """How far predictions are from measurements: mean of |predicted - measured| / measured."""
    pairs = [
        (float(k["predicted_us"]), float(k["measured_us"]))
        for k in kernels
        if k.get("predicted_us") is not None and k.get("measured_us")
    ]
    if not pairs:
        return ""
    mean = sum(abs(p - m) / m for p, m in pairs) / len(pairs)
    total = sum(p for p, _ in pairs) / sum(m for _, m in pairs)
    return (
        f"{len(pairs)} kernels measured: the prediction is off by {100 * mean:.0f}% on average, "
        f"its sum is {total:.2f} of the measured sum"
    )


# -- spelling -----------------------------------------------------------------------------------


def grid(*columns: tuple[str, str], wrap: bool = False) -> Table:
    """An empty table; each column is its title and "left" or "right"."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for title, side in columns:
        last = wrap and title == columns[-1][0]
        table.add_column(
            title,
            justify="right" if side == "right" else "left",
            overflow="fold",
            ratio=1 if last else None,
            min_width=20 if last else None,
        )
    return table


def cell(value: Any) -> Text:
    """Text that is printed as it is; control characters, which names may hold, are spelled out."""
    text = "" if value is None else str(value)
    return Text("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text))


def shorten(text: str, length: int) -> str:
    """`text` with its middle left out when longer than `length`."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def micros(value: Any) -> str:
    us = float(value)
    return f"{us / 1000:.3f} ms" if us >= 1000 else f"{us:.1f} us"


def count(value: Any) -> str:
    number = float(value)
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f}"


def size_text(value: Any) -> str:
    """Bytes, in powers of 1000."""
    number = float(value)
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number:.0f} B"


def figure(value: Any) -> str:
    """A number with four digits that matter; empty for None."""
    if value is None:
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value + 0.0:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return _spell(value)


def _spell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, cast("list[Any]", value)))
    return str(value)
