"""The lowered form: buffers, strided views, scalar expressions and steps; what printers print.

A program of static shapes becomes a list of *steps* over flat *buffers*. A step reads and writes
through *views* (buffer, offset and a stride per axis, in elements), so transposes, slices,
reshapes, broadcasts, channels-last layouts and concatenation in place are strides and cost no step.
What is fused into a step is an *expression* over the step's index space: a tree (in truth a DAG:
printers memoise by identity) of loads, constants and scalar operations.

Element types are ONNX type names: "FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT64", "INT32",
"INT16", "INT8", "UINT8", "BOOL".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from optcompiler.lowering.extents import Symbol, largest

BufferKind = Literal["input", "output", "constant", "temp"]


@dataclass(eq=False)
class Buffer:
    """A flat, contiguous piece of memory of `elements` elements.

    `index` is its place in `Lowered.buffers`; printers derive identifiers from it. `source` is the
    ONNX value it holds, for display alone: never an identifier. `array` holds a constant's contents
    (C order; shared with the program, not copied). `first` and `last` are the indexes of the first
    and last step that touch it; `offset` is its place in the arena in bytes (64-byte aligned), -1
    for other kinds than "temp".
    """

    index: int
    dtype: str
    elements: int
    kind: BufferKind
    source: str
    array: np.ndarray | None = None
    first: int = -1
    last: int = -1
    offset: int = -1

    @property
    def size_bytes(self) -> int:
        """What it takes at the largest sizes."""
        return largest(self.elements) * itemsize(self.dtype)


@dataclass(frozen=True)
class View:
    """Elements of a buffer: index `i` is at `offset + sum(i[d] * strides[d])`; stride 0 repeats."""

    buffer: Buffer
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def dtype(self) -> str:
        return self.buffer.dtype

    @property
    def elements(self) -> int:
        return product(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps (axes of length 1 do not count)."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def permute(self, order: tuple[int, ...]) -> View:
        return replace(
            self,
            shape=tuple(self.shape[i] for i in order),
            strides=tuple(self.strides[i] for i in order),
        )

    def broadcast(self, shape: tuple[int, ...]) -> View:
        """The view repeated to `shape` by ONNX's (numpy's) broadcasting rules."""
        lead = len(shape) - len(self.shape)
        strides = (0,) * lead + tuple(
            0 if size == 1 and wanted != 1 else stride
            for size, stride, wanted in zip(self.shape, self.strides, shape[lead:], strict=True)
        )
        return replace(self, shape=shape, strides=strides)

    def slice(self, axis: int, start: int, length: int, step: int = 1) -> View:
        shape, strides = list(self.shape), list(self.strides)
        offset = self.offset + start * strides[axis]
        shape[axis], strides[axis] = length, strides[axis] * step
        return replace(self, shape=tuple(shape), strides=tuple(strides), offset=offset)

    def reshape(self, shape: tuple[int, ...]) -> View | None:
        """The same elements in C order under another shape, or None where strides cannot say it."""
        if 0 in shape:
            return replace(self, shape=shape, strides=row_major(shape))
        old = [(n, s) for n, s in zip(self.shape, self.strides, strict=True) if n != 1]
        strides: list[int] = []
        at, room, step = 0, 1, 0
        for size in shape:
            if size == 1:
                strides.append(0)
                continue
            if room == 1:
                if at == len(old):
                    return None
                room, step = old[at]
                at += 1
                base = step
                while room % size and at < len(old):
                    count, stride = old[at]
                    if base != count * stride:
                        return None
                    room, base, at = room * count, stride, at + 1
                step = base
            while room % size and at < len(old):
                count, stride = old[at]
                if step != count * stride:
                    return None
                room, step, at = room * count, stride, at + 1
            if room % size:
                return None
            room //= size
            strides.append(step * room)
        return replace(self, shape=shape, strides=tuple(strides))


# -- expressions ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Expr:
    """A scalar at every index of a step's space. `dtype` is its ONNX element type."""

    dtype: str


@dataclass(frozen=True, eq=False)
class Load(Expr):
    """The element of `view` at the index; `view.shape` is the step's space."""

    view: View


@dataclass(frozen=True, eq=False)
class Const(Expr):
    """A number known now; ints for integer types and BOOL (0 or 1), floats otherwise."""

    value: float | int


@dataclass(frozen=True, eq=False)
class Accumulator(Expr):
    """What the step computes before its epilogue: sum, maximum, normalised value, gathered element.

    For an integer contraction it is the real value, FLOAT: `scale_a * scale_b[n] * (sum + bias)`.
    """


@dataclass(frozen=True, eq=False)
class Call(Expr):
    """`op` applied to `args`; the operations are the keys of `expressions.OPERATIONS`.

    Comparisons and logic give BOOL. "cast" converts to `dtype` by C's rules (to BOOL: non-zero).
    """

    op: str
    args: tuple[Expr, ...]


@dataclass(frozen=True, eq=False)
class Quantize(Expr):
    """`saturate(round_half_even(arg / scale) + zero_point)` as `dtype`, an integer type."""

    arg: Expr
    scale: Expr
    zero_point: Expr


@dataclass(frozen=True, eq=False)
class Dequantize(Expr):
    """`(arg - zero_point) * scale`, FLOAT."""

    arg: Expr
    scale: Expr
    zero_point: Expr


@dataclass(frozen=True, eq=False)
class Index(Expr):
    """The index along `axis` of the step's space, INT64."""

    axis: int


def operands_of(expr: Expr) -> tuple[Expr, ...]:
    """The direct sub-expressions."""
    match expr:
        case Call():
            return expr.args
        case Quantize() | Dequantize():
            return (expr.arg, expr.scale, expr.zero_point)
        case _:
            return ()


def walk(expr: Expr, seen: set[int] | None = None) -> Iterator[Expr]:
    """Every distinct sub-expression once, operands before users."""
    seen = set() if seen is None else seen
    if id(expr) in seen:
        return
    seen.add(id(expr))
    for operand in operands_of(expr):
        yield from walk(operand, seen)
    yield expr


def loads(*exprs: Expr) -> Iterator[Load]:
    seen: set[int] = set()
    for expr in exprs:
        yield from (e for e in walk(expr, seen) if isinstance(e, Load))


# -- steps ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Quantization:
    """How integers stand for reals: `(q - zero_point) * scale`.

    `scale` is float32 and `zero_point` int32, both of shape [] (per tensor) or [channels]: the
    output channels of a contraction's second operand. With `block` they are [blocks, channels]:
    each for `block` elements of K, the last for what is left; K of a Conv is [KH, KW, C].
    """

    scale: np.ndarray
    zero_point: np.ndarray
    block: int = 0

    @property
    def per_tensor(self) -> bool:
        return self.scale.ndim == 0


@dataclass(frozen=True, eq=False)
class Operand:
    """One side of a contraction; `quantization` None for floats."""

    view: View
    quantization: Quantization | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One kernel: writes `out`, storing `epilogue` at every index of `out.shape`.

    `name` is unique and made of the step's number and kind. `nodes` are the nodes of the program's
    main graph that it computes, for display.
    """

    name: str
    nodes: tuple[str, ...]
    out: View
    epilogue: Expr

    def reads(self) -> tuple[View, ...]:
        """Every view read, the epilogue's included."""
        return (*self.operand_views(), *(load.view for load in loads(*self.expressions())))

    def operand_views(self) -> tuple[View, ...]:
        return ()

    def expressions(self) -> tuple[Expr, ...]:
        return (self.epilogue,)


@dataclass(frozen=True, eq=False, kw_only=True)
class Loop(Step):
    """Pointwise: `out[i] = epilogue(i)`; copies, transposes, fills and casts too."""


@dataclass(frozen=True, eq=False, kw_only=True)
class MatMul(Step):
    """`acc[..., m, n] = sum_k a[..., m, k] * b[..., k, n] + bias[n]`.

    `a.view` is [*batch, M, K], `b.view` [*batch, K, N] and `out` [*batch, M, N]; batch axes that
    repeat have stride 0. A constant second operand has no batch axes that move. When both
    operands are quantised the sum is INT32 over `a - zero_point_a` and `b - zero_point_b` (zero
    where `b` is constant), and `bias` is INT32 in units of `scale_a * scale_b[n]`; else `bias` is
    FLOAT. `bias` is an array of shape [N] or None; a bias that is not constant is part of the
    epilogue. The elements of a row of `a` are adjacent (stride 1 along K). Operands are of one
    type, whose products are summed in FLOAT: FLOAT, or one that the printer asked for (`narrow`).
    Beside an `a` of FLOAT, a constant `b` may be quantised alone, with any zero point, or be of
    half floats, where the printer asked for it (`stored`); so may a `b` in blocks beside integers,
    whose sum is then FLOAT, block by block.
    """

    a: Operand
    b: Operand
    bias: np.ndarray | None = None

    def operand_views(self) -> tuple[View, ...]:
        return (self.a.view, self.b.view)


@dataclass(frozen=True, eq=False, kw_only=True)
class Conv(Step):
    """2-D convolution (1-D arrives with H = 1) as in ONNX, groups and depthwise included.

    `a.view` is [N, C, H, W], `b.view` [OC, C / groups, KH, KW] and constant, `out` [N, OC, OH, OW],
    all logical shapes; the memory of `a` and `out` is channels-last. `pads` is (top, left,
    bottom, right); a padded element is the real 0, hence `zero_point_a`. `bias` as in `MatMul`,
    of shape [OC].
    """

    a: Operand
    b: Operand
    bias: np.ndarray | None = None
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    groups: int = 1

    def operand_views(self) -> tuple[View, ...]:
        return (self.a.view, self.b.view)

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.b.view.shape[1] == 1 and self.groups == self.out.shape[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class Reduction(Step):
    """Reduces `value` over `axes` of its space, which keeps them with length 1 in `out.shape`.

    `op` is "sum", "mean", "max", "min", "prod" or "sumsq". `space` is the shape of `value`; `out`
    has the same rank.
    """

    op: str
    space: tuple[int, ...]
    axes: tuple[int, ...]
    value: Expr

    def expressions(self) -> tuple[Expr, ...]:
        return (self.value, self.epilogue)


@dataclass(frozen=True, eq=False, kw_only=True)
class Softmax(Step):
    """Softmax of `value` along `axis` (log-softmax with `log`); `value`'s space is `out.shape`."""

    axis: int
    value: Expr
    log: bool = False

    def expressions(self) -> tuple[Expr, ...]:
        return (self.value, self.epilogue)


@dataclass(frozen=True, eq=False, kw_only=True)
class Normalization(Step):
    """`(value - mean) / sqrt(variance + epsilon)` over the axes from `axis` on.

    With `rms`, `value / sqrt(mean(value²) + epsilon)`. Scale and bias are part of the epilogue.
    `value`'s space is `out.shape`.
    """

    axis: int
    value: Expr
    epsilon: float
    rms: bool = False

    def expressions(self) -> tuple[Expr, ...]:
        return (self.value, self.epilogue)


@dataclass(frozen=True, eq=False, kw_only=True)
class Pooling(Step):
    """`op` "max" or "mean" over windows of `source`, [N, C, H, W], FLOAT, UINT8 or INT8, or for
    "max" a type that the printer asked for (`narrow`).

    The accumulator of "max" has the type of `source`, that of "mean" is FLOAT and counts padded
    elements as zeros when `count_padding`, else leaves them out. `quantization` says what integers
    of `source` stand for ("mean" alone: the accumulator is the real value).
    """

    op: Literal["max", "mean"]
    source: View
    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    count_padding: bool = False
    quantization: Quantization | None = None

    def operand_views(self) -> tuple[View, ...]:
        return (self.source,)


@dataclass(frozen=True, eq=False, kw_only=True)
class Gather(Step):
    """`acc[a..., i..., b...] = data[a..., indices[i...], b...]` with `indices` at `axis`.

    A negative index counts from the end. `data` and `indices` are INT32 or INT64 indexed views.
    """

    data: View
    indices: View
    axis: int

    def operand_views(self) -> tuple[View, ...]:
        return (self.data, self.indices)


@dataclass(frozen=True, eq=False, kw_only=True)
class CumSum(Step):
    """Running sum or product of `value` along `axis`; `value`'s space is `out.shape`."""

    axis: int
    value: Expr
    exclusive: bool = False
    reverse: bool = False
    op: Literal["sum", "prod"] = "sum"

    def expressions(self) -> tuple[Expr, ...]:
        return (self.value, self.epilogue)


@dataclass(frozen=True, eq=False, kw_only=True)
class Scatter(Step):
    """`out[place] = op(out[place], value)` for every index of `space`, in order.

    `out` is contiguous and was written before; `place` is an INT64 into its flat elements, and one
    outside of them is passed over. `op` is "none" (replace), "add", "mul", "min" or "max"; the
    epilogue is the accumulator in the type of `out`.
    """

    op: str
    space: tuple[int, ...]
    place: Expr
    value: Expr

    def expressions(self) -> tuple[Expr, ...]:
        return (self.place, self.value, self.epilogue)

    def operand_views(self) -> tuple[View, ...]:
        return (self.out,)


@dataclass(frozen=True, eq=False, kw_only=True)
class TopK(Step):
    """Indices along `axis` of the largest (or smallest) elements of `value`, best first, INT64.

    Equal elements keep their order. `space` is the shape of `value`; along `axis`, `out` has the
    number of indices.
    """

    space: tuple[int, ...]
    axis: int
    value: Expr
    largest: bool

    def expressions(self) -> tuple[Expr, ...]:
        return (self.value, self.epilogue)


@dataclass(frozen=True, eq=False)
class PortBuffer:
    """A graph input or output: its ONNX name, type and shape, and its buffer (C order)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    buffer: Buffer


@dataclass(eq=False)
class Lowered:
    """A whole program: steps in order, and the arena that holds every "temp" buffer.

    Places in the arena are to be multiplied by the sizes in `arena_scale`.
    """

    inputs: tuple[PortBuffer, ...]
    outputs: tuple[PortBuffer, ...]
    buffers: list[Buffer] = field(default_factory=list[Buffer])
    steps: list[Step] = field(default_factory=list[Step])
    arena_bytes: int = 0
    arena_scale: tuple[Symbol, ...] = ()


ITEM_SIZES = {
    "FLOAT": 4, "DOUBLE": 8, "FLOAT16": 2, "BFLOAT16": 2, "INT64": 8, "INT32": 4, "INT16": 2,
    "INT8": 1, "UINT8": 1, "BOOL": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8,
    "FLOAT8E4M3FN": 1, "FLOAT8E4M3FNUZ": 1, "FLOAT8E5M2": 1, "FLOAT8E5M2FNUZ": 1, "FLOAT4E2M1": 1,
    "INT4": 1, "UINT4": 1, "INT2": 1, "UINT2": 1,
}  # fmt: skip
"""Bytes of one element by ONNX type name; elements of less than a byte take one each."""


def itemsize(dtype: str) -> int:
    return ITEM_SIZES[dtype]


def product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous array of `shape` in C order."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    return tuple(strides)
