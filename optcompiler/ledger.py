"""The ledger: one row for every candidate, taken or not, with what it should and did do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optcompiler.files import number

TAKEN = "taken"
DECLINED = "declined"
REJECTED = "rejected"
ROLLED_BACK = "rolled back"
REVERTED = "reverted"
QUARANTINED = "quarantined"

OUTCOMES = (TAKEN, DECLINED, REJECTED, ROLLED_BACK, REVERTED, QUARANTINED)
"""`taken`: in the artifact. `declined`: the pass saw no way. `rejected`: the planner left it out.
`rolled back`: it broke the contract of passes. `quarantined`: left out with its pass, which broke
the contract elsewhere. `reverted`: taken, then undone because it measured slower or the budget was
overrun."""

FAULTY = (ROLLED_BACK, QUARANTINED)
"""Outcomes of the candidates of a pass that broke its contract."""

TUNING = "tuning"
"""Key of `details` of rows of tuning passes: the damage `before` and `after`, empty where nothing
was tuned."""


@dataclass(frozen=True)
class Row:
    """One candidate's record.

    `saving_us` is the predicted latency saved on the target, `damage` the loss of agreement with
    the teacher that this candidate alone causes (None where it was exact or not measured).
    """

    pass_name: str
    site: str
    choice: str
    outcome: str
    reason: str
    exact: bool = True
    saving_us: float | None = None
    damage: float | None = None
    nodes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.pass_name, self.site, self.choice)


def rows_of(entries: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows read back from JSON. Raises `KeyError`, `TypeError`, `ValueError` for anything else."""
    rows: list[Row] = []
    for entry in entries:
        known: dict[str, Any] = {**entry, "nodes": tuple(entry["nodes"])}
        known |= {k: number(entry[k]) for k in ("saving_us", "damage")}
        rows.append(Row(**known))
    return rows


class Ledger:
    """Rows in the order in which they were decided; a later decision replaces the row's outcome."""

    def __init__(self, rows: list[Row] | None = None) -> None:
        self._rows: list[Row] = list(rows or [])

    def add(self, row: Row) -> None:
        self._rows.append(row)

    def revise(self, key: tuple[str, str, str], outcome: str, reason: str) -> None:
        """Change the outcome of the latest row with this key."""
        for i in range(len(self._rows) - 1, -1, -1):
            if self._rows[i].key == key:
                self._rows[i] = replace(self._rows[i], outcome=outcome, reason=reason)
                return
        raise KeyError(key)

    def about(self, node: str) -> list[Row]:
        """Rows whose site is, or covers, the named node."""
        return [r for r in self._rows if r.site == node or node in r.nodes]

    def with_outcome(self, outcome: str) -> list[Row]:
        return [r for r in self._rows if r.outcome == outcome]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]
