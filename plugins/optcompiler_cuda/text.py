"""Building the text of one Triton kernel: pointers, compile-time numbers, lines and masks."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.lowering.ir import Buffer, View

POINTERS: Mapping[str, str] = {
    "FLOAT": "*fp32", "DOUBLE": "*fp64", "FLOAT16": "*fp16", "BFLOAT16": "*bf16", "INT64": "*i64",
    "INT32": "*i32", "INT16": "*i16", "INT8": "*i8", "UINT8": "*u8", "BOOL": "*u8",
}  # fmt: skip
"""Triton's pointer type by ONNX type name. Booleans are bytes: 0 or 1."""

TORCH: Mapping[str, str] = {
    "FLOAT": "float32", "DOUBLE": "float64", "FLOAT16": "float16", "BFLOAT16": "bfloat16",
    "INT64": "int64", "INT32": "int32", "INT16": "int16", "INT8": "int8", "UINT8": "uint8",
    "BOOL": "uint8",
}  # fmt: skip
"""The torch type that holds a buffer, by ONNX type name."""

NUMPY: Mapping[str, str] = {
    "float32": "FLOAT", "float64": "DOUBLE", "float16": "FLOAT16", "int64": "INT64",
    "int32": "INT32", "int16": "INT16", "int8": "INT8", "uint8": "UINT8", "bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Packed:
    """A constant that this backend laid out itself."""

    array: np.ndarray

    @property
    def dtype(self) -> str:
        return NUMPY[self.array.dtype.name]


@dataclass(frozen=True)
class Lane:
    """A dimension of a kernel's tile; `mask` names what says which of its elements exist."""

    mask: str | None


@dataclass(frozen=True)
class Axis:
    """The index along one axis of a step's space: its text, and the tile dimension it varies on.

    `lane` None is a number that the whole tile shares.
    """

    text: str
    lane: Lane | None = None


@dataclass
class KernelText:
    """The kernel being printed. Structure is text; sizes and strides are compile-time arguments.

    So steps that differ in sizes alone share one function.
    """

    pointers: list[tuple[str, str, Buffer | Packed]] = field(default_factory=list)
    constexprs: dict[str, int] = field(default_factory=dict[str, int])
    lines: list[str] = field(default_factory=list[str])
    reals: list[float] = field(default_factory=list[float])
    keys: dict[object, str] = field(default_factory=dict[object, str])
    depth: int = 1
    temporaries: int = 0

    def pointer(self, role: str, source: Buffer | Packed) -> str:
        """The argument that points at `source`; one buffer is passed once."""
        for name, _, known in self.pointers:
            if known is source:
                return name
        if source.dtype not in POINTERS:
            raise UnsupportedOperatorError(
                f"the cuda backend has no element type {source.dtype}; convert it with Cast."
            )
        taken = {name for name, _, _ in self.pointers}
        name = role if role not in taken else f"{role}{len(self.pointers)}"
        self.pointers.append((name, POINTERS[source.dtype], source))
        return name

    def number(self, name: str, value: int) -> str:
        """`value` as a compile-time argument called `name`; 0 and 1 stay in the text."""
        if value in (0, 1):
            return str(value)
        while self.constexprs.setdefault(name, value) != value:
            name += "_"
        return name

    def real(self, value: float, key: object = None) -> str:
        """A number read at run time, so that kernels differing in it alone compile once.

        The same `key` gives the same variable.
        """
        if key is not None and key in self.keys:
            return self.keys[key]
        self.reals.append(value)
        name = f"r{len(self.reals) - 1}"
        if key is not None:
            self.keys[key] = name
        return name

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    @contextmanager
    def block(self, head: str) -> Generator[None]:
        self.line(head)
        self.depth += 1
        yield
        self.depth -= 1

    def temporary(self, value: str) -> str:
        """Assign `value` to a fresh variable."""
        name = f"v{self.temporaries}"
        self.temporaries += 1
        self.line(f"{name} = {value}")
        return name

    def offset(self, name: str, view: View, axes: Sequence[Axis]) -> tuple[str, tuple[Lane, ...]]:
        """The element offset of `view` at the index, and the tile dimensions it varies on."""
        terms: list[str] = []
        lanes: list[Lane] = []
        for d, (size, stride, axis) in enumerate(zip(view.shape, view.strides, axes, strict=True)):
            if size == 1 or stride == 0 or axis.text == "0":
                continue
            factor = self.number(f"{name}_s{d}", stride)
            terms.append(axis.text if factor == "1" else f"{axis.text} * {factor}")
            if axis.lane is not None and axis.lane not in lanes:
                lanes.append(axis.lane)
        if view.offset:
            terms.append(self.number(f"{name}_at", view.offset))
        return " + ".join(terms), tuple(lanes)

    def load(
        self, role: str, view: View, axes: Sequence[Axis], *, guard: str = "", other: str = "0"
    ) -> str:
        """The elements of `view` at the index, as text. Booleans come as truth values.

        Elements outside the tile's masks, and where `guard` does not hold, come as `other`.
        """
        pointer = self.pointer(role, view.buffer)
        offset, lanes = self.offset(pointer, view, axes)
        address = f"{pointer} + {offset}" if offset else pointer
        mask = conjunction(mask_of(lanes), guard)
        if mask.count("&") > 1:
            self.line(f"inside = {mask}")
            mask = "inside"
        text = f"tl.load({address}{f', mask={mask}, other={other}' if mask else ''})"
        if view.dtype == "BOOL":
            return f"({text} != 0)"
        return f"{text}.to(tl.float32)" if view.dtype in {"FLOAT16", "BFLOAT16"} else text

    def channel_constant(self, role: str, array: np.ndarray, channel: Axis) -> str:
        """The element of a constant of shape [channels] at a channel, as text."""
        pointer = self.pointer(role, Packed(np.ascontiguousarray(array)))
        address = pointer if channel.text == "0" else f"{pointer} + {channel.text}"
        mask = mask_of([channel.lane]) if channel.lane else ""
        return f"tl.load({address}{f', mask={mask}, other=0' if mask else ''})"

    def store(self, view: View, axes: Sequence[Axis], value: str, lanes: Sequence[Lane]) -> None:
        """Write `value` to `view` at the index; `lanes` are all dimensions of the tile."""
        pointer = self.pointer("out", view.buffer)
        offset, _ = self.offset(pointer, view, axes)
        address = f"{pointer} + {offset}" if offset else pointer
        mask = f", mask={mask_of(lanes)}" if mask_of(lanes) else ""
        if len(address) + len(value) + len(mask) > 80:
            self.line(f"value = {value}")
            value = "value"
        self.line(f"tl.store({address}, {value}{mask})")

    def finish(self) -> None:
        """Pass the run-time numbers; call when the kernel is printed."""
        if self.reals:
            pointer = self.pointer("reals", Packed(np.array(self.reals, dtype=np.float32)))
            at = [f"{pointer} + {i}" if i else pointer for i in range(len(self.reals))]
            self.lines[:0] = [f"    r{i} = tl.load({a})" for i, a in enumerate(at)]

    def signature(self) -> dict[str, str]:
        return {name: type_ for name, type_, _ in self.pointers}

    def function(self, name: str) -> str:
        """The whole function."""
        arguments = ", ".join(n for n, _, _ in self.pointers)
        constants = ", ".join(f"{n}: tl.constexpr" for n in self.constexprs)
        head = f"def {name}({arguments}{', ' if constants else ''}{constants}):"
        if len(head) > 100:
            head = f"def {name}(\n    {arguments},\n{wrapped(list(self.constexprs))}):"
        return "\n".join(["@triton.jit", head, *self.lines]) + "\n"


def wrapped(names: Sequence[str]) -> str:
    """Constexpr parameters on lines of at most 100 characters."""
    lines, line = [], ""
    for name in names:
        item = f"{name}: tl.constexpr,"
        if line and len(line) + 1 + len(item) > 96:
            lines.append(line)
            line = item
        else:
            line = f"{line} {item}".strip()
    return "".join(f"    {text}\n" for text in (*lines, line) if text)


def mask_of(lanes: Sequence[Lane]) -> str:
    """The conjunction of the masks of `lanes`, "" when all elements exist."""
    return " & ".join(dict.fromkeys(lane.mask for lane in lanes if lane.mask))


def conjunction(*masks: str) -> str:
    """All of the masks, each term once."""
    return " & ".join(dict.fromkeys(t for mask in masks if mask for t in mask.split(" & ")))


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value` and 1."""
    return 1 << max(value - 1, 0).bit_length()


def blocks(total: int, block: int) -> int:
    return -(-total // block)
