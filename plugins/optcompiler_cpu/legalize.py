"""What this backend changes in the lowered form before memory is planned.

Convolution inputs get a halo (a border that holds the zero point) in memory, so that kernels have
no border checks: their producers write inside it where they can. Signed activations become
unsigned, as `vpdpbusd` wants. Expressions that vectors cannot compute move to loops of their own.
Two products and the softmax between them become one step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from optcompiler.lowering.build import channels_last, map_views, rewrite, view_array
from optcompiler.lowering.expressions import cast
from optcompiler.lowering.ir import (
    Accumulator,
    Buffer,
    Call,
    Const,
    Conv,
    Expr,
    Load,
    Loop,
    Lowered,
    MatMul,
    Normalization,
    Operand,
    Pooling,
    Quantization,
    Softmax,
    Step,
    View,
    product,
    row_major,
    walk,
)
from optcompiler_cpu.attention import fused
from optcompiler_cpu.depthwise import is_direct
from optcompiler_cpu.depthwise_bytes import tail_of
from optcompiler_cpu.expressions import vectorisable
from optcompiler_cpu.halo import Halo
from optcompiler_cpu.isa import Isa
from optcompiler_cpu.weight_bytes import is_nibble_product, stays_nibbles
from optcompiler_cpu.weights import floats_of, is_compressed
from optcompiler_cpu.winograd import is_winograd


def legalize(lowered: Lowered, isa: Isa) -> None:
    """Rewrite `lowered.steps` in place, for kernels of `isa`."""
    _widened(lowered, isa)
    _vectors(lowered)
    _unsigned(lowered)
    _room_to_read(lowered, isa)
    _halos(lowered)
    _tails(lowered, isa)
    lowered.steps = fused(lowered.steps)


def _widened(lowered: Lowered, isa: Isa) -> None:
    """Weights of few bits become floats where the kernel transforms them ahead of time, and nibbles
    that meet integers become bytes where these are quicker."""
    for i, step in enumerate(lowered.steps):
        if isinstance(step, (Conv, MatMul)) and is_nibble_product(step) and not stays_nibbles(step):
            array = view_array(step.b.view)
            if isinstance(step, MatMul):
                array = array[(0,) * (array.ndim - 2)]
            buffer = Buffer(len(lowered.buffers), "INT8", array.size, "constant", "")
            buffer.array = np.ascontiguousarray(array, np.int8)
            lowered.buffers.append(buffer)
            view = View(buffer, array.shape, row_major(array.shape)).broadcast(step.b.view.shape)
            lowered.steps[i] = replace(step, b=replace(step.b, view=view))
        if isinstance(step, Conv) and is_compressed(step) and step.a.quantization is None:
            shape = step.b.view.shape
            buffer = Buffer(len(lowered.buffers), "FLOAT", product(shape), "constant", "")
            wide = replace(step, b=Operand(View(buffer, shape, row_major(shape))))
            if is_winograd(wide, isa):
                buffer.array = floats_of(step)
                lowered.buffers.append(buffer)
                lowered.steps[i] = wide


def _tails(lowered: Lowered, isa: Isa) -> None:
    """Depthwise convolutions of bytes whose last channels would fill half a vector or less: two."""
    steps: list[Step] = []
    for step in lowered.steps:
        tail = tail_of(step, isa) if isinstance(step, Conv) and is_direct(step) else 0
        if isinstance(step, Conv) and tail:
            whole = step.out.shape[1] - tail
            steps.append(_channels(step, 0, whole))
            step = replace(_channels(step, whole, tail), name=f"{step.name}_tail")
        steps.append(step)
    lowered.steps = steps


def _channels(step: Conv, first: int, count: int) -> Conv:
    """The depthwise convolution of some channels alone."""
    last = first + count

    def parameters(operand: Operand, axis: int) -> Operand:
        q = operand.quantization
        if q is not None and axis == 0 and q.scale.ndim:
            q = Quantization(q.scale[first:last], q.zero_point[first:last])
        return Operand(operand.view.slice(axis, first, count), q)

    def part(view: View) -> View:
        return view.slice(1, first, count)

    return replace(
        step, out=part(step.out), epilogue=map_views(step.epilogue, part), groups=count,
        a=parameters(step.a, 1), b=parameters(step.b, 0),
        bias=None if step.bias is None else step.bias[first:last],
    )  # fmt: skip


def _vectors(lowered: Lowered) -> None:
    """Vector kernels whose expressions hold what vectors cannot (64-bit integers, say) do without:
    a loop before computes the operand, a loop after the epilogue."""
    steps: list[Step] = []
    for step in lowered.steps:
        if not isinstance(step, (Conv, MatMul, Normalization, Pooling, Softmax)):
            steps.append(step)
            continue
        if isinstance(step, (Normalization, Softmax)) and not vectorisable(step.value):
            before = _result(lowered, "FLOAT", step.out.shape)
            steps.append(
                Loop(name=f"{step.name}_operand", nodes=step.nodes, out=before,
                     epilogue=cast(step.value, "FLOAT"))
            )  # fmt: skip
            step = replace(step, value=Load("FLOAT", before))
        if vectorisable(step.epilogue):
            steps.append(step)
            continue
        leaves = [e for e in walk(step.epilogue) if isinstance(e, Accumulator)]
        dtype = leaves[0].dtype if leaves else "FLOAT"
        between = _result(lowered, dtype, step.out.shape)

        def loaded(expr: Expr, view: View = between) -> Expr:
            return Load(view.dtype, view) if isinstance(expr, Accumulator) else expr

        steps.append(replace(step, out=between, epilogue=Accumulator(dtype)))
        steps.append(
            Loop(name=f"{step.name}_epilogue", nodes=step.nodes, out=step.out,
                 epilogue=rewrite(step.epilogue, loaded))
        )  # fmt: skip
    lowered.steps = steps


def _result(lowered: Lowered, dtype: str, shape: tuple[int, ...]) -> View:
    strides = channels_last(shape) if len(shape) == 4 else row_major(shape)
    return View(_buffer(lowered, dtype, product(shape)), shape, strides)


def _unsigned(lowered: Lowered) -> None:
    steps: list[Step] = []
    copies: dict[int, Buffer] = {}
    for step in lowered.steps:
        if isinstance(step, (Conv, MatMul)) and step.a.view.dtype == "INT8":
            source, quantization = step.a.view, step.a.quantization
            assert quantization is not None
            buffer = copies.get(source.buffer.index)
            if buffer is None:
                buffer = _buffer(lowered, "UINT8", source.buffer.elements)
                copies[source.buffer.index] = buffer
                flat = View(source.buffer, (buffer.elements,), (1,))
                raised: Expr = Call("INT32", "cast", (Load("INT8", flat),))
                raised = Call("INT32", "add", (raised, Const("INT32", 128)))
                steps.append(
                    Loop(name=f"{step.name}_unsigned", nodes=step.nodes,
                         out=View(buffer, flat.shape, (1,)),
                         epilogue=Call("UINT8", "cast", (raised,)))
                )  # fmt: skip
            zero = quantization.zero_point + np.int32(128)
            operand = Operand(
                replace(source, buffer=buffer), Quantization(quantization.scale, zero)
            )
            step = replace(step, a=operand)
        steps.append(step)
    lowered.steps = steps


def _room_to_read(lowered: Lowered, isa: Isa) -> None:
    """Integer kernels read whole steps of K, past the end of a row: only in memory of our own."""
    steps: list[Step] = []
    for step in lowered.steps:
        if (
            isinstance(step, (Conv, MatMul))
            and step.a.quantization is not None
            and step.a.view.buffer.kind != "temp"
        ):
            shape = step.a.view.shape
            if isinstance(step, Conv) and not any(step.pads):  # a halo makes a copy anyway
                steps.append(copy := _copy(lowered, step, channels_last(shape)))
                step = replace(step, a=replace(step.a, view=copy.out))
            elif isinstance(step, MatMul) and shape[-1] % _step_of(isa, step, shape):
                steps.append(copy := _copy(lowered, step, row_major(shape)))
                step = replace(step, a=replace(step.a, view=copy.out))
        steps.append(step)
    lowered.steps = steps


def _step_of(isa: Isa, step: MatMul, shape: tuple[int, ...]) -> int:
    """What K must be a multiple of for no read to pass its end."""
    block = step.b.quantization.block if step.b.quantization is not None else 0
    if block % 4:
        return shape[-1] + 1
    return isa.tiling(step.a.view.dtype, product(shape[:-1])).step


def _copy(lowered: Lowered, step: Conv | MatMul, strides: tuple[int, ...]) -> Loop:
    view = step.a.view
    buffer = _buffer(lowered, view.dtype, product(view.shape))
    out = View(buffer, view.shape, strides)
    return Loop(
        name=f"{step.name}_copy", nodes=step.nodes, out=out, epilogue=Load(view.dtype, view)
    )


def _buffer(lowered: Lowered, dtype: str, elements: int) -> Buffer:
    made = Buffer(len(lowered.buffers), dtype, elements, "temp", "")
    lowered.buffers.append(made)
    return made


def _halos(lowered: Lowered) -> None:
    while True:
        padded = [s for s in lowered.steps if isinstance(s, Conv) and any(s.pads)]
        if not padded:
            return
        buffer, shape = padded[0].a.view.buffer, padded[0].a.view.shape
        convs = [c for c in padded if c.a.view.buffer is buffer]
        if len({_fill(c) for c in convs}) == 1 and _pictures(lowered, buffer, shape):
            _grow(lowered, buffer, shape, convs, _fill(convs[0]))
        else:
            for conv in convs:
                _copy_with_halo(lowered, conv)


def _fill(conv: Conv) -> float:
    return 0.0 if conv.a.quantization is None else float(conv.a.quantization.zero_point)


def _pictures(lowered: Lowered, buffer: Buffer, shape: tuple[int, ...]) -> bool:
    """Whether every view of the buffer is the one whole picture."""
    dense = channels_last(shape)
    return buffer.kind == "temp" and all(
        view.shape == shape and view.strides == dense and view.offset == 0
        for step in lowered.steps
        for view in (step.out, *step.reads())
        if view.buffer is buffer
    )


def _grow(
    lowered: Lowered, buffer: Buffer, shape: tuple[int, ...], convs: list[Conv], fill: float
) -> None:
    n, c, h, w = shape
    pads = tuple(max(conv.pads[i] for conv in convs) for i in range(4))
    top, left, bottom, right = pads
    full = (n, c, h + top + bottom, w + left + right)
    padded = View(_buffer(lowered, buffer.dtype, product(full)), full, channels_last(full))
    inside = padded.slice(2, top, h).slice(3, left, w)

    def change(view: View) -> View:
        return inside if view.buffer is buffer else view

    first = next(i for i, s in enumerate(lowered.steps) if s.out.buffer is buffer)
    steps: list[Step] = []
    for i, step in enumerate(lowered.steps):
        if i == first:
            steps.append(_halo(f"{step.name}_halo", step.nodes, padded, pads, fill))
        if isinstance(step, Conv) and step in convs:
            t, l, b, r = step.pads
            around = padded.slice(2, top - t, h + t + b).slice(3, left - l, w + l + r)
            step = replace(step, pads=(0, 0, 0, 0), a=replace(step.a, view=around))
        steps.append(change_views(step, change))
    lowered.steps = steps


def _halo(
    name: str, nodes: tuple[str, ...], padded: View, pads: tuple[int, ...], fill: float
) -> Halo:
    value = Const(padded.dtype, fill if padded.dtype == "FLOAT" else int(fill))
    top, left, bottom, right = pads
    return Halo(name=name, nodes=nodes, out=padded, epilogue=value, pads=(top, left, bottom, right))


def _copy_with_halo(lowered: Lowered, conv: Conv) -> None:
    n, c, h, w = conv.a.view.shape
    top, left, bottom, right = conv.pads
    full = (n, c, h + top + bottom, w + left + right)
    padded = View(_buffer(lowered, conv.a.view.dtype, product(full)), full, channels_last(full))
    inside = padded.slice(2, top, h).slice(3, left, w)
    place = lowered.steps.index(conv)
    load = Load(conv.a.view.dtype, conv.a.view)
    lowered.steps[place : place + 1] = [
        _halo(f"{conv.name}_halo", conv.nodes, padded, conv.pads, _fill(conv)),
        Loop(name=f"{conv.name}_pad", nodes=conv.nodes, out=inside, epilogue=load),
        replace(conv, pads=(0, 0, 0, 0), a=replace(conv.a, view=padded)),
    ]


def change_views(step: Step, change: Callable[[View], View]) -> Step:
    """The step with every view replaced."""
    changes: dict[str, Any] = {
        "out": change(step.out),
        "epilogue": map_views(step.epilogue, change),
    }
    for name in ("value", "a", "b", "source", "data", "indices", "place"):
        part = getattr(step, name, None)
        if isinstance(part, Expr):
            changes[name] = map_views(part, change)
        elif isinstance(part, Operand):
            changes[name] = replace(part, view=change(part.view))
        elif isinstance(part, View):
            changes[name] = change(part)
    return replace(step, **changes)
