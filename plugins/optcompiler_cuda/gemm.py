"""Printing a contraction: on the matrix units by tiles, or a row at a time without them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from optcompiler.lowering.ir import Conv, MatMul, Operand, loads
from optcompiler_cuda.contractions import Problem
from optcompiler_cuda.elementwise import stored
from optcompiler_cuda.operands import finish_total, real, shifted
from optcompiler_cuda.scalars import FLOATS, TYPES, Scalars
from optcompiler_cuda.spaces import Printed, indexed_axes, spread
from optcompiler_cuda.text import Axis, KernelText, Lane, Packed, blocks, power_of_two

PROCESSORS = 128
"""Programs that fill a large GPU once (an H100 has 132 multiprocessors)."""


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a program's tile."""

    m: int
    n: int
    k: int
    num_warps: int


INTEGER_TILES = (
    Tile(128, 128, 128, 8), Tile(128, 64, 128, 4), Tile(64, 64, 128, 4),
    Tile(64, 32, 128, 4), Tile(32, 32, 128, 2), Tile(16, 32, 128, 2), Tile(16, 16, 128, 1),
)  # fmt: skip
"""From the most reuse to the most programs."""

FLOAT_TILES = (
    Tile(128, 64, 16, 8), Tile(64, 64, 16, 4), Tile(64, 32, 32, 4),
    Tile(32, 32, 32, 4), Tile(16, 32, 32, 2), Tile(16, 16, 32, 1),
)  # fmt: skip

SMALLEST_DEPTH = 32


def choose_tile(m: int, n: int, k: int, products: int, exact: bool) -> Tile:
    """The largest tile that gives every multiprocessor a program and is not mostly padding.

    Where no tile does, the smallest.
    """
    tiles = INTEGER_TILES if exact else FLOAT_TILES
    fitting = [t for t in tiles if (t.m == 16 or t.m < 2 * m) and (t.n == 16 or t.n < 2 * n)]
    full = [t for t in fitting if products * blocks(m, t.m) * blocks(n, t.n) >= PROCESSORS]
    tile = full[0] if full else fitting[-1]
    return replace(tile, k=max(min(SMALLEST_DEPTH, tile.k), min(tile.k, power_of_two(k))))


class ProductKernel:
    """What both kernels share: where the program stands, constants, and the epilogue."""

    def __init__(self, problem: Problem, tile: Tile) -> None:
        self.problem = problem
        self.step = problem.step
        self.tile = tile
        self.kernel = KernelText()
        self.out = problem.step.out
        self.programs = 0
        self.axes: dict[int, Axis] = {}
        self.column = Lane("n_exists" if problem.n % tile.n else None)
        self.weights = None if problem.weights is None else self._pack(problem.weights)

    def _pack(self, weights: np.ndarray) -> np.ndarray:
        """[groups, K, N] floats or [groups, N, K] integers, padded by zeros to whole tiles."""
        groups, k, n = weights.shape
        tile = self.tile
        packed = np.zeros(
            (groups, blocks(k, tile.k) * tile.k, blocks(n, tile.n) * tile.n), weights.dtype
        )
        packed[:, :k, :n] = weights
        return np.ascontiguousarray(packed.transpose(0, 2, 1)) if self.problem.exact else packed

    def begin(self, row: str, lane: Lane | None) -> None:
        """Print which product and which columns this program computes; rows are in `row`."""
        kernel, problem, tile = self.kernel, self.problem, self.tile
        down, across = blocks(problem.m, tile.m), blocks(problem.n, tile.n)
        self.programs = problem.products * down * across
        kernel.line("tile = tl.program_id(0)")
        if problem.products > 1:
            name = "group" if problem.groups > 1 else "product"
            tiles = kernel.number("TILES", down * across)
            kernel.line(f"{name} = tile // {tiles}")
            kernel.line(f"tile = tile % {tiles}")
        width = kernel.number("ACROSS", across)
        kernel.line(f"m = {row.format(tile='tile' if across == 1 else f'(tile // {width})')}")
        columns = kernel.number("BN", tile.n)
        first = "" if across == 1 else f"(tile % {width}) * {columns} + "
        kernel.line(f"n = {first}tl.arange(0, {columns})[None, :]")
        if lane is not None and lane.mask:
            kernel.line(f"{lane.mask} = m < {kernel.number('M', problem.m)}")
        if self.column.mask:
            kernel.line(f"{self.column.mask} = n < {kernel.number('N', problem.n)}")
        step = self.step
        epilogue = [load.view for load in loads(step.epilogue)]
        apart = indexed_axes(step.epilogue)
        shape = self.out.shape
        views = [self.out, *epilogue, *problem.joined] if problem.joined else []
        self.axes |= spread(
            kernel, "m", problem.rows, shape, prefix="m", lane=lane, views=views, apart=apart
        )
        if problem.batch:
            self.axes |= spread(kernel, "product", problem.batch, shape, prefix="z")
        if problem.groups > 1:
            kernel.line(f"channel = group * {kernel.number('N', problem.n)} + n")
        self.axes[problem.column] = Axis("channel" if problem.groups > 1 else "n", self.column)

    @property
    def channel(self) -> Axis:
        return self.axes[self.problem.column]

    def depth(self, name: str, shape: str) -> Axis:
        """Print the block of K as `name`, laid along a dimension of the tile."""
        kernel, problem = self.kernel, self.problem
        size = kernel.number("BK", self.tile.k)
        kernel.line(f"{name} = start + tl.arange(0, {size})[{shape}]")
        mask = None
        if problem.k % self.tile.k:
            mask = f"{name}_exists"
            kernel.line(f"{mask} = {name} < {kernel.number('K', problem.k)}")
        return Axis(name, Lane(mask))

    def loop(self) -> str:
        k = self.kernel.number("K", self.problem.k)
        return f"for start in range(0, {k}, {self.kernel.number('BK', self.tile.k)}):"

    def right(self, k: Axis, padding: str) -> str:
        """The right side's block, [BK, BN]."""
        kernel, weights = self.kernel, self.weights
        if weights is None:
            return self.problem.right(kernel, self.axes, k, padding)
        if not hasattr(self, "packed"):
            self.packed = Packed(weights)
        pointer = kernel.pointer("b", self.packed)
        fast, slow = ("n", k.text) if not self.problem.exact else (k.text, "n")
        stride = kernel.number("B_STRIDE", weights.shape[2])
        base = f"{pointer} + {slow} * {stride} + {fast}"
        if self.problem.groups > 1:
            base += f" + group * {kernel.number('B_GROUP', weights.shape[1] * weights.shape[2])}"
        return f"tl.load({base})"

    def finish(self, bias: np.ndarray | None, lanes: list[Lane]) -> None:
        """Print bias, scale, epilogue and the store of `total`."""
        kernel, step = self.kernel, self.step
        channels = self.problem.n * self.problem.groups
        finish_total(kernel, step.a, step.b, bias, self.channel, channels)
        axes = [self.axes[d] for d in range(len(self.out.shape))]
        text = Scalars(kernel, axes, accumulator="total").print(step.epilogue)
        kernel.store(self.out, axes, stored(text, step.epilogue.dtype), lanes)
        kernel.finish()

    def padding(self) -> str:
        """What the left side holds for a padded pixel, the real 0.

        Outside a matrix anything will do: the right side is 0 there, or the product is masked.
        """
        quantization = self.step.a.quantization
        image = isinstance(self.step, Conv)
        if not image or quantization is None or not quantization.zero_point.any():
            return "0"
        zero_point = self.kernel.real(float(quantization.zero_point))
        return f"{zero_point}.to({TYPES[self.step.a.view.dtype]})"

    def value(self, operand: Operand, text: str, channel: Axis) -> str:
        """A float that an element stands for."""
        return real(self.kernel, text, operand.quantization, channel)


class MatrixKernel(ProductKernel):
    """`tl.dot` over tiles: float32 without TF32, or bytes into int32."""

    def __init__(self, problem: Problem) -> None:
        tile = choose_tile(problem.m, problem.n, problem.k, problem.products, problem.exact)
        super().__init__(problem, tile)

    def printed(self, kind: str) -> Printed:
        kernel, tile = self.kernel, self.tile
        row = Lane("m_exists" if self.problem.m % tile.m else None)
        rows = kernel.number("BM", tile.m)
        self.begin(f"{{tile}} * {rows} + tl.arange(0, {rows})[:, None]", row)
        lanes = [row, self.column]
        if self.problem.exact:
            self._integers(lanes)
        else:
            self._floats(lanes)
        suffix = "_int8" if self.problem.exact else ""
        return Printed(kind + suffix, kernel, self.programs, tile.num_warps)

    @property
    def shape(self) -> str:
        kernel = self.kernel
        return f"({kernel.number('BM', self.tile.m)}, {kernel.number('BN', self.tile.n)})"

    def _floats(self, lanes: list[Lane]) -> None:
        kernel, step = self.kernel, self.step
        kernel.line(f"total = tl.zeros({self.shape}, tl.float32)")
        with kernel.block(self.loop()):
            k = self.depth("k", "None, :")
            left = self.problem.left(kernel, self.axes, k, self.padding())
            kernel.line(f"left = {self.value(step.a, left, Axis('0'))}")
            below = self.depth("k_below", ":, None") if self.weights is None else self._below()
            right = self.right(below, "0")
            if self.weights is None:
                right = self.value(step.b, right, self.channel)
                if step.b.quantization is not None and below.lane and below.lane.mask:
                    right = f"tl.where({below.lane.mask}, {right}, 0.0)"
            kernel.line(f"right = {right}")
            kernel.line('total = tl.dot(left, right, total, input_precision="ieee")')
        self.finish(step.bias, lanes)

    def _below(self) -> Axis:
        """K along the first dimension; packed weights need no mask."""
        size = self.kernel.number("BK", self.tile.k)
        self.kernel.line(f"k_below = start + tl.arange(0, {size})[:, None]")
        return Axis("k_below", Lane(None))

    def _integers(self, lanes: list[Lane]) -> None:
        """Sums of the bytes as they lie in memory, corrected for the zero points at the end.

        An unsigned byte q is read as the signed q - 128. With a constant right side the left
        zero point's share is part of the bias; else sums of rows and columns are kept beside.
        """
        kernel, step, problem = self.kernel, self.step, self.problem
        assert step.a.quantization is not None
        assert step.b.quantization is not None
        unsigned_a = step.a.view.dtype == "UINT8"
        unsigned_b = self.weights is None and step.b.view.dtype == "UINT8"
        zero_a = int(step.a.quantization.zero_point) - (128 if unsigned_a else 0)
        zero_b = 0
        if self.weights is None:
            zero_b = int(step.b.quantization.zero_point) - (128 if unsigned_b else 0)
        bias = step.bias
        if self.weights is not None and zero_a and problem.weights is not None:
            sums = problem.weights.astype(np.int32).sum(axis=1).reshape(-1)
            bias = (0 if bias is None else bias.astype(np.int32)) - zero_a * sums
        row_sums, column_sums = bool(zero_b), bool(zero_a) and self.weights is None
        kernel.line(f"total = tl.zeros({self.shape}, tl.int32)")
        rows, columns = kernel.number("BM", self.tile.m), kernel.number("BN", self.tile.n)
        if row_sums:
            kernel.line(f"row_sums = tl.zeros(({rows}, 1), tl.int32)")
        if column_sums:
            kernel.line(f"column_sums = tl.zeros((1, {columns}), tl.int32)")
        # Beyond the end of K, row sums must see a signed 0.
        padding = "128" if unsigned_a and isinstance(step, MatMul) else self.padding()
        with kernel.block(self.loop()):
            k = self.depth("k", "None, :")
            left = problem.left(kernel, self.axes, k, padding)
            kernel.line(f"left = {signed(left) if unsigned_a else left}")
            below = self.depth("k_below", ":, None") if self.weights is None else self._below()
            right = self.right(below, "128" if unsigned_b else "0")
            kernel.line(f"right = {signed(right) if unsigned_b else right}")
            kernel.line("total = tl.dot(left, right, total, out_dtype=tl.int32)")
            if row_sums:
                kernel.line("row_sums += tl.sum(left.to(tl.int32), axis=1)[:, None]")
            if column_sums:
                kernel.line("column_sums += tl.sum(right.to(tl.int32), axis=0)[None, :]")
        total = "total"
        if column_sums:
            total += f" - {kernel.real(zero_a)}.to(tl.int32) * column_sums"
        if row_sums:
            total += f" - {kernel.real(zero_b)}.to(tl.int32) * row_sums"
        if row_sums and column_sums:
            total += f" + {kernel.real(problem.k * zero_a * zero_b)}.to(tl.int32)"
        if total != "total":
            kernel.line(f"total = {total}")
        self.finish(bias, lanes)


def signed(text: str) -> str:
    """Unsigned bytes less 128, as signed bytes: the top bit turned over."""
    return f"({text} ^ 128).to(tl.int8, bitcast=True)"


class VectorKernel(ProductKernel):
    """One row of the output per program, multiplied and summed without the matrix units.

    For a few rows, and for element types that the units do not take.
    """

    def __init__(self, problem: Problem) -> None:
        columns = max(8, min(64, power_of_two(blocks(problem.n * problem.m, 2 * PROCESSORS))))
        depth = max(16, min(2048 // columns, power_of_two(problem.k)))
        super().__init__(problem, Tile(1, columns, depth, 4))

    def printed(self, kind: str) -> Printed:
        kernel, step, exact = self.kernel, self.step, self.problem.exact
        quantised = step.a.quantization is not None or step.b.quantization is not None
        dtype = "INT32" if exact else "FLOAT" if quantised else step.a.view.dtype
        self.begin("{tile}", None)
        tile = f"({kernel.number('BK', self.tile.k)}, {kernel.number('BN', self.tile.n)})"
        kernel.line(f"total = tl.zeros({tile}, {TYPES[dtype]})")
        with kernel.block(self.loop()):
            k = self.depth("k", ":, None")
            left = self.problem.left(kernel, self.axes, k, self.padding())
            right = self.right(k, "0")
            if exact and step.a.quantization is not None and step.b.quantization is not None:
                left = shifted(kernel, left, step.a.quantization, Axis("0"))
                if self.weights is None:
                    right = shifted(kernel, right, step.b.quantization, self.channel)
            else:
                left = self.value(step.a, left, Axis("0"))
                if self.weights is None:
                    right = self.value(step.b, right, self.channel)
            kernel.line(f"left = {left}")
            kernel.line(f"right = {right}")
            product = "left * right"
            if k.lane is not None and k.lane.mask and (quantised or dtype not in FLOATS):
                product = f"tl.where({k.lane.mask}, {product}, 0)"
            kernel.line(f"total += {product}")
        kernel.line(f"total = tl.sum(total, axis=0)[None, :].to({TYPES[dtype]})")
        self.finish(step.bias, [self.column])
        return Printed(f"{kind}_row", kernel, self.programs, self.tile.num_warps)
