"""Matrix products and convolutions as problems: which axes are rows, columns, batch and K.

A convolution is a matrix product whose left side is read from the image in place (implicit GEMM):
rows are output pixels, columns output channels, K runs over taps and input channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from optcompiler.lowering.ir import Conv, MatMul, View, product
from optcompiler_cuda.operands import BYTES, constant_array, integer
from optcompiler_cuda.spaces import Printed
from optcompiler_cuda.text import Axis, KernelText, Lane, conjunction, mask_of
from optcompiler_cuda.windows import Tap

FEW_ROWS = 4
"""Up to this many rows in all, a tile of a matrix unit would be mostly empty."""

HALVES = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})


@dataclass(frozen=True)
class Problem:
    """A contraction as a batch of matrix products.

    `rows`, `column` and `batch` are axes of the output; `m`, `n` and `k` sizes of one product;
    `groups` counts the products that a grouped convolution splits its channels into. `weights` is
    a constant right side, [groups, k, n], as integers without zero point or floats; None when the
    right side is read through its view. Rows that all of `joined` walk as one axis stay one.
    """

    step: MatMul | Conv
    rows: tuple[int, ...]
    column: int
    batch: tuple[int, ...]
    m: int
    n: int
    k: int
    groups: int = 1
    weights: np.ndarray | None = None
    joined: Sequence[View] = field(default_factory=tuple)

    @property
    def exact(self) -> bool:
        """Whether integers are summed."""
        return integer(self.step.a, self.step.b)

    @property
    def products(self) -> int:
        return product(tuple(self.step.out.shape[d] for d in self.batch)) * self.groups

    def left(self, kernel: KernelText, axes: dict[int, Axis], k: Axis, padding: str) -> str:
        """The left side at a row and `k`, as text; `padding` stands for a padded pixel."""
        raise NotImplementedError

    def right(self, kernel: KernelText, axes: dict[int, Axis], k: Axis, padding: str) -> str:
        """A right side that is no constant, at a column and `k`; `padding` outside the tile."""
        raise NotImplementedError


class MatrixProblem(Problem):
    def left(self, kernel: KernelText, axes: dict[int, Axis], k: Axis, padding: str) -> str:
        view = self.step.a.view
        at = [axes[d] for d in range(len(view.shape) - 1)]
        return kernel.load("a", view, [*at, k], other=padding)

    def right(self, kernel: KernelText, axes: dict[int, Axis], k: Axis, padding: str) -> str:
        view = self.step.b.view
        at = [axes[d] for d in range(len(view.shape) - 2)]
        return kernel.load("b", view, [*at, k, axes[self.column]], other=padding)


class ImageProblem(Problem):
    def left(self, kernel: KernelText, axes: dict[int, Axis], k: Axis, padding: str) -> str:
        step = self.step
        assert isinstance(step, Conv)
        depth, height, width = step.b.view.shape[1:]
        channel, index = k, "0"
        if height * width > 1:
            channel, index = Axis("0"), k.text
            if depth > 1:
                size = kernel.number("DEPTH", depth)
                kernel.line(f"depth = {k.text} % {size}")
                kernel.line(f"tap = {k.text} // {size}")
                channel, index = Axis("depth", k.lane), "tap"
        if step.groups > 1:
            size = kernel.number("DEPTH", depth)
            inner = "" if channel.text == "0" else f" + {channel.text}"
            first = "group" if depth == 1 else f"group * {size}"
            channel = Axis(f"({first}{inner})", channel.lane)
        lanes = [axes[d].lane for d in self.rows]
        row = next((lane for lane in lanes if lane is not None), Lane(None))
        tap = Tap(kernel, step.strides, step.pads, step.dilations, (height, width), index, k.lane)
        image = step.a.view.shape[2:]
        at, guard = tap.position(axes[2], axes[3], image, step.out.shape[2:], row)
        masks = mask_of([lane for lane in (row, k.lane) if lane is not None])
        guard = conjunction(masks, guard)
        return kernel.load("a", step.a.view, [axes[0], channel, *at], guard=guard, other=padding)


def print_matmul(step: MatMul) -> Printed:
    """`[*batch, M, K] @ [*batch, K, N]`; batch axes that the right side repeats become rows."""
    shape = step.out.shape
    rank = len(shape)
    batch = tuple(d for d in range(rank - 2) if shape[d] > 1 and step.b.view.strides[d] != 0)
    rows = tuple(d for d in range(rank - 1) if d not in batch)
    weights = constant_array(step.b.view)
    problem = MatrixProblem(
        step=step,
        rows=rows,
        column=rank - 1,
        batch=batch,
        m=product(tuple(shape[d] for d in rows)),
        n=shape[-1],
        k=step.a.view.shape[-1],
        weights=None
        if weights is None or batch
        else without_zero_point(step, weights[(0,) * (rank - 2)])[None],
        joined=(step.a.view,),
    )
    return _print(problem, "gemm")


def print_conv(step: Conv) -> Printed:
    """An implicit GEMM per group. K runs tap by tap with channels innermost, so that neighbours
    in K are neighbours in a channels-last image."""
    channels, depth, height, width = step.b.view.shape
    weights = constant_array(step.b.view)
    assert weights is not None
    matrix = without_zero_point(step, weights.transpose(2, 3, 1, 0).reshape(-1, channels))
    groups = step.groups
    per_group = channels // groups
    k = depth * height * width
    problem = ImageProblem(
        step=step,
        rows=(0, 2, 3),
        column=1,
        batch=(),
        m=product(tuple(step.out.shape[d] for d in (0, 2, 3))),
        n=per_group,
        k=k,
        groups=groups,
        weights=np.ascontiguousarray(matrix.reshape(k, groups, per_group).transpose(1, 0, 2)),
    )
    return _print(problem, "conv")


def without_zero_point(step: MatMul | Conv, weights: np.ndarray) -> np.ndarray:
    """[K, N]: levels less their zero points where integers are summed, else what they stand for."""
    quantization = step.b.quantization
    if quantization is None:
        return weights
    levels = weights.astype(np.int32) - quantization.zero_point
    if step.a.quantization is None:
        return (levels * quantization.scale).astype(np.float32)
    narrow = levels.astype(np.int8)
    return narrow if np.array_equal(narrow, levels) else levels


def _print(problem: Problem, kind: str) -> Printed:
    from optcompiler_cuda.gemm import MatrixKernel, VectorKernel

    step = problem.step
    right = step.b.view.dtype
    if problem.weights is not None and problem.exact:
        right = "INT8" if problem.weights.dtype == np.int8 else "INT32"
    if problem.exact:
        units = {step.a.view.dtype, right} <= BYTES
    else:
        units = all(o.quantization is not None or o.view.dtype in HALVES for o in (step.a, step.b))
    few = problem.m * problem.products <= FEW_ROWS and problem.groups == 1
    printer = VectorKernel(problem) if few or not units else MatrixKernel(problem)
    return printer.printed(kind)
