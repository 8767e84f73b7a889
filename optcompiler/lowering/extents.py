"""Sizes that are known when a program runs: polynomials of symbols that lie within bounds.

An `Extent` stands where an int of the lowered form depends on such a size. It computes like an int,
spells itself as C, and is never taken for a number: code that unrolls a loop of so many turns, or
makes an array of so many elements, raises `RunTimeExtent` instead of being right for one size
alone. It is compared by the largest value it takes, so that decisions (is it worth a thread?) are
made for the largest size; it equals an int never, and another extent where the polynomials do.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, cast

Sizes = Mapping[str, int]
"""Of every symbol, by name."""

MOST_VALUES = 1 << 16
"""Combinations of sizes that `values` goes through."""


class RunTimeExtent(TypeError):
    """A number was wanted of what is known at run time alone."""


@dataclass(frozen=True, order=True)
class Symbol:
    """A size from `least` to `most`; both can occur."""

    name: str
    least: int
    most: int

    def at(self, sizes: Sizes) -> int:
        return sizes[self.name]

    @property
    def symbols(self) -> frozenset[Symbol]:
        return frozenset({self})

    def __str__(self) -> str:
        return "n_" + re.sub(r"\W", "_", self.name)


@dataclass(frozen=True)
class Division:
    """The quotient or the remainder of two numbers that are not negative."""

    dividend: Extent | int
    divisor: Extent | int
    remainder: bool

    def at(self, sizes: Sizes) -> int:
        a, b = at(self.dividend, sizes), at(self.divisor, sizes)
        return a % b if self.remainder else a // b

    @property
    def symbols(self) -> frozenset[Symbol]:
        return symbols(self.dividend) | symbols(self.divisor)

    def __str__(self) -> str:
        return f"({self.dividend} {'%' if self.remainder else '/'} {self.divisor})"


Atom = Symbol | Division
Terms = Mapping[tuple[Atom, ...], int]
"""Coefficients, none of them 0, by the factors of a term in the order of their spelling."""


class Extent:
    """A polynomial in `symbols` and in quotients of such, with int coefficients."""

    def __init__(self, terms: Terms) -> None:
        self.terms = dict(sorted(terms.items(), key=lambda t: [str(a) for a in t[0]]))

    @staticmethod
    def of(symbol: Symbol) -> Extent:
        return Extent({(symbol,): 1})

    @cached_property
    def symbols(self) -> frozenset[Symbol]:
        return frozenset(s for factors in self.terms for atom in factors for s in atom.symbols)

    def at(self, sizes: Sizes) -> int:
        """The number it is at these sizes."""
        total = 0
        for factors, coefficient in self.terms.items():
            for atom in factors:
                coefficient *= atom.at(sizes)
            total += coefficient
        return total

    def corners(self, others: Set[Symbol] = frozenset()) -> Iterator[dict[str, int]]:
        """Sizes of its symbols and `others`, each at one of its bounds, in every combination."""
        every = sorted(self.symbols | others)
        for at in itertools.product(*((s.least, s.most) for s in every)):
            yield {s.name: n for s, n in zip(every, at, strict=True)}

    @property
    def sums_products(self) -> bool:
        """Whether it is a sum of products of symbols, none of them above its square."""
        return all(
            coefficient > 0 and all(isinstance(a, Symbol) and factors.count(a) < 3 for a in factors)
            for factors, coefficient in self.terms.items()
        )

    @cached_property
    def ends(self) -> tuple[int, int]:
        """The least and the largest number it is where every symbol is at one of its bounds."""
        found = [self.at(sizes) for sizes in self.corners()]
        return min(found), max(found)

    @property
    def largest(self) -> int:
        return self.ends[1]

    # -- arithmetic -------------------------------------------------------------------------

    def __add__(self, other: Extent | int) -> Extent | int:
        return _made([*self.terms.items(), *_terms(other).items()])

    def __neg__(self) -> Extent | int:
        return self * -1

    def __abs__(self) -> Extent | int:
        return -self if self._negative() else self

    def __sub__(self, other: Extent | int) -> Extent | int:
        return self + other * -1

    def __rsub__(self, other: int) -> Extent | int:
        return self * -1 + other

    def __mul__(self, other: Extent | int) -> Extent | int:
        return _made(
            (tuple(sorted((*a, *b), key=str)), x * y)
            for a, x in self.terms.items()
            for b, y in _terms(other).items()
        )

    __radd__, __rmul__ = __add__, __mul__

    def __floordiv__(self, other: Extent | int) -> Extent | int:
        if self._negative():  # C rounds towards zero
            return -((-self + other - 1) // other)
        whole, rest = self._split(other)
        return whole + _divided(rest, other, remainder=False)

    def __rfloordiv__(self, other: int) -> Extent | int:
        if other < 0:
            return -((self + (-other - 1)) // self)
        return _divided(other, self, remainder=False)

    def __mod__(self, other: Extent | int) -> Extent | int:
        if self._negative():
            return self - self // other * other
        return _divided(self._split(other)[1], other, remainder=True)

    def __rmod__(self, other: int) -> Extent | int:
        return other - other // self * self if other < 0 else _divided(other, self, remainder=True)

    def _negative(self) -> bool:
        """Whether it is always below 0, and not never. Raises `RunTimeExtent` for sometimes."""
        least, most = self.ends
        if least < 0 <= most:
            self._number()
        return most < 0

    def _split(self, divisor: Extent | int) -> tuple[Extent | int, Extent | int]:
        """A multiple of the divisor, divided by it, and what is left."""
        by = _terms(divisor)
        if len(by) != 1 or 0 in by.values():
            return 0, self
        ((factors, number),) = by.items()
        whole: list[tuple[tuple[Atom, ...], int]] = []
        rest: list[tuple[tuple[Atom, ...], int]] = []
        for term, coefficient in self.terms.items():
            left = _without(term, factors)
            if left is None or coefficient % number:
                rest.append((term, coefficient))
            else:
                whole.append((left, coefficient // number))
        if any(c < 0 for _, c in rest):
            return 0, self
        return _made(whole), _made(rest)

    # -- comparisons ------------------------------------------------------------------------

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extent) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(tuple(self.terms.items()))

    def __lt__(self, other: Extent | int) -> bool:
        return self.largest < largest(other)

    def __le__(self, other: Extent | int) -> bool:
        return self.largest <= largest(other)

    def __gt__(self, other: Extent | int) -> bool:
        return self.largest > largest(other)

    def __ge__(self, other: Extent | int) -> bool:
        return self.largest >= largest(other)

    # -- spelling ---------------------------------------------------------------------------

    def __str__(self) -> str:
        """A C expression of type long, in parentheses where it is more than a name."""
        pieces: list[str] = []
        for factors, coefficient in sorted(self.terms.items(), key=lambda t: -len(t[0])):
            names = [str(atom) for atom in factors]
            number = abs(coefficient)
            text = " * ".join([*([str(number)] if number != 1 or not names else []), *names])
            sign = "-" if coefficient < 0 else "+" if pieces else ""
            pieces.append(f"{sign} {text}" if pieces else f"{sign}{text}")
        text = " ".join(pieces)
        single = [atom for factors in self.terms for atom in factors]
        return text if len(single) == 1 and text == str(single[0]) else f"({text})"

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def _number(self) -> NoReturn:
        raise RunTimeExtent(f"{self} is known at run time alone")

    __index__ = __int__ = __float__ = _number

    def __truediv__(self, other: object) -> NoReturn:
        self._number()

    __rtruediv__ = __truediv__


def extent(symbol: Symbol) -> int:
    """The symbol, typed as what it stands in for."""
    return cast(int, Extent.of(symbol))


def polynomial(terms: Terms) -> int:
    """The polynomial, typed as what it stands in for; an int where it is one."""
    return cast(int, _made(terms.items()))


def at(number: Extent | int, sizes: Sizes) -> int:
    """The number at these sizes."""
    return number.at(sizes) if isinstance(number, Extent) else number


def largest(number: Extent | int) -> int:
    """The number itself, or the largest that an extent takes: what memory has to hold."""
    return number.largest if isinstance(number, Extent) else number


def symbols(number: Any) -> frozenset[Symbol]:
    """The symbols that it depends on."""
    return number.symbols if isinstance(number, Extent) else frozenset()


def is_run_time(number: Any) -> bool:
    """Whether it is known at run time alone."""
    return isinstance(number, Extent)


def values(number: Extent | int) -> set[int] | None:
    """Every number that it can be; None where there are too many sizes to go through."""
    if not isinstance(number, Extent):
        return {number}
    every = sorted(number.symbols)
    count = 1
    for s in every:
        count *= s.most - s.least + 1
    if count > MOST_VALUES:
        return None
    ranges = [range(s.least, s.most + 1) for s in every]
    names = [s.name for s in every]
    return {number.at(dict(zip(names, sizes, strict=True))) for sizes in itertools.product(*ranges)}


def c_long(number: int) -> str:
    """A C integer of type long."""
    return str(number) if is_run_time(number) else f"{number}L"


def _terms(number: Extent | int) -> Terms:
    if isinstance(number, Extent):
        return number.terms
    return {(): number} if number else {}


def _made(terms: Any) -> Extent | int:
    sums: dict[tuple[Atom, ...], int] = {}
    for factors, coefficient in terms:
        sums[factors] = sums.get(factors, 0) + coefficient
    kept = {factors: c for factors, c in sums.items() if c}
    if not any(kept):
        return kept.get((), 0)
    return Extent(kept)


def _divided(a: Extent | int, b: Extent | int, *, remainder: bool) -> Extent | int:
    if not isinstance(a, Extent) and not isinstance(b, Extent):
        return a % b if remainder else a // b
    if a == 0:
        return 0
    return Extent({(Division(a, b, remainder),): 1})


def _without(factors: tuple[Atom, ...], gone: tuple[Atom, ...]) -> tuple[Atom, ...] | None:
    left = list(factors)
    for atom in gone:
        if atom not in left:
            return None
        left.remove(atom)
    return tuple(left)
