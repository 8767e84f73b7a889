"""The report: one HTML page without scripts, fonts or images from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

from optcompiler.evidence import ACTIVATIONS, WEIGHT
from optcompiler.explaining import (
    Form,
    Layer,
    Tensor,
    activation_cells,
    columns_of,
    layers_of,
    sensitivities,
    weight_cells,
)
from optcompiler.ledger import DECLINED, TAKEN, Row
from optcompiler.summary import (
    cell,
    comparisons,
    counts,
    facts,
    figure,
    grouped,
    kernel_error,
    size_text,
    slowest,
)

if TYPE_CHECKING:
    from optcompiler.artifact import Artifact

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6878; --line: #d8dee6; --back: #fff;
  --accent: #2563a8; --second: #c9822b; --good: #1a7f4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #98a3b3; --line: #38424f;
  --back: #14181e; --accent: #6aa9ec; --second: #e0a458; --good: #58c08a; --bad: #f2867e; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere }
th { color: var(--soft); font-weight: 600; overflow-wrap: normal } .n { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap }
.facts { width: auto } .facts th { padding-left: 0 }
code, pre { font-family: ui-monospace, monospace; font-size: .85em }
pre { overflow-x: auto; border: 1px solid var(--line); padding: .8rem }
summary { cursor: pointer; padding: .3rem 0 } .soft { color: var(--soft) }
.taken, .passed { color: var(--good) } .failed, .reverted, .rolled { color: var(--bad) }
.bars { width: 30%; min-width: 9rem }
.bar { height: .5rem; margin: .2rem 0; background: var(--accent) }
svg { max-width: 100%; height: auto; display: block } .fill { fill: var(--accent) }
.edge { stroke: var(--second); stroke-width: 2; fill: none } svg text { fill: var(--ink);
  font-size: 12px }
.bar.m { background: var(--second) } .key { display: inline-block; width: 1.2rem; height: .5rem }
"""


def page(artifact: Artifact) -> str:
    """The report of an artifact as HTML; every text from the model is escaped."""
    m, manifest = artifact.measurements, artifact.manifest
    title = f"optcompiler report: {manifest.get('target', '')}"
    sections = [
        f"<h1>{_text('optcompiler report')}</h1>",
        _facts(artifact),
        _section("Before and after", _comparisons(m)),
        _section("Gates", _gates(m.get("gates") or [])),
        _section("Why each part is as it is", _ledger(artifact)),
        _section("What each precision damages alone", _sensitivity(artifact.ledger)),
        _section("Layers in numbers", _layers(artifact.ledger)),
        _section("Kernels", _kernels(m.get("kernels") or [])),
        _section("Compile time", _seconds(m.get("compile_seconds") or {})),
        _section("Files", _files(manifest.get("files") or {})),
        _section("Versions", _pairs(manifest.get("versions") or {})),
        _section("Program", _program(artifact)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style></head><body>\n"
        + "\n".join(s for s in sections if s)
        + "\n</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{body}" if body else ""


def _facts(artifact: Artifact) -> str:
    ports = [
        ("inputs", ", ".join(map(str, artifact.inputs))),
        ("outputs", ", ".join(map(str, artifact.outputs))),
    ]
    return _pairs(dict([*facts(artifact.manifest), *ports]))


def _pairs(pairs: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in pairs.items())
    return f'<table class="facts">{rows}</table>' if rows else ""


def _comparisons(m: Mapping[str, Any]) -> str:
    rows = [
        _row(_td(c.label), _td(c.before, "n"), _td(c.after, "n"), _td(c.ratio, "n"))
        for c in comparisons(m)
    ]
    return _table(["", "before", "after", "ratio"], rows, numeric={1, 2, 3})


def _gates(gates: Sequence[Mapping[str, Any]]) -> str:
    rows: list[str] = []
    for gate in gates:
        word = "passed" if gate.get("passed") else "failed"
        limit, value = figure(gate.get("limit")), figure(gate.get("value"))
        rows.append(_row(_td(gate.get("name")), _td(limit, "n"), _td(value, "n"), _td(word, word)))
    return _table(["gate", "limit", "value", ""], rows, numeric={1, 2})


def _ledger(artifact: Artifact) -> str:
    parts: list[str] = []
    for name, rows in grouped(artifact.ledger).items():
        table = _table(
            ["site", "choice", "outcome", "saves µs", "damage", "reason"],
            [_ledger_row(r) for r in rows],
            numeric={3, 4},
        )
        state = " open" if len(rows) <= 30 else ""
        parts.append(
            f"<details{state}><summary><strong>{_text(name)}</strong> "
            f'<span class="soft">{_text(counts(rows))}</span></summary>\n{table}</details>'
        )
    return "\n".join(parts)


def _ledger_row(row: Row) -> str:
    damage = "exact" if row.exact and row.outcome != DECLINED else figure(row.damage)
    nodes = f'<br><span class="soft">{_text(", ".join(row.nodes))}</span>' if row.nodes else ""
    return _row(
        f"<td><code>{_text(row.site)}</code>{nodes}</td>",
        _td(row.choice),
        _td(row.outcome, row.outcome.split(" ")[0]),
        _td(figure(row.saving_us), "n"),
        _td(damage, "n"),
        _td(row.reason),
    )


def _sensitivity(ledger: Iterable[Row]) -> str:
    found = sensitivities(ledger)
    columns = columns_of(found)
    rows: list[str] = []
    for site in found:
        cells = [f"<td><code>{_text(site.site)}</code></td>"]
        for choice in columns:
            row = site.choices.get(choice)
            style = "n taken" if choice == site.taken else "n"
            cells.append(_td(figure(row.damage) if row else "", style))
        rows.append(_row(*cells, _td(site.taken or "none")))
    return _table(["site", *columns, "taken"], rows, numeric=set(range(1, len(columns) + 1)))


def _layers(ledger: Iterable[Row]) -> str:
    rows = list(ledger)
    sites = dict.fromkeys(
        r.site for r in rows if r.details.get(ACTIVATIONS) or r.details.get(WEIGHT)
    )
    return "\n".join(map(_layer, layers_of(rows, sites)))


def _layer(layer: Layer) -> str:
    mine = [r for r in layer.rows if not r.exact and (r.site == layer.node or r in layer.tuning)]
    taken = next((r.choice for r in mine if r.outcome == TAKEN and r.site == layer.node), "float")
    parts = [
        f"<p>activation <code>{_text(t.name)}</code>: {_text(t.seen)}</p>{_histogram(t)}"
        for t in layer.activations
    ]
    head = ["choice", "type", "low", "high", "scale", "zero point", "clipped", "SQNR"]
    rows = [
        _row(_td(t.name), _form_cells(f, activation_cells(f)))
        for t in layer.activations
        for f in t.forms
    ]
    parts.append(_table(["activation", *head], rows, numeric=set(range(3, 9))))
    head = ["weight", "type", "low", "high", "scales", "least", "median", "greatest", "clipped"]
    forms = layer.weight.forms if layer.weight else ()
    rows = [_row(_form_cells(f, weight_cells(f))) for f in forms]
    parts.append(_table([*head, "SQNR"], rows, numeric=set(range(2, 10))))
    decided = _table(
        ["pass", "choice", "outcome", "saves µs", "damage", "reason"],
        [_ledger_row(replace(r, nodes=(), site=r.pass_name)) for r in mine], numeric={3, 4},
    )  # fmt: skip
    return (
        f"<details><summary><code>{_text(layer.node)}</code> "
        f'<span class="soft">{_text(taken)}</span></summary>\n{decided}{"".join(parts)}</details>'
    )


def _form_cells(form: Form, cells: Sequence[str]) -> str:
    first, *rest = cells
    style = "taken" if form.taken else ""
    return _td(form.choice, style) + _td(first) + "".join(_td(c, "n") for c in rest)


def _histogram(tensor: Tensor) -> str:
    """Bars for counts, a line below them for each range that was tried."""
    counts, span = tensor.histogram, tensor.span
    if not counts or span is None:
        return ""
    most = max(counts) or 1
    each, high, step = 12, 72, 16
    wide = each * len(counts)
    drawn = [
        f'<rect class="fill" x="{each * i}" y="{high - height:.1f}" width="{each - 1}" '
        f'height="{height:.1f}"/>'
        for i, c in enumerate(counts)
        if (height := max(high * c / most, 1.0 if c else 0.0))
    ]
    below = high + 4
    for (low, top), choices in tensor.ranges.items():
        ends = [
            min(max((end - span[0]) / (span[1] - span[0]), 0.0), 1.0) * wide for end in (low, top)
        ]
        below += step
        drawn.append(
            f'<path class="edge" d="M{ends[0]:.1f} {below - 9}v6M{ends[0]:.1f} {below - 6}'
            f'H{ends[1]:.1f}M{ends[1]:.1f} {below - 9}v6"/>'
            f'<text x="{wide + 8}" y="{below - 2}">{_text(", ".join(choices))}: '
            f"{_text(figure(low))} to {_text(figure(top))}</text>"
        )
    return (
        f'<svg viewBox="0 0 {wide + 260} {below + 6}" width="{wide + 260}" '
        f'height="{below + 6}" role="img" aria-label="{_text(tensor.seen)}">{"".join(drawn)}</svg>'
    )


def _kernels(kernels: Sequence[Mapping[str, Any]]) -> str:
    if not kernels:
        return ""
    times = [float(k.get(key) or 0) for k in kernels for key in ("predicted_us", "measured_us")]
    longest = max(times) or 1.0
    rows: list[str] = []
    for k in slowest(kernels):
        bars = "".join(
            f'<div class="{style}" style="width:{100 * float(k[key]) / longest:.1f}%"></div>'
            for key, style in (("predicted_us", "bar"), ("measured_us", "bar m"))
            if k.get(key) is not None
        )
        rows.append(
            _row(
                f"<td><code>{_text(k.get('name'))}</code></td>",
                _td(k.get("kind")),
                _td(k.get("dtype")),
                _td(figure(k.get("predicted_us")), "n"),
                _td(figure(k.get("measured_us")), "n"),
                f'<td class="bars">{bars}</td>',
                _td(", ".join(map(str, k.get("nodes") or ()))),
            )
        )
    table = _table(
        ["kernel", "kind", "type", "predicted µs", "measured µs", "", "nodes"], rows, numeric={3, 4}
    )
    legend = (
        '<p class="soft"><span class="key bar"></span> predicted '
        '<span class="key bar m"></span> measured</p>'
    )
    return f"<p>{_text(kernel_error(kernels))}</p>{legend}{table}"


def _seconds(seconds: Mapping[str, Any]) -> str:
    return _pairs({k: f"{float(v):.1f} s" for k, v in seconds.items()})


def _files(files: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        _row(
            f"<td><code>{_text(name)}</code></td>",
            _td(size_text(entry["size_bytes"]), "n"),
            f"<td><code>{_text(entry['sha256'])}</code></td>",
        )
        for name, entry in sorted(files.items())
    ]
    return _table(["file", "size", "SHA-256"], rows, numeric={1})


def _program(artifact: Artifact) -> str:
    text = (artifact.directory / "program.txt").read_text(encoding="utf-8")
    return f"<details><summary>ONNX text</summary><pre>{_text(text)}</pre></details>"


def _table(head: Sequence[str], rows: Iterable[str], numeric: set[int]) -> str:
    body = "\n".join(rows)
    if not body:
        return ""
    titles = "".join(
        f'<th class="n">{_text(h)}</th>' if i in numeric else f"<th>{_text(h)}</th>"
        for i, h in enumerate(head)
    )
    return f"<table><thead><tr>{titles}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _row(*cells: str) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def _td(value: Any, style: str = "") -> str:
    return f'<td class="{style}">{_text(value)}</td>' if style else f"<td>{_text(value)}</td>"


def _text(value: Any) -> str:
    return escape(cell(value).plain)
