"""Kernels whose every output element stands alone: loops, gathers, depthwise convolutions."""

from __future__ import annotations

from optcompiler.lowering.ir import Conv, Gather, Loop, Step, loads
from optcompiler_cuda.operands import finish_total, integer, real, shifted
from optcompiler_cuda.scalars import Scalars
from optcompiler_cuda.spaces import (
    Printed,
    flat_block,
    flat_lane,
    indexed_axes,
    memory_order,
    spread,
    warps,
)
from optcompiler_cuda.text import Axis, KernelText, Lane
from optcompiler_cuda.windows import Tap


def _begin(
    step: Step, *, joined: bool = True, largest: int = 1024
) -> tuple[KernelText, list[Axis], Lane, int, int]:
    """A kernel over the elements of `step.out` in memory order, one lane."""
    kernel = KernelText()
    total = step.out.elements
    block = flat_block(total, largest)
    lane, grid = flat_lane(kernel, total, block)
    views = [step.out, *(load.view for load in loads(step.epilogue))] if joined else []
    axes = spread(
        kernel,
        "i",
        memory_order(step.out),
        step.out.shape,
        prefix="i",
        lane=lane,
        views=views,
        apart=indexed_axes(step.epilogue),
    )
    return kernel, [axes[d] for d in range(len(step.out.shape))], lane, grid, block


def _finish(
    kernel: KernelText, step: Step, axes: list[Axis], lane: Lane, accumulator: str = ""
) -> None:
    value = Scalars(kernel, axes, accumulator=accumulator).print(step.epilogue)
    kernel.store(step.out, axes, stored(value, step.epilogue.dtype), [lane])
    kernel.finish()


def stored(value: str, dtype: str) -> str:
    """A value as it goes to memory: truth values are bytes."""
    return f"({value}).to(tl.uint8)" if dtype == "BOOL" and not value.isdigit() else value


def print_loop(step: Loop) -> Printed:
    """One element a lane, in the order of the output's memory."""
    kernel, axes, lane, grid, block = _begin(step)
    _finish(kernel, step, axes, lane)
    return Printed("loop", kernel, grid, warps(block))


def print_gather(step: Gather) -> Printed:
    """One element a lane; the index is read from memory, negative ones count from the end."""
    kernel, axes, lane, grid, block = _begin(step, joined=False)
    rank = len(step.indices.shape)
    chosen = kernel.load("indices", step.indices, axes[step.axis : step.axis + rank])
    size = kernel.number("LENGTH", step.data.shape[step.axis])
    kernel.line(f"place = {chosen}")
    kernel.line(f"place = tl.where(place < 0, place + {size}, place)")
    at = [*axes[: step.axis], Axis("place", lane), *axes[step.axis + rank :]]
    kernel.line(f"found = {kernel.load('data', step.data, at)}")
    _finish(kernel, step, axes, lane, "found")
    return Printed("gather", kernel, grid, warps(block))


def print_depthwise(step: Conv) -> Printed:
    """One output element a lane, a loop over the taps of its channel's filter."""
    kernel, axes, lane, grid, block = _begin(step, joined=False, largest=256)
    batch, channel, row, column = axes
    if "0" in (row.text, column.text):
        # The interpreter takes no mask that is one Python truth value for the whole tile.
        kernel.line("zero = tl.zeros_like(i)")
        zero = Axis("zero", lane)
        row, column = (zero if axis.text == "0" else axis for axis in (row, column))
    height, width = step.b.view.shape[2:]
    exact = integer(step.a, step.b)
    kernel.line(f"total = tl.zeros_like(i).to({'tl.int32' if exact else 'tl.float32'})")
    with kernel.block(f"for tap in range({kernel.number('TAPS', height * width)}):"):
        tap = Tap(kernel, step.strides, step.pads, step.dilations, (height, width), "tap")
        at, guard = tap.position(row, column, step.a.view.shape[2:], step.out.shape[2:], lane)
        a = kernel.load("a", step.a.view, [batch, channel, *at], guard=guard)
        b = kernel.load("b", step.b.view, [channel, Axis("0"), *tap.axes])
        if exact and step.a.quantization is not None and step.b.quantization is not None:
            a = shifted(kernel, a, step.a.quantization, Axis("0"))
            b = shifted(kernel, b, step.b.quantization, channel)
        else:
            a = real(kernel, a, step.a.quantization, Axis("0"))
            b = real(kernel, b, step.b.quantization, channel)
        if guard and step.a.quantization is not None:
            a = f"tl.where({guard}, {a}, 0)"
        kernel.line(f"pixel = {a}")
        kernel.line(f"weight = {b}")
        kernel.line("total += pixel * weight")
    channels = step.out.shape[1]
    finish_total(kernel, step.a, step.b, step.bias, channel, channels)
    _finish(kernel, step, axes, lane, "total")
    return Printed("depthwise", kernel, grid, warps(block))
