"""Operators that the ONNX specification defines by other operators, as functions to expand."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir

from optcompiler.ops.spec import TypeLookup


def schema_function(node: ir.Node, version: int | None, type_of: TypeLookup) -> ir.Function | None:
    """The body that the schema of the node's operator has, or None.

    `version` is that of the node's operator set, None for the newest. Bodies that depend on the
    types of the operands (SequenceMap, FlexAttention) are built for those of this node.
    """
    try:
        found = onnx.defs.get_schema(
            node.op_type, version or onnx.defs.onnx_opset_version(), node.domain
        )
    except onnx.defs.SchemaError:
        return None
    schema: Any = found  # the stubs of onnx lack the functions of a schema
    data: bytes = b""
    if schema.has_function:
        data = schema.get_function_with_opset_version(max(schema.function_opset_versions))
    elif schema.has_context_dependent_function:
        types = [_type(value, type_of).SerializeToString() for value in node.inputs]
        data = schema.get_context_dependent_function_with_opset_version(
            max(schema.context_dependent_function_opset_versions),
            ir.to_proto(node).SerializeToString(),
            types,
        )
    if not data:
        return None
    return ir.from_proto(onnx.FunctionProto.FromString(data))


def _type(value: ir.Value | None, type_of: TypeLookup) -> onnx.TypeProto:
    dtype = type_of(value)
    if value is None or dtype is None:
        return onnx.TypeProto()
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return ir.serde.serialize_type(value.type)
    rank = None if value.shape is None else [None] * len(value.shape)
    return onnx.helper.make_tensor_type_proto(int(dtype), rank)
