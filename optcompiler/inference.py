"""Shape inference whose cost is bounded by the file, whatever sizes the file speaks of."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import onnx

_OF_FOLLOWING = re.compile(r"Invalid rank for (Add|Sub|Mul) broadcasting: \(\d+\) vs \(\d+\)")

LONGEST_FOLLOWED = 1 << 16
"""Elements of a vector whose values inference follows."""


def infer(model: onnx.ModelProto, *, strict: bool = True) -> onnx.ModelProto:
    """`model` with inferred types and shapes.

    With `strict`, raises what onnx raises for a contradiction and for what it cannot infer.

    Following values (onnx's data propagation) finds the shapes that a program computes. onnx keeps
    a protobuf for each element of every vector that it follows, whatever the vector's length or
    type, so values are followed only where shapes are missing without, and no vector is long. It
    also takes whatever it follows to be a vector: a product of a column and a row of other lengths
    is then an error of its own and not of the program, which it leaves out.
    """
    plain = onnx.shape_inference.infer_shapes(
        model, check_type=strict, strict_mode=strict, data_prop=False
    )
    if _settled(plain) or _follows_long_vector(plain.graph, {}):
        return plain
    try:
        return onnx.shape_inference.infer_shapes(
            model, check_type=strict, strict_mode=strict, data_prop=True
        )
    except onnx.shape_inference.InferenceError as error:
        if not _OF_FOLLOWING.search(str(error)):
            raise
        return onnx.shape_inference.infer_shapes(
            model, check_type=strict, strict_mode=False, data_prop=True
        )


def _settled(model: onnx.ModelProto) -> bool:
    """Whether every result of the main graph has a type, and every tensor a static shape."""
    graph = model.graph
    static = {v.name for v in (*graph.value_info, *graph.output) if _is_static(v.type)}
    return all(name in static for node in graph.node for name in node.output if name) and not any(
        attribute.HasField("g") for node in graph.node for attribute in node.attribute
    )


def _is_static(type_: onnx.TypeProto) -> bool:
    if not type_.HasField("tensor_type"):
        return type_.WhichOneof("value") is not None
    shape = type_.tensor_type
    return shape.HasField("shape") and all(d.HasField("dim_value") for d in shape.shape.dim)


def _follows_long_vector(graph: onnx.GraphProto, around: Mapping[str, int]) -> bool:
    """Whether an operator that passes values on reads a vector longer than `LONGEST_FOLLOWED`.

    `around` holds the lengths of the long vectors of the graphs around this one.
    """
    long = dict(around)
    for value in (*graph.input, *graph.output, *graph.value_info):
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 1 and dims[0].dim_value > LONGEST_FOLLOWED:
            long[value.name] = dims[0].dim_value
    for tensor in graph.initializer:
        if len(tensor.dims) == 1 and tensor.dims[0] > LONGEST_FOLLOWED:
            long[tensor.name] = tensor.dims[0]
    for node in graph.node:
        if _passes_values_on(node.op_type, node.domain) and any(n in long for n in node.input):
            return True
        for attribute in node.attribute:
            if attribute.HasField("g") and _follows_long_vector(attribute.g, long):
                return True
    return False


@functools.cache
def _passes_values_on(op_type: str, domain: str) -> bool:
    if not onnx.defs.has(op_type, domain):
        return False
    return bool(onnx.defs.get_schema(op_type, domain).has_data_propagation_function)
