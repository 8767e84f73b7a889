"""QuantizeLinear/DequantizeLinear pairs: finding them, making them, following values across."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optcompiler.program import Program, constant, static_shape

KEEPS_LEVELS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators whose output is their first input's values in another order."""

PICKS_LEVELS = frozenset({"Gather", "MaxPool", "Slice", "Split"})
"""Operators whose output is some of their first input's values."""


def laid_out(value: ir.Value | None) -> np.ndarray | None:
    """The contents of a weight: of an initializer, or of one that `KEEPS_LEVELS` rearrange.

    An embedding table that is also the transposed matrix of a language model's head stays one
    initializer, because folding the Transpose would store it twice. Copies only what no view of
    numpy's can say. None where the value depends on an input.
    """
    array = constant(value)
    node = value.producer() if value is not None else None
    if array is not None or node is None or node.domain != "" or node.op_type not in KEEPS_LEVELS:
        return array
    array = laid_out(node.inputs[0])
    if array is None:
        return None
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", range(array.ndim)[::-1])
        return array.transpose(tuple(order))
    shape = static_shape(node.outputs[0])
    return None if shape is None else array.reshape(shape)


def table_of(value: ir.Value) -> ir.Value:
    """The initializer that `laid_out` reads."""
    node = value.producer()
    source = node.inputs[0] if node is not None else None
    return value if source is None else table_of(source)


@dataclass(frozen=True)
class Pair:
    """A value, its quantiser and its dequantiser."""

    source: ir.Value
    quantize: ir.Node
    dequantize: ir.Node

    @property
    def value(self) -> ir.Value:
        return self.dequantize.outputs[0]

    @property
    def scale(self) -> ir.Value:
        scale = self.quantize.inputs[1]
        assert scale is not None
        return scale

    @property
    def dtype(self) -> str:
        """The ONNX name of a level's type."""
        kind = self.quantize.outputs[0].dtype
        return "UINT8" if kind is None else kind.name

    @property
    def zero_point(self) -> ir.Value | None:
        return self.quantize.inputs[2] if len(self.quantize.inputs) > 2 else None


def pair_of(value: ir.Value, axis: int | None = None) -> Pair | None:
    """The pair that already quantises `value` (per tensor, or per index of `axis`), if any."""
    for quantize in value.consumers():
        if quantize.op_type != "QuantizeLinear" or quantize.inputs[0] is not value:
            continue
        if quantize.attributes.get_int("block_size", 0):
            continue
        scale = quantize.inputs[1]
        per_tensor = scale is not None and scale.shape is not None and len(scale.shape) == 0
        if per_tensor != (axis is None):
            continue
        if axis is not None and quantize.attributes.get_int("axis", 1) != axis:
            continue
        for dequantize in quantize.outputs[0].consumers():
            if dequantize.op_type == "DequantizeLinear":
                return Pair(value, quantize, dequantize)
    return None


def dequantizer(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes `value`, if one does."""
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == "DequantizeLinear" else None


def quantized_source(value: ir.Value | None) -> ir.Value | None:
    """The float value that `value` is the quantised and dequantised form of, if it is one."""
    dequantize = dequantizer(value)
    levels = dequantize.inputs[0] if dequantize is not None else None
    quantize = levels.producer() if levels is not None else None
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return None
    return quantize.inputs[0]


class Editor:
    """Adds pairs to one program; reads its names once, so it must be its only editor."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph
        self.nodes: dict[str, ir.Node] = {}
        self.values: dict[str, ir.Value] = {str(v.name): v for v in self.graph.inputs}
        self.values |= {name: v for name, v in self.graph.initializers.items()}
        for node in self.graph:
            self.nodes[str(node.name)] = node
            self.values |= {str(v.name): v for v in node.outputs}

    def parameters(
        self, stem: str, scale: np.ndarray, zero_point: np.ndarray, dtype: str
    ) -> tuple[ir.Value, ir.Value]:
        """Initializers `<stem>_scale` (float32) and `<stem>_zero_point` (`dtype`), of one shape."""
        type_ = ir.DataType[dtype]
        zero = ir.tensor(zero_point.astype(type_.numpy()), dtype=type_)
        return (
            self._weight(f"{stem}_scale", ir.tensor(np.asarray(scale, np.float32))),
            self._weight(f"{stem}_zero_point", zero),
        )

    def insert_pair(
        self, value: ir.Value, scale: ir.Value, zero_point: ir.Value, axis: int | None = None,
        block_size: int = 0,
    ) -> Pair:  # fmt: skip
        """Add `value -> QuantizeLinear -> DequantizeLinear` and redirect nobody.

        The nodes stand right after the producer, or before the first reader of an input or weight.
        """
        attributes = {} if axis is None else {"axis": axis}
        attributes |= {"block_size": block_size} if block_size else {}
        operands = [value, scale, zero_point]
        quantize = self._node("QuantizeLinear", operands, attributes, value, "quantize")
        levels = quantize.outputs[0]
        levels.type, levels.shape = zero_point.type, value.shape
        operands = [levels, scale, zero_point]
        dequantize = self._node("DequantizeLinear", operands, attributes, value, "dequantize")
        result = dequantize.outputs[0]
        result.type, result.shape = value.type, value.shape
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, [quantize, dequantize])
        else:
            consumers = set(value.consumers())
            first = next((n for n in self.graph if n in consumers), self.graph[0])
            self.graph.insert_before(first, [quantize, dequantize])
        return Pair(value, quantize, dequantize)

    def _node(
        self,
        op_type: str,
        operands: list[ir.Value],
        attributes: dict[str, int],
        value: ir.Value,
        verb: str,
    ) -> ir.Node:
        node = ir.node(op_type, operands, attributes, name=self._fresh(f"{value.name}_{verb}"))
        output = node.outputs[0]
        self.nodes[str(node.name)] = node
        output.name = self._fresh(f"{value.name}_{verb}d")
        self.values[output.name] = output
        return node

    def _weight(self, stem: str, tensor: ir.TensorProtocol) -> ir.Value:
        name = tensor.name = self._fresh(stem)
        shape = tensor.numpy().shape
        value = ir.val(name, dtype=tensor.dtype, shape=shape, const_value=tensor)
        self.graph.register_initializer(value)
        self.values[name] = value
        return value

    def _fresh(self, stem: str) -> str:
        taken = (self.nodes, self.values)
        name, count = stem, 0
        while any(name in t for t in taken):
            count += 1
            name = f"{stem}_{count}"
        return name


def readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Nodes of the main graph that read `value`, with the operand's index; quantisers left out."""
    for use in tuple(value.uses()):
        if use.node.op_type != "QuantizeLinear" and use.node.graph is value.graph:
            yield use.node, use.idx
