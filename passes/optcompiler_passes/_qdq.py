"""QuantizeLinear/DequantizeLinear pairs: finding them, making them, following values across."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optcompiler.program import Program

KEEPS_LEVELS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators whose output is their first input's values in another order."""

PICKS_LEVELS = frozenset({"Gather", "MaxPool", "Slice", "Split"})
"""Operators whose output is some of their first input's values."""


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
    def zero_point(self) -> ir.Value | None:
        return self.quantize.inputs[2] if len(self.quantize.inputs) > 2 else None


def pair_of(value: ir.Value, axis: int | None = None) -> Pair | None:
    """The pair that already quantises `value` (per tensor, or per index of `axis`), if any."""
    for quantize in value.consumers():
        if quantize.op_type != "QuantizeLinear" or quantize.inputs[0] is not value:
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


def add_parameters(
    program: Program, stem: str, scale: np.ndarray, zero_point: np.ndarray, dtype: str
) -> tuple[ir.Value, ir.Value]:
    """Initializers `<stem>_scale` (float32) and `<stem>_zero_point` (`dtype`), of one shape."""
    type_ = ir.DataType[dtype]
    zero = ir.tensor(zero_point.astype(type_.numpy()), dtype=type_)
    return (
        program.add_weight(f"{stem}_scale", np.asarray(scale, np.float32)),
        program.add_weight(f"{stem}_zero_point", zero),
    )


def insert_pair(
    program: Program,
    value: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value,
    axis: int | None = None,
) -> Pair:
    """Add `value -> QuantizeLinear -> DequantizeLinear` and redirect nobody.

    The nodes stand right after the producer, or before the first reader of an input or weight.
    """
    attributes = {} if axis is None else {"axis": axis}
    quantize = ir.node(
        "QuantizeLinear",
        [value, scale, zero_point],
        attributes,
        name=program.fresh_name(f"{value.name}_quantize"),
    )
    levels = quantize.outputs[0]
    levels.name = program.fresh_name(f"{value.name}_quantized")
    levels.type, levels.shape = zero_point.type, value.shape
    dequantize = ir.node(
        "DequantizeLinear",
        [levels, scale, zero_point],
        attributes,
        name=program.fresh_name(f"{value.name}_dequantize"),
    )
    result = dequantize.outputs[0]
    result.name = program.fresh_name(f"{value.name}_dequantized")
    result.type, result.shape = value.type, value.shape
    producer = value.producer()
    if producer is not None:
        program.graph.insert_after(producer, [quantize, dequantize])
    else:
        readers = set(value.consumers())
        first = next((n for n in program.graph if n in readers), program.graph[0])
        program.graph.insert_before(first, [quantize, dequantize])
    return Pair(value, quantize, dequantize)


def readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Nodes of the main graph that read `value`, with the operand's index; quantisers left out."""
    for use in tuple(value.uses()):
        if use.node.op_type != "QuantizeLinear" and use.node.graph is value.graph:
            yield use.node, use.idx
