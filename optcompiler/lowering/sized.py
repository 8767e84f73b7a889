"""Lowering a program whose symbolic dimensions have bounds: one form for every size.

The program is lowered at a few sizes. Where the results have the same steps, and their numbers
differ by a polynomial of the sizes, they are one form with extents; anything else that differs is
refused. Constants that grow with a size (position tables, masks) are those of the largest, of which
smaller sizes have the beginning.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NoReturn, cast

import numpy as np

from optcompiler.binding import bind
from optcompiler.errors import UnsupportedOperatorError
from optcompiler.lowering.build import view_array
from optcompiler.lowering.extents import Sizes, Symbol, polynomial
from optcompiler.lowering.ir import Buffer, Expr, Lowered, Step, View
from optcompiler.program import Program

DEGREE, TOTAL_DEGREE = 2, 3
"""Greatest power of one size, and of all together, in a polynomial."""

Bounds = Mapping[str, tuple[int, int]]
"""The least and the greatest size of symbolic dimensions."""


def lower_sized(
    program: Program, bounds: Bounds, lower: Callable[[Program], Lowered]
) -> tuple[Lowered, tuple[Symbol, ...]]:
    """`lower(program)` for all sizes within `bounds`, with extents where numbers depend on them.

    Raises `UnsupportedOperatorError` naming a node whose step is not the same at all sizes.
    """
    symbols = tuple(Symbol(name, *ends) for name, ends in bounds.items())
    sizes = sample_sizes(symbols)
    every = [lower(bind(program, s)) for s in sizes]
    return Overlay(symbols, sizes).lowered(every), symbols


def sample_sizes(symbols: Sequence[Symbol]) -> list[dict[str, int]]:
    """Sizes that tell all polynomials apart, and one more; the largest come first.

    None is 1, which would be taken for a dimension that repeats; they are larger than the bounds
    where those leave no room.
    """
    exponents = _exponents(len(symbols))
    tried = [list(_candidates(s)) for s in symbols]
    found: list[dict[str, int]] = []
    rows: list[list[int]] = []
    ranges = (range(DEGREE + 2) for _ in symbols)
    for places in sorted(itertools.product(*ranges), key=lambda p: (sum(p), p)):
        at = [tried[i][place] for i, place in enumerate(places)]
        more = [*rows, _monomials(at, exponents)]
        known = len(rows) == len(exponents)
        if known or np.linalg.matrix_rank(np.array(more, np.float64) / max(map(max, more))) == len(
            more
        ):
            rows = more
            found.append({s.name: n for s, n in zip(symbols, at, strict=True)})
        if known:
            break
    return found


def _candidates(symbol: Symbol) -> Iterator[int]:
    """Distinct sizes above 1: the greatest, the least and some between, or above, where few are."""
    least, most = max(symbol.least, 2), max(symbol.most, 2)
    between = [most, least, (least + 2 * most) // 3, (3 * least + most) // 4]
    yield from dict.fromkeys([*between, *range(most, least, -1), *range(most + 1, most + 9)])


def _exponents(count: int) -> list[tuple[int, ...]]:
    every = itertools.product(range(DEGREE + 1), repeat=count)
    return [powers for powers in every if sum(powers) <= TOTAL_DEGREE]


def _monomials(at: Sequence[int], exponents: Sequence[tuple[int, ...]]) -> list[int]:
    return [int(np.prod([n**p for n, p in zip(at, e, strict=True)])) for e in exponents]


class Differs(Exception):
    """What is not the same at all sizes, in words."""


@dataclass
class Overlay:
    """Values of one place in the lowered forms at `sizes`, as one value."""

    symbols: Sequence[Symbol]
    sizes: Sequence[Sizes]

    def __post_init__(self) -> None:
        exponents = _exponents(len(self.symbols))
        at = [[s[symbol.name] for symbol in self.symbols] for s in self.sizes]
        self._factors = [
            tuple(s for s, p in zip(self.symbols, e, strict=True) for _ in range(p))
            for e in exponents
        ]
        self._rows = [_monomials(n, exponents) for n in at]
        square = np.array(self._rows[: len(exponents)], np.float64)
        self._inverse = np.linalg.inv(square)
        self._known: dict[int, Any] = {}

    def lowered(self, every: Sequence[Lowered]) -> Lowered:
        """The first of the lowered forms, changed where the others differ."""
        first = every[0]
        for steps in itertools.zip_longest(*(low.steps for low in every)):
            if len({(type(s), s.nodes if s else ()) for s in steps}) > 1:
                self._refuse(next(filter(None, steps)), "is another kernel at other sizes")
        if len({len(low.buffers) for low in every}) > 1:
            self._refuse(first.steps[-1], "comes after other memory")
        merged: list[Step] = []
        for versions in zip(*(low.steps for low in every), strict=True):
            try:
                merged.append(self.merge(versions))
            except Differs as why:
                self._refuse(versions[0], f"has {why}")
        for buffers in zip(*(low.buffers for low in every), strict=True):
            self._buffer(buffers)
        first.steps = merged
        first.inputs = self._ports([low.inputs for low in every])
        first.outputs = self._ports([low.outputs for low in every])
        return first

    def _buffer(self, buffers: Sequence[Buffer]) -> None:
        first = buffers[0]
        try:
            if len({(b.index, b.dtype, b.kind) for b in buffers}) > 1:
                raise Differs("other memory at other sizes")
            if first.kind != "constant":
                first.elements = self.merge([b.elements for b in buffers])
        except Differs as why:
            raise UnsupportedOperatorError(
                f"{first.source or 'a result'!r} has {why} ({self._sizes()}); {self._remedy()}."
            ) from None

    def _ports(self, every: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
        def one(ports: Sequence[Any]) -> Any:
            shape = self.merge([p.shape for p in ports])
            return replace(ports[0], shape=shape)

        return tuple(one(ports) for ports in zip(*every, strict=True))

    def merge(self, versions: Sequence[Any]) -> Any:
        """Raises `Differs`."""
        first = versions[0]
        if len({type(v) for v in versions}) > 1:
            raise Differs("expressions that differ")
        match first:
            case bool() | float() | str() | None:
                if any(v != first and not (v != v and first != first) for v in versions):
                    raise Differs(f"{first!r} where it has others at other sizes")
                return first
            case int():
                return self.number(cast("Sequence[int]", versions))
            case tuple():
                if len({len(v) for v in versions}) > 1:
                    raise Differs("operands that differ in rank")
                return tuple(self.merge(parts) for parts in zip(*versions, strict=True))
            case np.ndarray():
                if not all(_same(first, v) for v in versions):
                    raise Differs("constants that depend on the size")
                return first
            case Buffer():
                return first
            case View():
                return self._view(versions)
            case _ if is_dataclass(first):
                return self._fields(versions)
            case _:
                raise Differs(f"a {type(first).__name__}")

    def _fields(self, versions: Sequence[Any]) -> Any:
        known = self._known.get(id(versions[0]))
        if known is None:
            changed = {
                f.name: self.merge([getattr(v, f.name) for v in versions])
                for f in fields(versions[0])
                if not (f.name == "name" and isinstance(versions[0], Step))
            }
            known = replace(versions[0], **changed)
            if isinstance(versions[0], Expr):
                self._known[id(versions[0])] = known
        return known

    def _view(self, views: Sequence[View]) -> View:
        first = views[0]
        if len({v.buffer.index for v in views}) > 1:
            raise Differs("operands in other memory at other sizes")
        shape = self.merge([v.shape for v in views])
        arrays = [v.buffer.array for v in views]
        if arrays[0] is None or all(_same(arrays[0], a) for a in arrays):
            strides = self.merge([v.strides for v in views])
            return replace(first, shape=shape, strides=strides, offset=self._offset(views))
        whole = view_array(first)
        for view in views[1:]:
            part = view_array(view)
            common = tuple(slice(min(a, b)) for a, b in zip(whole.shape, part.shape, strict=True))
            if not np.array_equal(whole[common], part[common], equal_nan=whole.dtype.kind == "f"):
                raise Differs(
                    f"the constant {first.buffer.source!r}, which other sizes do not have the "
                    f"beginning of,"
                )
        return replace(first, shape=shape)

    def _offset(self, views: Sequence[View]) -> int:
        return self.merge([v.offset for v in views])

    def number(self, numbers: Sequence[int]) -> int:
        """The polynomial that is these numbers at the sizes. Raises `Differs` without one."""
        if len(set(numbers)) == 1:
            return numbers[0]
        known = np.array(numbers[: len(self._factors)], np.float64)
        coefficients = [round(float(c)) for c in self._inverse @ known]
        for row, number in zip(self._rows, numbers, strict=True):
            if sum(c * m for c, m in zip(coefficients, row, strict=True)) != number:
                raise Differs(f"sizes or places that are no polynomial: {_listed(numbers)}")
        return polynomial(dict(zip(self._factors, coefficients, strict=True)))

    def _refuse(self, step: Step, why: str) -> NoReturn:
        raise UnsupportedOperatorError(
            f"{', '.join(step.nodes) or step.name!r} {why} ({self._sizes()}), so it has no form "
            f"for every size; {self._remedy()}."
        )

    def _sizes(self) -> str:
        return "; ".join(
            f"{s.name} at {_listed([n[s.name] for n in self.sizes])}" for s in self.symbols
        )

    def _remedy(self) -> str:
        return f"give a fixed size, as size.{self.symbols[0].name}={self.symbols[0].most}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, dict.fromkeys(numbers)))


def _same(a: np.ndarray, b: np.ndarray | None) -> bool:
    """Whether two constants are equal; the same memory is not read."""
    if b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.__array_interface__["data"] == b.__array_interface__["data"] and a.strides == b.strides:
        return True
    return bool((a.reshape(-1).view(np.uint8) == b.reshape(-1).view(np.uint8)).all())
