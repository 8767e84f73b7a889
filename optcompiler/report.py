"""The report: one HTML page without scripts, fonts or images from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from optcompiler.ledger import DECLINED, Row
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
