"""What lowering starts from: functions expanded, constants known, every shape static."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common as ir_passes

from optcompiler.errors import InputError, UnsupportedOperatorError
from optcompiler.lowering.expand import Decomposition, Facts, expansion, infer, splice
from optcompiler.lowering.ir import ITEM_SIZES, product
from optcompiler.lowering.stored import Stored, dequantised, stored_by
from optcompiler.ops.spec import attributes_of
from optcompiler.program import Program, static_shape

KERNEL_BYTES = ("INT8", "UINT8")
KERNEL_INTEGERS = (np.dtype(np.int8), np.dtype(np.uint8), np.dtype(np.int32))
"""Types whose constants stay integers, for a contraction or the expression that reads them."""

RANDOM = frozenset({
    "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli",
    "Multinomial",
})  # fmt: skip
"""Operators whose results are not a function of their inputs."""

LARGEST = 1 << 33
"""Elements of the largest tensor, computed or folded."""

SITE_KEY = "optcompiler.site"
"""Metadata key of an expanded node: the main-graph node it came from."""


@dataclass(eq=False)
class Flat:
    """A program without functions.

    `nodes` are in topological order without those whose results are constants; `constants` holds
    initializers and folded results, `stored` results that were left as their operands are stored;
    `shapes` those of every tensor.
    """

    program: Program
    nodes: list[ir.Node] = field(default_factory=list[ir.Node])
    constants: dict[ir.Value, np.ndarray] = field(default_factory=dict[ir.Value, np.ndarray])
    stored: dict[ir.Value, Stored] = field(default_factory=dict[ir.Value, Stored])
    shapes: dict[ir.Value, tuple[int, ...]] = field(default_factory=dict[ir.Value, tuple[int, ...]])

    def is_constant(self, value: ir.Value) -> bool:
        return value in self.constants or value in self.stored

    def dtype(self, value: ir.Value) -> str:
        return value.dtype.name if value.dtype is not None else "UNDEFINED"

    def attributes(self, node: ir.Node) -> Mapping[str, Any]:
        return attributes_of(node)


def site_of(node: ir.Node) -> str:
    """The main-graph node that `node` came from."""
    return node.metadata_props.get(SITE_KEY) or node.name or ""


def flatten(
    program: Program,
    values: bool = True,
    has_rule: Callable[[ir.Node, Facts], bool] = lambda node, facts: True,
    decompositions: Mapping[str, Decomposition] = MappingProxyType({}),
    stored: Collection[str] = (),
) -> Flat:
    """Expand functions, fold constants, and check that every shape is static.

    Nodes for which `has_rule` is false are expanded: by `decompositions`, by the function body
    that their schema has, or, for control flow whose condition is known, by what is taken. `stored`
    names types whose constants stay as they are where contractions alone read what they stand for.

    Raises `InputError` for a symbolic dimension, naming the input, and
    `UnsupportedOperatorError` for a tensor type without a lowered form. Without `values`, quantised
    weights are zeros of the right type and shape: enough to say which kernels there are.
    """
    for value in program.graph.inputs:
        _check_type(value, next((use.node for use in value.uses()), None))
    for value in program.graph.outputs:
        _check_type(value, value.producer())
    for port in program.inputs:
        if not port.static:
            names = [d for d in port.shape if not isinstance(d, int)]
            dims = ", ".join(map(repr, names))
            raise InputError(
                f"input {port.name!r} has dynamic dimensions ({dims}) and this target compiles "
                f"for fixed shapes; give a fixed size: as text size.{names[0]}=1 after the target, "
                f"in Python sizes={{{names[0]!r}: 1}}; or bounds, size.{names[0]}=1..8, where the "
                f"target takes them."
            )
    copy = program.clone()
    for node in copy.graph:
        node.metadata_props[SITE_KEY] = node.name or ""
    if copy.functions:
        ir_passes.InlinePass()(copy.model)
        ir_passes.NameFixPass()(copy.model)
    flat = Flat(copy)
    for value in copy.graph.initializers.values():
        if value.const_value is not None:
            flat.constants[value] = value.const_value.numpy()
            flat.shapes[value] = flat.constants[value].shape
    for value in copy.graph.inputs:
        flat.shapes[value] = shape = static_shape(value) or ()
        if 0 in shape and value.dtype is not None:
            flat.constants[value] = np.empty(shape, value.dtype.numpy())
    facts = Facts(flat.shapes, flat.constants)
    todo = deque(copy.graph)
    while todo:
        node = todo.popleft()
        if any(static_shape(v) is None for v in node.outputs):
            infer(node, facts)
        _check_sizes(node)
        if _keep(node, flat, stored):
            continue
        if _fold(node, flat, values):
            flat.shapes.update((v, flat.constants[v].shape) for v in node.outputs)
            continue
        if not has_rule(node, facts):
            made = expansion(node, facts, decompositions)
            if made is not None:
                todo.extendleft(reversed(splice(node, made)))
                continue
        _settle(node, flat)
        flat.nodes.append(node)
    return flat


def _keep(node: ir.Node, flat: Flat, types: Collection[str]) -> bool:
    """Whether the node's output is one that `flat.stored` holds now."""
    values = [None if v is None else flat.constants.get(v) for v in node.inputs]
    source = flat.dtype(node.inputs[0]) if node.inputs and node.inputs[0] is not None else ""
    bytes_in_channels = source in KERNEL_BYTES and not flat.attributes(node).get("block_size")
    if not types or (node.op_type == "DequantizeLinear" and bytes_in_channels):
        return False
    if any(v is None and i is not None for v, i in zip(values[1:], node.inputs[1:], strict=True)):
        return False
    found = stored_by(node, values, flat.stored, flat.attributes(node), types)
    if found is not None:
        flat.stored[node.outputs[0]] = found
        flat.shapes[node.outputs[0]] = found.levels.shape
    return found is not None


def _fold(node: ir.Node, flat: Flat, contents: bool) -> bool:
    """Whether the node's outputs became constants; see `KERNEL_INTEGERS` for what does not."""
    if node.op_type == "Shape" and node.inputs[0] is not None:
        shape = flat.constants.get(node.inputs[0])
        dims = shape.shape if shape is not None else static_shape(node.inputs[0])
        if dims is not None:
            attributes = flat.attributes(node)
            part = dims[attributes.get("start") or 0 : attributes.get("end")]
            flat.constants[node.outputs[0]] = np.array(part, np.int64)
            return True
    if node.op_type == "Size" and node.inputs[0] in flat.shapes:
        flat.constants[node.outputs[0]] = np.array(product(flat.shapes[node.inputs[0]]), np.int64)
        return True
    if node.op_type == "Constant" and "value" in node.attributes:
        flat.constants[node.outputs[0]] = node.attributes["value"].as_tensor().numpy()
        return True
    if node.domain != "" or node.op_type in RANDOM:
        return False
    values = [None if v is None else flat.constants.get(v) for v in node.inputs]
    if any(v is not None and c is None for v, c in zip(node.inputs, values, strict=True)):
        return False
    if any(
        a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for a in node.attributes.values()
    ):
        return False
    if node.op_type == "DequantizeLinear":
        block = int(flat.attributes(node).get("block_size") or 0)
        if values[0] is not None and (block or values[0].dtype not in KERNEL_INTEGERS):
            axis = int(flat.attributes(node).get("axis", 1))
            flat.constants[node.outputs[0]] = dequantised(values, axis, block).floats()
            return True
        return False
    if node.op_type == "QuantizeLinear":
        out = node.outputs[0]
        flat.constants[out] = quantize_constant(node, flat, values, contents)
        return True
    for value, array in zip(node.outputs, evaluate(node, values), strict=True):
        flat.constants[value] = np.asarray(array)
    return True


def quantize_constant(
    node: ir.Node, flat: Flat, values: list[np.ndarray | None], contents: bool
) -> np.ndarray:
    """`saturate(round(x / scale) + zero_point)`, or zeros where contents do not matter."""
    x, scale, *rest = values
    assert x is not None
    assert scale is not None
    dtype = node.outputs[0].dtype
    assert dtype is not None
    kind = np.dtype(dtype.numpy())
    if not contents or not np.issubdtype(kind, np.integer):
        if contents:
            return np.asarray(evaluate(node, values)[0]).astype(kind)
        return np.broadcast_to(np.zeros((), kind), x.shape)
    if flat.attributes(node).get("block_size"):
        return np.asarray(evaluate(node, values)[0])
    wide = [1] * x.ndim
    if scale.ndim == 1 and scale.size > 1:
        wide[int(flat.attributes(node).get("axis", 1)) % x.ndim] = scale.size
    levels = x / scale.reshape(wide if scale.size > 1 else ())
    np.rint(levels, out=levels)
    if rest and rest[0] is not None and rest[0].any():
        levels += rest[0].reshape(wide if rest[0].size > 1 else ())
    limits = np.iinfo(kind)
    return np.clip(levels, limits.min, limits.max, out=levels).astype(kind)


def evaluate(node: ir.Node, values: list[np.ndarray | None]) -> list[np.ndarray]:
    """One node computed on constants: by the executor, or, where that lacks the operator or a type,
    by the ONNX reference implementation, which gets some operators wrong (onnx 1.23)."""
    from optcompiler.executor import computed

    if node.graph is not None and all(v.name for v in node.outputs):
        try:
            return [t.numpy() for t in computed(node, values=values)]
        except UnsupportedOperatorError:
            pass
    version = node.version or (node.graph.opset_imports.get("") if node.graph else None)
    names = ["" if v is None else f"i{i}" for i, v in enumerate(values)]
    outputs = [f"o{i}" for i in range(len(node.outputs))]
    proto = onnx.helper.make_node(node.op_type, names, outputs)
    proto.attribute.extend(ir.to_proto(a) for a in node.attributes.values())
    infos = [
        onnx.helper.make_tensor_value_info(
            n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape
        )
        for n, v in zip(names, values, strict=True)
        if v is not None
    ]
    graph = onnx.helper.make_graph(
        [proto], "fold", infos, [onnx.ValueInfoProto(name=o) for o in outputs]
    )
    opset = onnx.helper.make_opsetid("", version or onnx.defs.onnx_opset_version())
    model = onnx.helper.make_model(graph, opset_imports=[opset])
    feeds = {n: v for n, v in zip(names, values, strict=True) if v is not None}
    run: Any = ReferenceEvaluator(model).run  # type: ignore[reportUnknownMemberType]
    try:
        return list(run(None, feeds))
    except TypeError as error:  # for attributes that its operator does not expect
        raise UnsupportedOperatorError(
            f"{node.op_type} {node.name!r} of constants cannot be computed here; fold it before."
        ) from error


def _settle(node: ir.Node, flat: Flat) -> None:
    """Note the shapes of what a node computes, or say why it cannot be lowered."""
    for value in node.outputs:
        _check_type(value, node)
        shape = static_shape(value)
        if shape is None:
            raise UnsupportedOperatorError(
                f"{node.op_type} {site_of(node)!r}: the shape of {value.name!r} is not known "
                f"before it runs; rewrite the model so that shapes do not depend on data."
            )
        flat.shapes[value] = shape


def _check_sizes(node: ir.Node) -> None:
    for value in node.outputs:
        shape = static_shape(value)
        if shape is not None and product(shape) > LARGEST:
            raise UnsupportedOperatorError(
                f"{node.op_type} {site_of(node)!r}: {value.name!r} has {product(shape)} elements, "
                f"more than the {LARGEST} that are lowered; make it smaller."
            )


def _check_type(value: ir.Value, node: ir.Node | None) -> None:
    if not isinstance(value.type, ir.TensorType) or value.type.dtype.name not in ITEM_SIZES:
        where = "the model" if node is None else f"{node.op_type} {site_of(node)!r}"
        raise UnsupportedOperatorError(
            f"{where}: {value.name!r} is {value.type or 'of unknown type'}, which has no lowered "
            f"form; use target onnxruntime, or cut the model there."
        )
