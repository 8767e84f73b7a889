"""The driver of lowering: every node in order, regions of pointwise nodes as one expression."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.lowering.build import (
    Builder,
    channels_last,
    map_views,
    rewrite,
)
from optcompiler.lowering.covered import COVERED
from optcompiler.lowering.expand import Decomposition, Facts
from optcompiler.lowering.expressions import POINTWISE, REAL, SMALL, call, cast, clip
from optcompiler.lowering.flatten import flatten, site_of
from optcompiler.lowering.ir import (
    Call,
    Const,
    Dequantize,
    Expr,
    Load,
    Loop,
    Lowered,
    Quantize,
    row_major,
)
from optcompiler.lowering.regions import SAME_ORDER, absorbed, following
from optcompiler.program import Program

Rule = Callable[["Lowering", ir.Node], None]

UNROUNDED = frozenset({
    "QuantizeLinear", "DequantizeLinear", "Cast", "Identity", "Dropout", "BitCast",
})  # fmt: skip
"""Operators of small floats that are not arithmetic: the others compute in FLOAT and round."""

IMAGE_OPS = frozenset({"Conv", "MaxPool", "AveragePool", "GlobalAveragePool"})
"""Operators that read channels-last memory faster."""


class Lowering(Builder):
    """Drives the rules: every node in order, a region's other operands before its root."""

    def __init__(
        self,
        program: Program,
        rules: Mapping[str, Rule],
        values: bool,
        decompositions: Mapping[str, Decomposition],
        computed_integers: bool = False,
        narrow: frozenset[str] = frozenset(),
        stored: frozenset[str] = frozenset(),
    ) -> None:
        self.rules = rules
        self.computed_integers = computed_integers
        self.narrow = narrow
        self.stored = stored
        super().__init__(flatten(program, values, self.has_rule, decompositions, stored))
        self.done: set[ir.Node] = set()

    def has_rule(self, node: ir.Node, facts: Facts) -> bool:
        """Whether the node is lowered as it is."""
        if node.domain != "" or not (node.op_type in self.rules or pointwise_op(node)):
            return False
        covered = COVERED.get(node.op_type)
        return covered is None or covered(node, facts)

    def run(self) -> Lowered:
        for node in self.flat.nodes:
            self.lower_node(node)
        self.finish_outputs()
        return self.lowered

    def lower_node(self, node: ir.Node) -> None:
        if node in self.done:
            return
        for value in node.inputs:
            self.ensure(value)
        if node in self.done:  # it became part of the step that computes an operand
            return
        self.done.add(node)
        rule = self.rules.get(node.op_type) if node.domain == "" else None
        if rule is None and pointwise_op(node):
            rule = lower_pointwise
        if rule is None:
            raise UnsupportedOperatorError(
                f"operator {node.domain or 'ai.onnx'}::{node.op_type} of node {site_of(node)!r} "
                f"has no lowered form; use target onnxruntime, or rewrite the operator."
            )
        rule(self, node)

    def ensure(self, value: ir.Value | None) -> None:
        if value is None or value in self.exprs or self.flat.is_constant(value):
            return
        producer = value.producer()
        if producer is not None:
            self.lower_node(producer)

    def fused(
        self,
        node: ir.Node,
        epilogue: Expr,
        emit: Callable[[tuple[ir.Node, ...], ir.Value, Expr], None],
        reshapes: bool = False,
    ) -> None:
        """Close the region that begins at `node` and let `emit` write its last value.

        `epilogue` is the node's own first output in terms of the step's accumulator. With
        `reshapes`, the last value may have another shape of the same elements; what `emit` gets is
        over the shape of the node's output all the same.
        """

        def free(n: ir.Node) -> bool:
            return n not in self.done and pointwise_op(n)

        nodes, last = following(self, node, free, reshapes)
        if nodes:
            nodes += absorbed(self, node, nodes, free)
            nodes.sort(key=self.order.__getitem__)
        self.done.update(nodes)
        own = {node, *nodes}
        for inner in nodes:
            for value in inner.inputs:
                if value is not None and value.producer() not in own:
                    self.ensure(value)
        shape = self.shape(node.outputs[0])
        local: dict[ir.Value, Expr] = {node.outputs[0]: epilogue}
        for inner in nodes:
            local[inner.outputs[0]] = self._inside(inner, shape, local)
        emit((node, *nodes), last, local[last])

    def _inside(
        self, node: ir.Node, space: tuple[int, ...], local: Mapping[ir.Value, Expr]
    ) -> Expr:
        """A region's node as an expression over the `space` of its step."""
        if node.op_type in SAME_ORDER:
            assert node.inputs[0] is not None
            return local[node.inputs[0]]
        shape = self.shape(node.outputs[0])
        expr = self.pointwise(node, shape, local)
        if shape == space:
            return expr

        def over(leaf: Expr) -> Expr:
            if not isinstance(leaf, Load):
                return leaf
            view = leaf.view.reshape(space)
            if view is None:
                copy = self.store_plain(leaf, shape, row_major(shape), node)
                view = copy.reshape(space)
            assert view is not None
            return Load(view.dtype, view)

        done = {id(local[v]): local[v] for v in node.inputs if v is not None and v in local}
        return rewrite(expr, over, done)

    def pointwise(
        self, node: ir.Node, shape: tuple[int, ...], local: Mapping[ir.Value, Expr]
    ) -> Expr:
        """A pointwise node's output as an expression over `shape`."""
        args: list[Expr | None] = [
            None if v is None else local[v] if v in local else self.expr(v, shape)
            for v in node.inputs
        ]
        attributes = self.flat.attributes(node)
        dtype = self.flat.dtype(node.outputs[0])
        first = args[0]
        assert first is not None
        if dtype in SMALL and node.op_type not in UNROUNDED:
            args = [a if a is None or a.dtype == "BOOL" else cast(a, "FLOAT") for a in args]
            first = args[0]
            assert first is not None
            return cast(self._operation(node, args, attributes), dtype)
        match node.op_type:
            case "QuantizeLinear" | "DequantizeLinear":
                scale, zero = self._quantisers(node, shape)
                scale = cast(scale, "FLOAT")
                if node.op_type == "DequantizeLinear":
                    return cast(Dequantize("FLOAT", first, scale, zero), dtype)
                if dtype in REAL:
                    levels = call("div", cast(first, "FLOAT"), scale)
                    return cast(call("add", levels, cast(zero, "FLOAT")), dtype)
                return Quantize(dtype, cast(first, "FLOAT"), scale, zero)
            case "Cast":
                if not attributes.get("saturate", 1) and dtype.startswith("FLOAT8"):
                    return Call(dtype, "open", (first,))
                return cast(first, dtype)
            case "BitCast":
                return Call(dtype, "bits", (first,))
            case "Identity" | "Dropout":
                return first
            case "BatchNormalization":
                return self._batch_norm(node, first, shape, attributes)
            case _:
                return self._operation(node, args, attributes)

    def _operation(
        self, node: ir.Node, args: Sequence[Expr | None], attributes: Mapping[str, Any]
    ) -> Expr:
        if node.op_type == "Clip":
            assert args[0] is not None
            low, high = (*args[1:], None, None)[:2]
            return clip(args[0], low, high)
        return POINTWISE[node.op_type]([a for a in args if a is not None], attributes)

    def _quantisers(self, node: ir.Node, shape: tuple[int, ...]) -> tuple[Expr, Expr]:
        attributes = self.flat.attributes(node)
        if attributes.get("block_size"):
            raise UnsupportedOperatorError(
                f"{node.op_type} {site_of(node)!r}: blocked quantisation (block_size="
                f"{attributes['block_size']}) has no lowered form; quantise per channel."
            )
        axis = attributes.get("axis", 1)

        def operand(value: ir.Value) -> Expr:
            size = self.shape(value)
            expr = self.expr(value)
            if size in ((), (1,)):
                return map_views(expr, lambda v: (v.reshape(()) or v).broadcast(shape))
            where = axis % len(shape)
            wide = (1,) * where + size + (1,) * (len(shape) - where - 1)
            return map_views(expr, lambda v: (v.reshape(wide) or v).broadcast(shape))

        scale_value = node.inputs[1]
        assert scale_value is not None
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        quantised = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
        assert quantised is not None
        dtype = self.flat.dtype(quantised)
        return operand(scale_value), Const(dtype, 0) if zero is None else operand(zero)

    def _batch_norm(
        self, node: ir.Node, x: Expr, shape: tuple[int, ...], attributes: Mapping[str, Any]
    ) -> Expr:
        scale, bias, mean, variance = (self.array(v) for v in node.inputs[1:5])
        if scale is None or bias is None or mean is None or variance is None:
            raise UnsupportedOperatorError(
                f"BatchNormalization {site_of(node)!r} has parameters computed at run time; only "
                f"constant ones have a lowered form."
            )
        factor = scale / np.sqrt(variance + np.float32(attributes["epsilon"]))
        wide = (1, -1) + (1,) * (len(shape) - 2)
        parts = (factor, bias - mean * factor)
        a, b = (
            Load("FLOAT", self.constant(p.astype(np.float32).reshape(wide)).broadcast(shape))
            for p in parts
        )
        return call("add", call("mul", x, a), b)


def pointwise_op(node: ir.Node) -> bool:
    """Whether the node is an expression of its operands at one index."""
    if node.domain != "":
        return False
    if node.op_type == "Dropout":
        return len(node.outputs) == 1 and (len(node.inputs) < 3 or node.inputs[2] is None)
    return node.op_type in POINTWISE or node.op_type in {
        "QuantizeLinear", "DequantizeLinear", "Cast", "Identity", "BatchNormalization",
        "Clip", "BitCast",
    }  # fmt: skip


def lower_pointwise(low: Lowering, node: ir.Node) -> None:
    out = node.outputs[0]
    shape = low.shape(out)
    first = low.pointwise(node, shape, {})
    if node.op_type in {"DequantizeLinear", "Identity", "Dropout", "Cast"}:
        low.exprs[out] = first
        return

    def emit(nodes: tuple[ir.Node, ...], last: ir.Value, epilogue: Expr) -> None:
        strides = low.strides_like(epilogue, shape)
        if len(shape) == 4 and strides == row_major(shape) and feeds_image_op(low, last):
            strides = channels_last(shape)
        view = low.destination(last, strides)
        low.emit(Loop, nodes, out=view, epilogue=epilogue)
        low.exprs[last] = Load(view.dtype, view)

    low.fused(node, first, emit)


def feeds_image_op(low: Lowering, value: ir.Value) -> bool:
    for use in value.uses():
        if use.node.op_type in IMAGE_OPS and use.idx == 0:
            return True
        quantiser = use.node.op_type in {"QuantizeLinear", "DequantizeLinear"} and use.idx == 0
        if quantiser and feeds_image_op(low, use.node.outputs[0]):
            return True
    return False
