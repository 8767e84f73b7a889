"""What an item of the corpus is, and how the families of items register theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Make = Callable[[Path], list[str]]
"""Writes an item into an empty folder and gives the arguments of `optcompiler`, but for -o OUT."""

SECRET = "secret"
"""What a file is called that lies beside an item and is none of its business."""

CANARY = b"canary:of:secret"
"""What such a file holds, over and over; read as float32 the numbers are finite."""

REFUSED = frozenset({2, 3})
FINE = frozenset({0})


@dataclass(frozen=True)
class Item:
    """One thing that somebody might hand to the command line.

    `codes` are the exit codes that will do, `says` what the sentence on stderr must hold. `fresh`
    marks those that stand for their kind. Without `bounded`, the fault shows only after torch has
    been loaded, which takes longer and more memory than a refusal may.
    """

    name: str
    make: Make
    codes: frozenset[int] = REFUSED
    says: str = ""
    fresh: bool = False
    bounded: bool = True

    @property
    def refused(self) -> bool:
        return self.codes == REFUSED


ITEMS: dict[str, Item] = {}


def add(
    name: str,
    make: Make,
    *,
    codes: frozenset[int] = REFUSED,
    says: str = "",
    fresh: bool = False,
    bounded: bool = True,
) -> None:
    if name in ITEMS:
        raise ValueError(f"two items are called {name!r}")
    ITEMS[name] = Item(name, make, codes, says, fresh, bounded)


def item(
    name: str, *, codes: frozenset[int] = REFUSED, says: str = "", fresh: bool = False
) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        add(name, make, codes=codes, says=says, fresh=fresh)
        return make

    return register
