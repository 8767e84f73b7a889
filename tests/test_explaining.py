"""A layer in numbers: what the ledger knows of it, as data, as text and in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optcompiler import explaining
from optcompiler.explaining import layer_of, layer_parts, sensitivities, sensitivity_table
from optcompiler.ledger import DECLINED, REJECTED, TAKEN, TUNING, Ledger, Row
from optcompiler.report import _layers  # pyright: ignore[reportPrivateUsage]
from optcompiler.summary import to_text

SEEN = {"low": -1.0, "high": 3.0, "values": 80, "zeros": 0.5, "histogram": [1, 0, 8, 4]}
WIDE = {"type": "UINT8", "low": -1.5, "high": 3.5, "scale": 0.0196, "zero_point": 77,
        "clipped": 0.0, "sqnr_db": 42.25}  # fmt: skip
NARROW = WIDE | {"type": "UINT4", "low": 0.0, "high": 2.0, "clipped": 0.025, "sqnr_db": 18.0}
WEIGHT = {"type": "INT4", "low": -0.5, "high": 0.25, "clipped": 0.01, "sqnr_db": 20.0,
          "scales": {"count": 8, "min": 0.01, "median": 0.02, "max": 0.04}}  # fmt: skip


def lossy(site: str, choice: str, outcome: str, damage: float, **details: Any) -> Row:
    return Row("q", site, choice, outcome, f"{choice} at {site}", False, 1.0, damage,
               (site, f"{site}_relu"), details)  # fmt: skip


LEDGER = Ledger([
    lossy("a", "int8", TAKEN, 0.001, observed={"x": SEEN}, activations={"x": WIDE}),
    lossy("b", "int8", TAKEN, 0.002, activations={"x": WIDE}, weight=WEIGHT),
    lossy("b", "w4a4", REJECTED, 0.5, activations={"x": NARROW}, weight=WEIGHT | {"block": 32}),
    Row("q", "c", "-", DECLINED, "too small", nodes=("c",)),
    Row("tune", "program", "t", TAKEN, "damage 0.4 before, 0.1 after", False, None, 0.1,
        details={TUNING: {"before": 0.4, "after": 0.1}}),
    Row("clean", "program", "fold", TAKEN, "exact"),
])  # fmt: skip


def told(node: str) -> str:
    return to_text(layer_parts(layer_of(LEDGER, node)))


def test_a_layer_has_its_rows_and_those_of_what_tuned_it() -> None:
    assert [(r.pass_name, r.choice) for r in layer_of(LEDGER, "b").rows] == [
        ("q", "int8"), ("q", "w4a4"), ("tune", "t"),
    ]  # fmt: skip
    assert [r.reason for r in layer_of(LEDGER, "c").rows] == ["too small"]
    assert [r.pass_name for r in layer_of(LEDGER, "a_relu").rows] == ["q", "tune"]
    assert layer_of(LEDGER, "nowhere").rows == ()


def test_data_are_numbers_and_look_up_what_a_neighbour_told() -> None:
    data = layer_of(LEDGER, "b").data()
    assert data["activations"] == {"x": {"observed": SEEN, "forms": {"int8": WIDE, "w4a4": NARROW}}}
    assert data["weight"] == {"int8": WEIGHT, "w4a4": WEIGHT | {"block": 32}}
    assert data["tuning"] == [{
        "pass": "tune", "choice": "t", "outcome": TAKEN, "reason": "damage 0.4 before, 0.1 after",
        "before": 0.4, "after": 0.1,
    }]  # fmt: skip
    assert layer_of(LEDGER, "c").data() == {"activations": {}, "weight": {}, "tuning": []}


def test_text_draws_what_was_seen_and_the_ranges_below_it() -> None:
    text = told("b")
    assert "activation x: 80 values from -1 to 3 in calibration, 50 % of them 0" in text
    assert "\n  ▁ █▄\n  ├──┤  int8: -1.5 to 3.5\n   ├┤   w4a4: 0 to 2\n" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["x", "w4a4", "UINT4", "0", "2", "0.0196", "77", "2.5", "%", "18.0", "dB"] in rows
    assert [
        "int8*",
        "INT4",
        "-0.5",
        "0.25",
        "8",
        "0.01",
        "0.02",
        "0.04",
        "1",
        "%",
        "20.0",
        "dB",
    ] in rows
    assert "INT4 blocks of 32" in text
    assert "before tuning" in text
    assert told("c") == "\n"


def test_values_of_one_range_share_a_line() -> None:
    twice = [lossy("a", c, TAKEN, 0.0, observed={"x": SEEN}, activations={"x": WIDE}) for c in "pq"]
    text = to_text(layer_parts(layer_of(twice, "a")))
    assert "p, q: -1.5 to 3.5" in text


@pytest.mark.parametrize(
    ("chosen", "line"),
    [((0.0, 8.0), "├──────┤"), ((-1.0, 9.0), "────────"), ((2.0, 6.0), "  ├──┤  "),
     ((-9.0, 4.0), "───┤    "), ((9.0, 12.0), "        ")],
)  # fmt: skip
def test_a_range_is_open_where_it_goes_on(chosen: tuple[float, float], line: str) -> None:
    assert explaining.range_line((0.0, 8.0), chosen, 8) == line


def test_bars_show_whatever_there_is() -> None:
    assert explaining.bars([0, 1, 1000, 500]) == " ▁█▄"
    assert explaining.bars([0, 0]) == "  "
    assert explaining.bars([]) == ""


def test_sites_that_hurt_most_come_first() -> None:
    found = sensitivities(LEDGER)
    assert [(s.site, s.taken, s.worst) for s in found] == [("b", "int8", 0.5), ("a", "int8", 0.001)]
    assert explaining.columns_of(found) == ["int8", "w4a4"]
    rows = [line.split() for line in to_text([sensitivity_table(found)]).splitlines()]
    assert ["b", "0.002*", "0.5", "int8"] in rows
    assert ["a", "0.001*", "int8"] in rows


def test_damage_that_is_no_number_hurts_most() -> None:
    rows = [lossy("a", "x", REJECTED, 9.0), lossy("b", "x", REJECTED, float("nan"))]
    assert [(s.site, s.taken) for s in sensitivities(rows)] == [("b", ""), ("a", "")]


@pytest.mark.parametrize("odd", [None, 3, "text", [], [None], {"x": None}, {"x": {"low": "inf"}},
                                 {"x": {"low": 2, "high": 1, "histogram": [1]}},
                                 {"x": {"low": 0, "high": 1, "histogram": ["a", -1, None, 1.5]}},
                                 {"type": [], "scales": 4, "block": "many"}])  # fmt: skip
def test_a_ledger_of_another_program_may_hold_anything(odd: Any) -> None:
    for key in ("observed", "activations", "weight", TUNING):
        good: dict[str, Any] = {"observed": {"x": SEEN}, "activations": {"x": WIDE}}
        rows = [lossy("a", "int8", TAKEN, 0.1, **good | {key: odd})]
        layer = layer_of(rows, "a")
        assert layer.data()
        assert to_text(layer_parts(layer))
        assert ("<code>a</code>" in _layers(rows)) is bool(rows[0].details["activations"])


def test_the_report_draws_each_layer() -> None:
    page = _layers(LEDGER)
    assert page.count("<details>") == 2
    assert page.count("<rect") == 2 * 3
    assert "w4a4: 0 to 2" in page
    for words in ("damage 0.4 before, 0.1 after", "42.2 dB", "w4a4 at b"):
        assert words in page
    evil = [lossy("<b>", "int8", TAKEN, 0.1, observed={"<i>": SEEN}, activations={"<i>": WIDE})]
    assert "<b>" not in _layers(evil)
    assert "<i>" not in _layers(evil)


def test_the_guide_shows_what_is_printed() -> None:
    """Its columns and closing words are those of `explain`."""
    guide = (Path(__file__).parent.parent / "docs" / "guide.md").read_text(encoding="utf-8")
    shown = [line.split() for line in guide.splitlines()]
    printed = [line.split() for line in told("b").splitlines()]
    heads = [words for words in printed if {"choice", "scales"} & set(words)]
    assert len(heads) == 2
    assert all(words in shown for words in heads)
    assert "* is taken" in guide
