"""The summary table: fixed width, everything in it, names printed as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optcompiler import summary
from optcompiler.artifact import open_artifact
from optcompiler.ledger import DECLINED, TAKEN, Ledger, Row
from optcompiler.report import page
from tests.support import ROWS, make_artifact

MANIFEST: dict[str, Any] = {
    "target": "cpu:threads=2",
    "optcompiler": "0.1.0",
    "program_hash": "ab" * 32,
    "options": {"precision": "int8", "budget": {"max_drop": 0.5, "damage_limit": None}},
}
MEASUREMENTS: dict[str, Any] = {
    "baseline_us": 34400.0,
    "measured_us": 10500.0,
    "baseline_predicted_us": 30000.0,
    "predicted_us": 9000.0,
    "macs": {"before": 1_800_000_000, "after": 1_200_000_000},
    "size_bytes": {"before": 45_000_000, "after": 12_000_000},
    "damage": 0.00412,
    "damage_measure": "kl",
    "metric": {"teacher": 0.85, "student": 0.847, "drop": 0.003},
    "gates": [
        {"name": "metric drop", "limit": 0.5, "value": 0.003, "passed": True},
        {"name": "size in MB", "limit": 10, "value": 12.0, "passed": False},
    ],
    "kernels": [
        {"name": "slow", "kind": "conv", "dtype": "int8", "nodes": ["a"], "predicted_us": 80.0,
         "measured_us": 100.0},
        {"name": "quick", "kind": "gemm", "dtype": "int8", "nodes": ["b"], "predicted_us": 12.0,
         "measured_us": 10.0},
        {"name": "unknown", "kind": "gemm", "dtype": "fp32", "nodes": [], "predicted_us": 50.0,
         "measured_us": None},
    ],
}  # fmt: skip


def lines_with(text: str, *words: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if all(w in line for w in words)]


def test_before_and_after():
    text = summary.render(MANIFEST, Ledger(), MEASUREMENTS)
    assert lines_with(text, "latency measured") == [
        ["latency", "measured", "34.400", "ms", "10.500", "ms", "3.28x"]
    ]
    assert lines_with(text, "multiply") == [
        ["multiply-accumulates", "1.80", "G", "1.20", "G", "1.50x"]
    ]
    assert lines_with(text, "size", "MB", "x")[0][-1] == "3.75x"
    assert lines_with(text, "metric", "0.847")[0][-2:] == ["drop", "0.003"]
    assert lines_with(text, "damage (kl)")[0][-1] == "0.00412"
    assert lines_with(text, "metric drop")[0][-1] == "passed"
    assert lines_with(text, "size in MB")[0][-1] == "FAILED"
    assert ["target", "cpu:threads=2"] in lines_with(text, "target")


def test_kernels_by_time_and_how_far_predictions_are():
    text = summary.render(MANIFEST, Ledger(), MEASUREMENTS)
    order = [text.index(name) for name in ("slow", "unknown", "quick")]
    assert order == sorted(order)
    assert "2 kernels measured: the prediction is off by 20% on average" in text
    assert "0.84 of the measured sum" in text


def test_ledger_by_pass_what_was_taken_first():
    rows = [Row("q", f"n{i}", "int8", DECLINED, "too small") for i in range(30)]
    text = summary.render(MANIFEST, Ledger([*rows, Row("q", "big", "int8", TAKEN, "pays")]), {})
    assert "q: 1 taken, 30 declined" in text
    assert text.index("big") < text.index("n0")
    assert "and 19 more: 19 declined; all are in ledger.json" in text


def test_nothing_known_is_nothing_shown():
    text = summary.render({"target": "cpu"}, Ledger(), {"metric": None, "kernels": None})
    assert text.split() == ["target", "cpu"]


@pytest.mark.parametrize("value", ["inf", float("inf"), "nan"])
def test_numbers_without_a_json_form(value: Any):
    assert str(value) in summary.render(MANIFEST, Ledger(), {"damage": value, "measured_us": value})


def test_fixed_width_and_no_escapes():
    evil = "\x1b[31m[red]layer[/red]" + "x" * 80
    rows = [Row("p", evil, evil, TAKEN, "because " * 40, nodes=(evil,))]
    text = summary.render(MANIFEST, Ledger(rows), MEASUREMENTS)
    assert "\x1b" not in text
    assert "\\x1b[31m[red]layer" in text
    assert max(map(len, text.splitlines())) <= summary.WIDTH
    assert all(line == line.rstrip() for line in text.splitlines())


def test_the_same_whatever_the_terminal(monkeypatch: pytest.MonkeyPatch):
    expected = summary.render(MANIFEST, Ledger(ROWS), MEASUREMENTS)
    for name, value in (("COLUMNS", "40"), ("FORCE_COLOR", "1"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    assert summary.render(MANIFEST, Ledger(ROWS), MEASUREMENTS) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("short", "short"), ("a" * 10 + "b" * 10, "aaaaa…bbbb")]
)
def test_shorten(text: str, expected: str):
    assert summary.shorten(text, 10) == expected


def test_report_shows_the_same_facts(tmp_path: Path):
    opened = open_artifact(make_artifact(tmp_path / "net", measurements=MEASUREMENTS))
    html = page(opened)
    for word in (
        "3.28x",
        "drop 0.003",
        "failed",
        "slow",
        "off by 20%",
        "over the limit",
        "program",
    ):
        assert word in html
    assert html.count("<table") == html.count("</table>")
    assert html.count("<tr>") == html.count("</tr>")
