"""Pieces of emitted C: a step's function, the pointers it is called with, and text helpers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources

import numpy as np

from optcompiler.lowering.extents import c_long
from optcompiler.lowering.ir import Buffer, View
from optcompiler_cpu.expressions import Params
from optcompiler_cpu.scalars import stored_type

SIZE_PREFIX = "n_"
"""How extents spell sizes that are known at run time."""


@dataclass(eq=False)
class Pointer:
    """What a kernel is handed: a buffer, numbers that go to the weights file, or, where it is none
    of these, the size called `name`."""

    name: str
    ctype: str
    buffer: Buffer | None = None
    data: np.ndarray | None = None
    params: Params | None = None
    written: bool = False

    @property
    def is_size(self) -> bool:
        return self.buffer is None and self.data is None and self.params is None


@dataclass(eq=False)
class KernelCode:
    """The C function of one step.

    `text` says `@` for the function's name, so that steps of equal text share one function.
    `tiles` are the shared tiles it calls, (kind, vectors, rows). `scratch_bytes` is per thread.
    `parallel` says whether the work is divided by `part` of `parts`, of which each thread has
    `pieces`: others take those that it does not come to.
    """

    text: str
    pointers: list[Pointer]
    parallel: bool = True
    pieces: int = 4
    scratch_bytes: int = 0
    tiles: frozenset[tuple[str, int, int]] = field(default_factory=frozenset[tuple[str, int, int]])


class Pointers:
    """Collects a kernel's pointers and names them in order of first use."""

    def __init__(self) -> None:
        self.items: list[Pointer] = []
        self.params = Params()
        self._buffers: dict[int, Pointer] = {}

    def view(self, view: View, written: bool = False) -> str:
        """The C variable that points at the view's buffer."""
        known = self._buffers.get(view.buffer.index)
        if known is None:
            name = f"b{len(self._buffers)}"
            known = Pointer(name, stored_type(view.buffer.dtype), buffer=view.buffer)
            self._buffers[view.buffer.index] = known
            self.items.append(known)
        known.written = known.written or written
        return known.name

    def data(self, name: str, array: np.ndarray, ctype: str) -> str:
        self.items.append(Pointer(name, ctype, data=np.ascontiguousarray(array)))
        return name

    def finish(self) -> list[Pointer]:
        """Every pointer; call it when nothing more will be printed."""
        if self.params.values and all(p.params is None for p in self.items):
            self.items.append(Pointer("p", "float", params=self.params))
        return self.items

    def declarations(self, lines: Sequence[str]) -> list[str]:
        """Statements that name the entries of the pointer table `q` which `lines` mention."""
        words = set(re.findall(r"(?<![.\w])\w+", "\n".join(lines)))  # no members of structs
        declared = declared_sizes(lines, self.finish())
        for i, pointer in enumerate(self.items):
            if pointer.name in words and not pointer.is_size:
                kind = pointer.ctype if pointer.written else f"const {pointer.ctype}"
                declared.append(f"{kind} *const {pointer.name} = ({kind} *)q[{i}];")
        return declared


def declared_sizes(lines: Sequence[str], table: list[Pointer], name: str = "q") -> list[str]:
    """Statements that read the sizes that `lines` mention from the table `name`, where they get
    a place if they have none."""
    words = set(re.findall(r"\w+", "\n".join(lines)))
    known = {pointer.name: i for i, pointer in enumerate(table)}
    declared: list[str] = []
    for word in sorted(w for w in words if w.startswith(SIZE_PREFIX)):
        if word not in known:
            known[word] = len(table)
            table.append(Pointer(word, "long"))
        declared.append(f"const long {word} = *(const long *){name}[{known[word]}];")
    return declared


def template(file: str, **texts: str) -> str:
    """A file of `runtime` with each `@KEY@` replaced; `TABLES`, which holds names, at last."""
    text = (resources.files("optcompiler_cpu") / "runtime" / file).read_text()
    for key, value in texts.items():
        text = text.replace(f"@{key}@", value)
    return text


def linear(names: Sequence[str], strides: Sequence[int], offset: int = 0) -> str:
    """`names · strides + offset` as C, zero terms left out."""
    terms = [
        name if stride == 1 else f"{name} * {c_long(stride)}"
        for name, stride in zip(names, strides, strict=True)
        if stride
    ]
    if offset or not terms:
        terms.append(c_long(offset))
    return " + ".join(terms)


def indent(lines: Iterable[str], depth: int = 1) -> str:
    return "\n".join("  " * depth + line for line in lines)


def coordinates(index: str, dims: Sequence[int], names: Sequence[str]) -> list[str]:
    """Statements that split a flat row index into coordinates of `dims`."""
    lines = []
    rest = index
    for place, (size, name) in reversed(list(enumerate(zip(dims, names, strict=True)))):
        if place == 0:
            lines.append(f"const long {name} = {rest};")
        elif size == 1:
            lines.append(f"const long {name} = 0;")
        else:
            lines.append(f"const long {name} = {rest} % {size};")
            lines.append(f"const long {name}_ = {rest} / {size};")
            rest = f"{name}_"
    return [*lines, *(f"(void){name};" for name in names)]
