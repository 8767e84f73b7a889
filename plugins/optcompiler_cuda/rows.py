"""Kernels that reduce: a tile of rows by columns, each row reduced over its columns."""

from __future__ import annotations

from collections.abc import Sequence

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.lowering.ir import (
    CumSum,
    Expr,
    Normalization,
    Pooling,
    Reduction,
    Softmax,
    Step,
    View,
    loads,
    product,
)
from optcompiler_cuda.elementwise import stored
from optcompiler_cuda.operands import real
from optcompiler_cuda.scalars import FLOATS, RANGES, TYPES, Scalars
from optcompiler_cuda.spaces import Printed, indexed_axes, memory_order, row_tile, spread, warps
from optcompiler_cuda.text import Axis, KernelText, Lane, blocks, conjunction, mask_of
from optcompiler_cuda.windows import Tap

WIDEST_STEP = 1024
WIDEST_ROW = 16384
WIDEST_SCAN = 65536


class Rows:
    """The beginning of such a kernel: `row`, its mask, and the axes that rows run over."""

    def __init__(
        self, shape: Sequence[int], kept: Sequence[int], columns: int, widest: int,
        views: Sequence[View], apart: frozenset[int],
    ) -> None:  # fmt: skip
        self.kernel = KernelText()
        self.shape = shape
        self.columns = columns
        total = product(tuple(shape[d] for d in kept))
        rows, self.width = row_tile(total, columns, widest)
        self.programs = blocks(total, rows)
        self.elements = rows * self.width
        kernel = self.kernel
        size = kernel.number("ROWS", rows)
        kernel.line(f"row = tl.program_id(0) * {size} + tl.arange(0, {size})[:, None]")
        if total % rows:
            kernel.line(f"row_exists = row < {kernel.number('TOTAL', total)}")
        self.row = Lane("row_exists" if total % rows else None)
        self.column = Lane("column_exists" if columns % self.width else None)
        self.axes = spread(
            kernel, "row", kept, shape, prefix="o", lane=self.row, views=views, apart=apart
        )

    @property
    def tile(self) -> str:
        """The shape of the tile, as text."""
        rows = self.kernel.number("ROWS", self.elements // self.width)
        return f"({rows}, {self.kernel.number('COLUMNS', self.width)})"

    def loop(self) -> str:
        """The head of a loop over blocks of columns."""
        count = self.kernel.number("COUNT", self.columns)
        return f"for start in range(0, {count}, {self.kernel.number('COLUMNS', self.width)}):"

    def begin_columns(self, start: str = "") -> None:
        """Print `column` and its mask for the columns from `start` on."""
        kernel = self.kernel
        width = kernel.number("COLUMNS", self.width)
        first = f"{start} + " if start else ""
        kernel.line(f"column = {first}tl.arange(0, {width})[None, :]")
        if self.column.mask:
            kernel.line(f"column_exists = column < {kernel.number('COUNT', self.columns)}")

    def column_axes(
        self, order: Sequence[int], views: Sequence[View], apart: frozenset[int]
    ) -> dict[int, Axis]:
        return spread(
            self.kernel, "column", order, self.shape,
            prefix="r", lane=self.column, views=views, apart=apart,
        )  # fmt: skip

    def all_axes(self, columns: dict[int, Axis]) -> list[Axis]:
        return [(self.axes | columns)[d] for d in range(len(self.shape))]

    def printed(self, kind: str) -> Printed:
        self.kernel.finish()
        return Printed(kind, self.kernel, self.programs, warps(self.elements))


def views_of(*exprs: Expr) -> list[View]:
    return [load.view for load in loads(*exprs)]


def identity(op: str, dtype: str) -> str:
    """What leaves the result of a reduction as it is."""
    if op == "prod":
        return "1"
    if op not in {"max", "min"}:
        return "0"
    if dtype in FLOATS:
        return 'float("-inf")' if op == "max" else 'float("inf")'
    low, high = RANGES[dtype]
    return str(low if op == "max" else high)


REDUCE = {
    "sum": "tl.sum(total, axis=1)", "mean": "tl.sum(total, axis=1)",
    "sumsq": "tl.sum(total, axis=1)", "max": "tl.reduce(total, 1, larger)",
    "min": "tl.reduce(total, 1, smaller)", "prod": "tl.reduce(total, 1, multiply)",
}  # fmt: skip

COMBINE = {
    "sum": "total + {x}", "mean": "total + {x}", "sumsq": "total + {x} * {x}",
    "max": "larger(total, {x})", "min": "smaller(total, {x})", "prod": "total * {x}",
}  # fmt: skip


def print_reduction(step: Reduction) -> Printed:
    """Partial results in a tile, column block by column block, then across the tile."""
    reduced = set(step.axes)
    views, apart = views_of(step.value), indexed_axes(step.value, step.epilogue)
    kept = [d for d in memory_order(step.out) if d not in reduced]
    order = [d for d in range(len(step.space)) if d in reduced]
    count = product(tuple(step.space[d] for d in order))
    joined = [*views, step.out, *views_of(step.epilogue)]
    rows = Rows(step.space, kept, count, WIDEST_STEP, joined, apart)
    kernel, dtype = rows.kernel, step.value.dtype
    start = identity(step.op, dtype)
    kernel.line(f"total = tl.full({rows.tile}, {start}, {TYPES[dtype]})")
    with kernel.block(rows.loop()):
        rows.begin_columns("start")
        axes = rows.all_axes(rows.column_axes(order, views, apart))
        value = Scalars(kernel, axes).print(step.value)
        mask = mask_of([rows.row, rows.column])
        x = kernel.temporary(f"tl.where({mask}, {value}, {start})" if mask else value)
        kernel.line(f"total = {COMBINE[step.op].format(x=x)}")
    result = f"{REDUCE[step.op]}[:, None]"
    if step.op == "mean":
        result = f"{result} * {1.0 / count!r}"
    elif dtype not in FLOATS:
        result = f"({result}).to({TYPES[dtype]})"
    kernel.line(f"result = {result}")
    axes = [rows.axes.get(d, Axis("0")) for d in range(len(step.space))]
    text = Scalars(kernel, axes, accumulator="result", role="more").print(step.epilogue)
    kernel.store(step.out, axes, stored(text, step.epilogue.dtype), [rows.row])
    return rows.printed("reduction")


def _whole_rows(
    step: Step, value: Expr, inner: Sequence[int], widest: int
) -> tuple[Rows, list[Axis]]:
    """A kernel that holds whole rows over the axes `inner`; its tile's axes."""
    shape = step.out.shape
    count = product(tuple(shape[d] for d in inner))
    if count > widest:
        raise UnsupportedOperatorError(
            f"the cuda backend holds rows of at most {widest} elements in registers, step "
            f"{step.name} of nodes {', '.join(step.nodes)} has {count}; split the axis."
        )
    views = [step.out, *views_of(value, step.epilogue)]
    apart = indexed_axes(value, step.epilogue)
    kept = [d for d in memory_order(step.out) if d not in inner]
    rows = Rows(shape, kept, count, widest, views, apart)
    rows.begin_columns()
    return rows, rows.all_axes(rows.column_axes(inner, views, apart))


def _store_rows(step: Step, rows: Rows, axes: list[Axis]) -> None:
    value = Scalars(rows.kernel, axes, accumulator="result", role="more").print(step.epilogue)
    lanes = [rows.row, rows.column]
    rows.kernel.store(step.out, axes, stored(value, step.epilogue.dtype), lanes)


def print_softmax(step: Softmax) -> Printed:
    """Whole rows in registers: maximum, exponentials, sum."""
    rows, axes = _whole_rows(step, step.value, [step.axis], WIDEST_ROW)
    kernel = rows.kernel
    kernel.line(f"x = {Scalars(kernel, axes).print(step.value)}")
    mask = rows.column.mask
    if mask:
        kernel.line(f'x = tl.where({mask}, x, float("-inf"))')
    kernel.line("x = x - tl.max(x, axis=1)[:, None]")
    kernel.line("grown = tl.exp(x)")
    total = f"tl.sum({f'tl.where({mask}, grown, 0.0)' if mask else 'grown'}, axis=1)[:, None]"
    kernel.line(f"result = x - tl.log({total})" if step.log else f"result = grown / {total}")
    _store_rows(step, rows, axes)
    return rows.printed("softmax")


def print_normalization(step: Normalization) -> Printed:
    """Whole rows in registers: mean, then the variance of what is left."""
    inner = list(range(step.axis, len(step.out.shape)))
    rows, axes = _whole_rows(step, step.value, inner, WIDEST_ROW)
    kernel, mask = rows.kernel, rows.column.mask
    share = repr(1.0 / rows.columns)
    value = Scalars(kernel, axes).print(step.value)
    kernel.line(f"x = {f'tl.where({mask}, {value}, 0.0)' if mask else value}")
    if not step.rms:
        kernel.line(f"x = x - tl.sum(x, axis=1)[:, None] * {share}")
        if mask:
            kernel.line(f"x = tl.where({mask}, x, 0.0)")
    kernel.line(f"variance = tl.sum(x * x, axis=1)[:, None] * {share}")
    kernel.line(f"result = x / tl.sqrt_rn(variance + {step.epsilon!r})")
    _store_rows(step, rows, axes)
    return rows.printed("normalization")


def print_cumsum(step: CumSum) -> Printed:
    """Whole rows in registers, scanned."""
    rows, axes = _whole_rows(step, step.value, [step.axis], WIDEST_SCAN)
    kernel, mask = rows.kernel, rows.column.mask
    value = Scalars(kernel, axes).print(step.value)
    kernel.line(f"x = {f'tl.where({mask}, {value}, 0)' if mask else value}")
    direction = ", reverse=True" if step.reverse else ""
    kernel.line(f"result = tl.cumsum(x, axis=1{direction}){' - x' if step.exclusive else ''}")
    _store_rows(step, rows, axes)
    return rows.printed("cumsum")


def print_pooling(step: Pooling) -> Printed:
    """Rows are output elements, columns the taps of their windows."""
    taps = product(step.kernel)
    space = (*step.out.shape, taps)
    kept = memory_order(step.out)
    rows = Rows(space, kept, taps, 64, [], frozenset())
    kernel = rows.kernel
    dtype = step.source.dtype if step.op == "max" else "FLOAT"
    start = identity("max" if step.op == "max" else "sum", dtype)
    kernel.line(f"total = tl.full({rows.tile}, {start}, {TYPES[dtype]})")
    image, out = step.source.shape[2:], step.out.shape[2:]
    row, column = rows.axes[2], rows.axes[3]
    counted = step.op == "mean" and not _always_full(step)
    if counted:
        kernel.line(f"count = tl.zeros({rows.tile}, tl.float32)")
    with kernel.block(rows.loop()):
        rows.begin_columns("start")
        tap = Tap(
            kernel, step.strides, step.pads, step.dilations, step.kernel, "column", rows.column
        )
        at, guard = tap.position(row, column, image, out, rows.row)
        lanes = [rows.row, rows.column]
        exists = conjunction(mask_of(lanes), guard)
        source = [rows.axes[0], rows.axes[1], *at]
        value = kernel.load("a", step.source, source, guard=exists)
        if step.op == "mean":
            value = real(kernel, value, step.quantization, Axis("0"))
            value = (
                value
                if step.quantization or step.source.dtype == "FLOAT"
                else f"{value}.to(tl.float32)"
            )
        value = f"tl.where({exists}, {value}, {start})" if exists else value
        kernel.line(f"total = larger(total, {value})" if step.op == "max" else f"total += {value}")
        if counted:
            kernel.line(f"count += ({_counted(step, kernel, exists, rows)}).to(tl.float32)")
    if step.op == "max":
        kernel.line(f"result = tl.reduce(total, 1, larger)[:, None].to({TYPES[dtype]})")
    elif counted:
        kernel.line("result = tl.sum(total, axis=1)[:, None] / tl.sum(count, axis=1)[:, None]")
    else:
        kernel.line(f"result = tl.sum(total, axis=1)[:, None] * {1.0 / taps!r}")
    axes = [rows.axes[d] for d in range(4)]
    text = Scalars(kernel, axes, accumulator="result", role="more").print(step.epilogue)
    kernel.store(step.out, axes, stored(text, step.epilogue.dtype), [rows.row])
    return rows.printed("pooling")


def _always_full(step: Pooling) -> bool:
    """Whether every tap of every window counts."""
    for d in range(2):
        size = step.source.shape[2 + d]
        before, after = (step.pads[d], step.pads[d + 2]) if step.count_padding else (0, 0)
        last = (step.out.shape[2 + d] - 1) * step.strides[d] - step.pads[d]
        last += (step.kernel[d] - 1) * step.dilations[d]
        if last >= size + after or step.pads[d] > before:
            return False
    return True


def _counted(step: Pooling, kernel: KernelText, exists: str, rows: Rows) -> str:
    """What holds for a tap that the mean counts."""
    if not step.count_padding:
        return exists or "column >= 0"
    bounds = []
    for d, letter in ((0, "y"), (1, "x")):
        last = (step.out.shape[2 + d] - 1) * step.strides[d] - step.pads[d]
        last += (step.kernel[d] - 1) * step.dilations[d]
        limit = step.source.shape[2 + d] + step.pads[d + 2]
        if last >= limit:
            bounds.append(f"({letter} < {kernel.number(f'LIMIT_{letter.upper()}', limit)})")
    return " & ".join(filter(None, [mask_of([rows.row, rows.column]), *bounds]))
