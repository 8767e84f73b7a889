"""The state of lowering one program: what each value is so far, and the emission of steps.

A value is an expression over its own shape. It is `materialised` when that expression is one load;
cheap expressions (dequantisation, casts, views of them) stay expressions and are inlined where they
are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from optcompiler.lowering.expressions import REAL, cast
from optcompiler.lowering.flatten import Flat, site_of
from optcompiler.lowering.ir import (
    Buffer,
    BufferKind,
    Call,
    Const,
    Dequantize,
    Expr,
    Load,
    Loop,
    Lowered,
    PortBuffer,
    Quantize,
    Step,
    View,
    loads,
    product,
    row_major,
)
from optcompiler.lowering.regions import readers


def rewrite(expr: Expr, leaf: Callable[[Expr], Expr], memo: dict[int, Expr] | None = None) -> Expr:
    """The expression with every leaf replaced; sharing is kept."""
    memo = {} if memo is None else memo
    known = memo.get(id(expr))
    if known is not None:
        return known
    match expr:
        case Call():
            new: Expr = replace(expr, args=tuple(rewrite(a, leaf, memo) for a in expr.args))
        case Quantize() | Dequantize():
            new = replace(
                expr,
                arg=rewrite(expr.arg, leaf, memo),
                scale=rewrite(expr.scale, leaf, memo),
                zero_point=rewrite(expr.zero_point, leaf, memo),
            )
        case _:
            new = leaf(expr)
    memo[id(expr)] = new
    return new


def map_views(expr: Expr, change: Callable[[View], View]) -> Expr:
    return rewrite(expr, lambda e: replace(e, view=change(e.view)) if isinstance(e, Load) else e)


def reshaped(expr: Expr, shape: tuple[int, ...]) -> Expr | None:
    """The expression over another shape of the same elements; None where no view can say it."""
    if any(load.view.reshape(shape) is None for load in loads(expr)):
        return None
    return map_views(expr, lambda v: v.reshape(shape) or v)


class Builder:
    """Lowers `flat` value by value; `lowered` grows in emission order."""

    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        self.lowered = Lowered((), ())
        self.exprs: dict[ir.Value, Expr] = {}
        self.order = {node: i for i, node in enumerate(flat.nodes)}
        self.outputs: dict[ir.Value, Buffer] = {}
        self._constants: dict[int, Buffer] = {}
        self._kept: list[np.ndarray] = []
        graph = flat.program.graph
        self.lowered.inputs = tuple(self._port(v, "input") for v in graph.inputs)
        for value, port in zip(graph.inputs, self.lowered.inputs, strict=True):
            self.exprs[value] = Load(port.dtype, whole(port.buffer, port.shape))
        self.lowered.outputs = tuple(self._port(v, "output") for v in graph.outputs)
        for value, port in zip(graph.outputs, self.lowered.outputs, strict=True):
            self.outputs.setdefault(value, port.buffer)

    def _port(self, value: ir.Value, kind: BufferKind) -> PortBuffer:
        shape, dtype = self.flat.shapes[value], self.flat.dtype(value)
        name = value.name or ""
        return PortBuffer(name, dtype, shape, self.buffer(dtype, product(shape), kind, name))

    # -- buffers ----------------------------------------------------------------------------

    def buffer(
        self, dtype: str, elements: int, kind: BufferKind = "temp", source: str = ""
    ) -> Buffer:
        made = Buffer(len(self.lowered.buffers), dtype, elements, kind, source)
        self.lowered.buffers.append(made)
        return made

    def constant(self, array: np.ndarray, source: str = "") -> View:
        """A view of a constant buffer; the same array gives the same buffer."""
        known = self._constants.get(id(array))
        if known is None:
            dtype = ir.DataType.from_numpy(array.dtype).name
            known = self.buffer(dtype, array.size, "constant", source)
            repeated = array.ndim > 0 and not any(array.strides)
            known.array = array if repeated else np.ascontiguousarray(array)
            self._constants[id(array)] = known
            self._kept.append(array)
        return whole(known, array.shape)

    # -- values -----------------------------------------------------------------------------

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        return self.flat.shapes[value]

    def array(self, value: ir.Value | None) -> np.ndarray | None:
        """The contents of a constant (a dequantised one in floats), or None."""
        if value is None:
            return None
        known = self.flat.constants.get(value)
        if known is None and value in self.exprs:
            known = evaluate_constant(self.exprs[value], self.shape(value))
            if known is not None:
                self.flat.constants[value] = known
        if known is None and value in self.flat.stored:
            known = self.flat.constants[value] = self.flat.stored[value].floats()
        return known

    def expr(self, value: ir.Value, shape: tuple[int, ...] | None = None) -> Expr:
        """The value as an expression, broadcast to `shape`."""
        if value not in self.exprs:
            array = self.array(value)
            assert array is not None
            if array.size == 1:
                dtype = ir.DataType.from_numpy(array.dtype).name
                item = array.reshape(-1)[0].item()
                self.exprs[value] = Const(dtype, item if dtype in REAL else int(item))
            else:
                view = self.constant(array, value.name or "")
                self.exprs[value] = Load(view.dtype, view)
        expr = self.exprs[value]
        if shape is None or shape == self.shape(value):
            return expr
        return map_views(expr, lambda v: v.broadcast(shape))

    def view(self, value: ir.Value, node: ir.Node) -> View:
        """The value in memory, materialising it where it is not."""
        expr = self.expr(value)
        if isinstance(expr, Load):
            return expr.view
        shape = self.shape(value)
        view = self.store_plain(expr, shape, self.strides_like(expr, shape), node)
        self.exprs[value] = Load(view.dtype, view)
        return view

    def store_plain(
        self, expr: Expr, shape: tuple[int, ...], strides: tuple[int, ...], node: ir.Node
    ) -> View:
        """Emit a loop that writes `expr` into a new temporary of dense `strides`."""
        out = View(self.buffer(expr.dtype, product(shape)), shape, strides)
        self.emit(Loop, (node,), out=out, epilogue=expr)
        return out

    def strides_like(self, expr: Expr, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Dense strides in the memory order of the first operand that repeats nothing."""
        for load in loads(expr):
            strides = load.view.strides
            if all(s > 0 or n == 1 for s, n in zip(strides, shape, strict=True)):
                order = sorted(
                    range(len(shape)),
                    key=lambda a: (shape[a] != 1, -strides[a] if shape[a] != 1 else 0),
                )
                inner = row_major(tuple(shape[a] for a in order))
                dense = [0] * len(shape)
                for place, axis in enumerate(order):
                    dense[axis] = inner[place]
                if tuple(dense) == row_major(shape) or load.view.buffer.kind != "constant":
                    return self._canonical(tuple(dense), shape)
        return row_major(shape)

    @staticmethod
    def _canonical(strides: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        """The spelling by `row_major` or `channels_last` where axes of length 1 alone differ."""
        candidates = [row_major(shape), *([channels_last(shape)] if len(shape) == 4 else [])]
        for known in candidates:
            if all(a == b or n == 1 for a, b, n in zip(strides, known, shape, strict=True)):
                return known
        return strides

    # -- steps ------------------------------------------------------------------------------

    def emit(
        self,
        kind: type[Step],
        nodes: Sequence[ir.Node],
        *,
        out: View,
        epilogue: Expr,
        **fields: object,
    ) -> None:
        """Append a step; the epilogue is cast where its type differs from the output's.

        What writes no elements is no step.
        """
        if not out.elements:
            return
        name = f"{len(self.lowered.steps)}_{kind.__name__.lower()}"
        sites = tuple(dict.fromkeys(site_of(n) for n in nodes))
        make: Callable[..., Step] = kind
        self.lowered.steps.append(
            make(name=name, nodes=sites, out=out, epilogue=cast(epilogue, out.dtype), **fields)
        )

    def destination(self, value: ir.Value, strides: tuple[int, ...] | None) -> View:
        """Memory for a value that a step is about to write: a graph output's own, or a temporary.

        With `strides` None the order is the one that a following Transpose makes contiguous.
        """
        shape, dtype = self.shape(value), self.flat.dtype(value)
        output = self.outputs.get(value)
        if output is not None and (strides is None or strides == row_major(shape)):
            return whole(output, shape)
        if strides is None:
            strides = self._transposed_strides(value)
        buffer = self.buffer(dtype, product(shape), "temp", value.name or "")
        return View(buffer, shape, strides)

    def _transposed_strides(self, value: ir.Value) -> tuple[int, ...]:
        shape = self.shape(value)
        users = list(readers(value))
        if len(users) == 1 and users[0].op_type == "Transpose":
            permutation = users[0].attributes.get("perm")
            order = tuple(permutation.as_ints()) if permutation is not None else ()
            if order and order[-1] == len(shape) - 1:
                inner = row_major(tuple(shape[i] for i in order))
                strides = [0] * len(shape)
                for place, axis in enumerate(order):
                    strides[axis] = inner[place]
                return tuple(strides)
        return row_major(shape)

    def finish_outputs(self) -> None:
        """Copy into the graph's outputs what no step has written there."""
        graph = self.flat.program.graph
        for value, port in zip(graph.outputs, self.lowered.outputs, strict=True):
            expr = self.expr(value)
            if isinstance(expr, Load) and expr.view.buffer is port.buffer:
                continue
            node = value.producer()
            out = whole(port.buffer, port.shape)
            self.emit(Loop, (node,) if node is not None else (), out=out, epilogue=expr)


def whole(buffer: Buffer, shape: tuple[int, ...]) -> View:
    return View(buffer, shape, row_major(shape))


def channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of logical [N, C, H, W] stored as [N, H, W, C]."""
    n, h, w, c = row_major((shape[0], shape[2], shape[3], shape[1]))
    return (n, c, h, w)


def is_channels_last(view: View) -> bool:
    """Whether logical [N, C, H, W] has adjacent channels and pixels in row order."""
    c, w = view.shape[1], view.shape[3]
    return (view.strides[1] == 1 or c == 1) and (view.strides[3] >= c or w == 1)


def evaluate_constant(expr: Expr, shape: tuple[int, ...]) -> np.ndarray | None:
    """Contents of an expression of constants and dequantisation, or None for any other."""

    def contents(e: Expr) -> np.ndarray | None:
        match e:
            case Const():
                return np.array(e.value, ir.DataType[e.dtype].numpy())
            case Load() if e.view.buffer.array is not None:
                return view_array(e.view)
            case Dequantize():
                parts = [contents(e.arg), contents(e.scale), contents(e.zero_point)]
                if any(p is None for p in parts):
                    return None
                q, scale, zero = parts
                assert q is not None
                assert scale is not None
                assert zero is not None
                levels = q.astype(np.int32) - zero.astype(np.int32)
                return levels.astype(np.float32) * scale.astype(np.float32)
            case _:
                return None

    result = contents(expr)
    return None if result is None else np.ascontiguousarray(np.broadcast_to(result, shape))


def view_array(view: View) -> np.ndarray:
    """A numpy view of a constant's elements."""
    array = view.buffer.array
    assert array is not None
    flat = array.reshape(-1)[view.offset :]
    # a number repeated without copies has one element in memory, whatever its size
    strides = tuple(s * flat.strides[0] for s in view.strides)
    return np.lib.stride_tricks.as_strided(flat, view.shape, strides, writeable=False)
