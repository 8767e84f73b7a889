"""What a compile measures, kept so that another can do without measuring.

All that may come out otherwise tomorrow (a time, a damage, how far a time limit let a search come)
is asked of one `Choices`, under a key that says what it is. The first compile answers from the
machine and keeps the answers; they are the body of the lock file, from which a locked compile
answers instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from optcompiler.errors import InputError
from optcompiler.files import number, plain


class Choices:
    """Answers by key, each a value that JSON has, given once and the same from then on.

    `known` are those of a lock. With `timed` False nothing is timed: the answer is then the nominal
    one, which depends on no machine.
    """

    def __init__(self, known: Mapping[str, Any] | None = None, *, timed: bool = True) -> None:
        self.locked = known is not None
        self.timed = timed
        self._values: dict[str, Any] = dict(known or {})
        self._asked: Counter[str] = Counter()

    def choose(self, key: str, measure: Callable[[], Any], nominal: Any) -> Any:
        """What `measure()` finds on this machine; `nominal` where nothing is to be timed.

        Raises `InputError` when the lock has no such key: nothing is measured under a lock.
        """
        if key not in self._values:
            if self.locked:
                raise InputError(
                    f"the lock says nothing of {key!r}, which this compile would have to measure; "
                    f"compile without it to get a new one."
                )
            self._values[key] = plain(measure() if self.timed else nominal)
        return self._values[key]

    def keep(self, key: str, compute: Callable[[], Any]) -> Any:
        """What `compute()` gives, unless the lock says it: for what may differ in the last digits
        on another machine, or takes long, and depends on no clock."""
        if key not in self._values:
            self._values[key] = plain(compute())
        return self._values[key]

    def number(self, key: str, compute: Callable[[], float]) -> float:
        """`keep` for a float, infinities and NaN included; `key` gets a number of its own."""
        value = number(self.keep(self.numbered(key), compute))
        assert value is not None
        return value

    def numbered(self, key: str) -> str:
        """`key` with a number, counted from 1, for what is asked for several times in a compile."""
        self._asked[key] += 1
        return f"{key} #{self._asked[key]}"

    def begin_again(self) -> None:
        """Forget what was asked so far: the compile does, when it goes on without a pass."""
        self._asked.clear()
        if not self.locked:
            self._values.clear()

    def get(self, key: str) -> Any:
        """The answer that is known already, or None."""
        return self._values.get(key)

    def values(self) -> dict[str, Any]:
        """Every answer given, by key."""
        return dict(self._values)


class Consulted(Mapping[str, float]):
    """A table that knows which of its entries were looked at: the part of it that mattered."""

    def __init__(self, table: Mapping[str, float]) -> None:
        self._table = table
        self._seen: set[str] = set()

    def __getitem__(self, key: str) -> float:
        value = self._table[key]
        self._seen.add(key)
        return value

    def __iter__(self) -> Iterator[str]:
        self._seen.update(self._table)
        return iter(self._table)

    def __len__(self) -> int:
        self._seen.update(self._table)
        return len(self._table)

    def seen(self) -> dict[str, float]:
        """The entries that were looked at; all of them when the table was gone through."""
        return {k: self._table[k] for k in sorted(self._seen)}
