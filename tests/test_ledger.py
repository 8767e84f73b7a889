"""The ledger: order, lookup, and revising what was decided."""

from __future__ import annotations

import json

import numpy as np
import pytest

from optcompiler.files import to_json
from optcompiler.ledger import DECLINED, OUTCOMES, REJECTED, REVERTED, TAKEN, Ledger, Row

ROWS = [
    Row("fuse", "gemm", "with bias", TAKEN, "a kernel less", nodes=("gemm", "bias")),
    Row("insert-qdq", "gemm", "int8", REJECTED, "over the limit", False, 1.0, 0.2, ("gemm",)),
    Row("insert-qdq", "act", "-", DECLINED, "no integer kernel for Relu"),
]


def test_rows_keep_their_order() -> None:
    ledger = Ledger()
    for row in ROWS:
        ledger.add(row)
    assert list(ledger) == ROWS
    assert len(ledger) == 3
    assert ledger[1] is ROWS[1]
    given = list(ROWS)
    Ledger(given).add(ROWS[0])
    assert len(given) == 3


def test_rows_about_a_node_are_those_at_it_or_covering_it() -> None:
    ledger = Ledger(ROWS)
    assert ledger.about("bias") == ROWS[:1]
    assert ledger.about("gemm") == ROWS[:2]
    assert ledger.about("act") == ROWS[2:]
    assert ledger.about("gem") == []


def test_revising_changes_the_latest_row_with_the_key_and_nothing_else() -> None:
    ledger = Ledger([*ROWS, ROWS[0]])
    ledger.revise(ROWS[0].key, REVERTED, "12 µs with it, 9 µs without")
    assert ledger[0] == ROWS[0]
    assert (ledger[3].outcome, ledger[3].reason) == (REVERTED, "12 µs with it, 9 µs without")
    assert ledger[3].key == ROWS[0].key
    assert ledger[3].nodes == ROWS[0].nodes
    assert ledger.with_outcome(TAKEN) == ROWS[:1]
    assert {r.outcome for r in ledger} <= set(OUTCOMES)
    with pytest.raises(KeyError):
        ledger.revise(("fuse", "gemm", "other"), TAKEN, "")


def test_details_of_numpy_types_can_be_written() -> None:
    row = Row("p", "s", "c", TAKEN, "r", details={"kept": np.int64(3), "loss": np.float32(0.5),
                                                  "ids": np.arange(2), "set": {2, 1}})  # fmt: skip
    (read,) = json.loads(to_json(list(Ledger([row]))))
    assert read["details"] == {"kept": 3, "loss": 0.5, "ids": [0, 1], "set": [1, 2]}
