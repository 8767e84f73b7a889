"""Which kernels ONNX Runtime makes of a program, told from its published fusion rules.

Source: onnxruntime `core/optimizer/qdq_transformer` and `core/optimizer/*_fusion.cc`, and what
version 1.32 was seen to do with each pattern (`tests/backends/test_onnxruntime.py` holds it so).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import onnx_ir as ir

from optcompiler.backend import Kernel
from optcompiler.program import Program, constant
from optcompiler.quantization import FLOAT8, INTEGER_RANGES

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Dropout"})
MOVES = frozenset(
    {
        "Concat", "Expand", "Gather", "Pad", "Slice", "Split", "Tile", "Transpose", "DepthToSpace",
        "SpaceToDepth", "Resize", "GatherElements", "GatherND", "ScatterND", "Where",
    }
)  # fmt: skip
INTEGER = frozenset(
    {
        "Add", "AveragePool", "Concat", "Conv", "Gemm", "GlobalAveragePool", "LeakyRelu", "MatMul",
        "Mul", "Sigmoid", "Softmax", "Where",
    }
)  # fmt: skip
KEEPS_VALUES = frozenset(
    {"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Gather", "Split",
     "Slice", "Resize", "Pad"}
)  # fmt: skip
"""Operators that run on the integers when a DequantizeLinear and a QuantizeLinear surround them."""

STORED_WEIGHTS = ("MatMul",)
"""Operators of floats that multiply weights as stored: in blocks of `LEAST_BLOCK` or more, or bytes
with a scale for each column."""

LEAST_BLOCK = 16

CONTRACTIONS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FUSED_ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid"})
KINDS = {
    "Conv": "conv", "ConvTranspose": "conv", "Gemm": "gemm", "MatMul": "gemm", "Softmax": "softmax",
    "LogSoftmax": "softmax", "LayerNormalization": "normalization",
    "RMSNormalization": "normalization", "InstanceNormalization": "normalization",
    "GroupNormalization": "normalization", "BatchNormalization": "pointwise",
    "AveragePool": "pooling", "GlobalAveragePool": "pooling", "MaxPool": "pooling",
    "GlobalMaxPool": "pooling", "Attention": "attention",
}  # fmt: skip


@dataclass
class _Group:
    anchor: ir.Node
    dtype: str
    nodes: list[ir.Node] = field(default_factory=list[ir.Node])


def kernels_of(program: Program) -> list[Kernel]:
    """The kernels of an inlined program, in execution order."""
    from optcompiler.ops import builtin_table

    table = builtin_table()
    constants = _constants(program)
    live = _live(program)
    nodes = [n for n in program.graph if n in live and not constants.issuperset(n.outputs)]
    taken: dict[ir.Node, _Group] = {}
    _integer_groups(nodes, constants, taken)
    _float_groups(nodes, constants, taken)
    kernels: list[Kernel] = []
    for node in nodes:
        group = taken.get(node)
        if group is None and _free_dequantize(node, taken):
            continue
        if group is None:
            group = _Group(node, _dtype(node), [node])
        elif group.anchor is not node:
            continue
        # The fitted rate of a contraction holds what it does to a result on its way out.
        counted = [group.anchor] if _is(group.anchor, *CONTRACTIONS) else group.nodes
        specs = [table.get(n) for n in counted]
        works = [s.cost(n) for s, n in zip(specs, counted, strict=True) if s is not None]
        kernels.append(
            _kernel(
                group,
                constants,
                sum(w.macs for w in works),
                sum(w.flops for w in works),
            )
        )
    return kernels


def _is(node: ir.Node | None, *op_types: str) -> bool:
    return node is not None and node.domain == "" and node.op_type in op_types


def _constants(program: Program) -> set[ir.Value]:
    """Values that ONNX Runtime computes while it loads, quantised weights among them."""
    known = {
        v
        for v in program.graph.initializers.values()
        if v.const_value is not None and not v.is_graph_input()
    }
    for node in program.graph:
        if _is(node, QUANTIZE, DEQUANTIZE, "Constant", "Transpose", *VIEWS) and all(
            v is None or v in known for v in node.inputs
        ):
            known.update(node.outputs)
    return known


def _live(program: Program) -> set[ir.Node]:
    """Nodes that an output depends on; ONNX Runtime drops the others."""
    live: set[ir.Node] = set()
    for node in reversed(list(program.graph)):
        if any(
            v.is_graph_output() or any(n in live or n.graph is not node.graph for n, _ in v.uses())
            for v in node.outputs
        ):
            live.add(node)
    return live


def _sole(value: ir.Value) -> ir.Node | None:
    readers = {n for n, _ in value.uses()}
    return readers.pop() if len(readers) == 1 and not value.is_graph_output() else None


def _integer_groups(
    nodes: list[ir.Node], constants: set[ir.Value], taken: dict[ir.Node, _Group]
) -> None:
    for node in nodes:
        if node in taken or not (_is(node, *INTEGER) or _is(node, *KEEPS_VALUES)):
            continue
        data = [v for i, v in enumerate(node.inputs) if v is not None and not _parameter(node, i)]
        activations = [v for v in data if v not in constants]
        if not activations or not all(_is(v.producer(), DEQUANTIZE) for v in activations):
            continue
        if _is(node, "Conv", "Gemm", "MatMul") and not all(
            _is(v.producer(), DEQUANTIZE) for v in data[:2]
        ):
            continue
        group = _Group(node, "int8", [node])
        value = node.outputs[0]
        after = _sole(value)
        if _is(node, "MatMul") and after is not None and _adds_constant(after, constants):
            group.nodes.append(after)
            value = after.outputs[0]
            after = _sole(value)
        if after is not None and _is(after, "Relu", "Clip") and _is(node, "Conv", "Add", "Gemm"):
            quantize = _sole(after.outputs[0])
            if quantize is not None and _clamps_like(after, quantize):
                group.nodes.append(after)
                after = quantize
        if after is not None and _is(after, QUANTIZE):
            group.nodes.append(after)
        elif not _is(node, "Gemm", "MatMul"):
            continue
        taken.update(dict.fromkeys(group.nodes, group))


def _parameter(node: ir.Node, index: int) -> bool:
    """Inputs that no DequantizeLinear feeds: shapes, indices, bounds, biases, conditions."""
    if _is(node, "Where"):
        return index == 0
    if _is(node, "Concat", "Add", "Mul"):
        return False
    return index >= (2 if _is(node, "Conv", "Gemm", "MatMul") else 1)


def _adds_constant(node: ir.Node, constants: set[ir.Value]) -> bool:
    return _is(node, "Add") and any(v in constants for v in node.inputs)


def _clamps_like(activation: ir.Node, quantize: ir.Node) -> bool:
    """Whether rounding to the integers of `quantize` clamps at least as tightly already."""
    if not _is(quantize, QUANTIZE):
        return False
    scale = constant(quantize.inputs[1])
    zero = constant(quantize.inputs[2]) if len(quantize.inputs) > 2 else None
    if scale is None or scale.size != 1 or (zero is not None and zero.size != 1):
        return False
    dtype = quantize.outputs[0].dtype
    if dtype is None or dtype.name in FLOAT8:
        # Runs in float whatever it is called; priced as on a target that has such kernels.
        return dtype is not None
    if dtype.name not in INTEGER_RANGES:
        return False
    lowest, highest = INTEGER_RANGES[dtype.name]
    point = float(zero.reshape(())) if zero is not None else 0.0
    step = float(scale.reshape(()))
    low, high = (lowest - point) * step, (highest - point) * step
    slack = 1e-3 * step
    if _is(activation, "Relu"):
        return low >= -slack
    bounds = [constant(v) if v is not None else None for v in activation.inputs[1:3]]
    minimum = bounds[0] if bounds else None
    maximum = bounds[1] if len(bounds) > 1 else None
    return (minimum is None or low >= float(minimum.reshape(())) - slack) and (
        maximum is None or high <= float(maximum.reshape(())) + slack
    )


def _float_groups(
    nodes: list[ir.Node], constants: set[ir.Value], taken: dict[ir.Node, _Group]
) -> None:
    def extend(group: _Group, fits: Callable[[ir.Node], bool]) -> None:
        after = _sole(group.nodes[-1].outputs[0])
        if after is not None and after not in taken and fits(after):
            group.nodes.append(after)

    for node in nodes:
        if node in taken:
            continue
        group = _Group(node, _dtype(node), [node])
        if _is(node, "Conv"):
            extend(group, lambda n: _is(n, "Add") and not _adds_constant(n, constants))
            extend(group, lambda n: _is(n, *FUSED_ACTIVATIONS))
        elif _is(node, "Gemm"):
            extend(group, lambda n: _is(n, *FUSED_ACTIVATIONS))
        elif _is(node, "MatMul"):
            extend(group, lambda n: _adds_constant(n, constants))
            if len(group.nodes) == 2 and len(_dims(node.outputs[0])) == 2:
                extend(group, lambda n: _is(n, *FUSED_ACTIVATIONS))
        elif _is(node, "Add"):
            extend(group, lambda n: _is(n, "LayerNormalization"))
        if len(group.nodes) > 1:
            taken.update(dict.fromkeys(group.nodes, group))


def _free_dequantize(node: ir.Node, taken: dict[ir.Node, _Group]) -> bool:
    """A DequantizeLinear that only integer kernels read is part of them."""
    if not _is(node, DEQUANTIZE) or node.outputs[0].is_graph_output():
        return False
    readers = [taken.get(n) for n, _ in node.outputs[0].uses()]
    return bool(readers) and all(g is not None and g.dtype == "int8" for g in readers)


def _dtype(node: ir.Node) -> str:
    """The type of the arithmetic: that of the first float result or operand, else of a result."""
    known = {"FLOAT": "fp32", "DOUBLE": "fp64", "FLOAT16": "fp16", "BFLOAT16": "bf16"}
    values = (*node.outputs, *(v for v in node.inputs if v is not None))
    names = [v.dtype.name for v in values if v.dtype is not None]
    if found := next((known[n] for n in names if n in known), None):
        return found
    return "int64" if names[:1] == ["INT64"] else "int8"


def _kernel(group: _Group, constants: set[ir.Value], macs: int, flops: int) -> Kernel:
    node = group.anchor
    inner = {v for n in group.nodes for v in n.outputs}
    read: dict[ir.Value, None] = {}
    weights: dict[ir.Value, None] = {}
    for member in group.nodes:
        for value in member.inputs:
            if value is None or value in inner:
                continue
            for stored in _stored(value, member, group):
                (weights if value in constants else read)[stored] = None
    written = group.nodes[-1].outputs
    view = _is(node, *VIEWS)
    return Kernel(
        name=str(node.name),
        kind=next((k for n in group.nodes if (k := _kind(n)) != "pointwise"), "pointwise"),
        dtype=group.dtype,
        nodes=tuple(str(n.name) for n in group.nodes),
        macs=macs,
        flops=flops,
        bytes_moved=0 if view else _bytes(read) + _bytes(written),
        weight_bytes=0 if view else _bytes(weights),
        shape=_shape(node),
        details={"operators": tuple(n.op_type for n in group.nodes)},
    )


def _stored(value: ir.Value, reader: ir.Node, group: _Group) -> list[ir.Value]:
    """What is in memory for `value`: its integers where a DequantizeLinear makes it for an integer
    kernel, these and their scales where it is the weight of one that multiplies few bits."""
    producer = value.producer()
    if producer is None or not _is(producer, DEQUANTIZE):
        return [value]
    if group.dtype == "int8":
        return [producer.inputs[0] or value]
    few = producer.attributes.get_int("block_size", 0) >= LEAST_BLOCK or _bytes_by_column(producer)
    if few and _is(reader, *STORED_WEIGHTS) and value is reader.inputs[1]:
        return [v for v in producer.inputs if v is not None]
    return [value]


def _bytes_by_column(dequantize: ir.Node) -> bool:
    levels, scale = dequantize.inputs[:2]
    return (
        levels is not None
        and levels.dtype == ir.DataType.INT8
        and len(_dims(levels)) == 2
        and dequantize.attributes.get_int("axis", 1) in (1, -1)
        and len(_dims(scale)) == 1
        and not dequantize.attributes.get_int("block_size", 0)
    )


def _kind(node: ir.Node) -> str:
    if _is(node, "Conv"):
        groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
        channels = _dims(node.inputs[0])[1:2]
        return "depthwise" if groups > 1 and channels == (groups,) else "conv"
    if node.op_type in KINDS:
        return KINDS[node.op_type]
    if node.op_type in VIEWS | MOVES:
        return "movement"
    if node.op_type.startswith("Reduce"):
        return "reduction"
    return "pointwise" if len(node.outputs) == 1 else "other"


def _shape(node: ir.Node) -> tuple[int, ...]:
    out = _dims(node.outputs[0])
    if _is(node, "Conv", "ConvTranspose"):
        window = _dims(node.inputs[1])
        strides = (
            tuple(node.attributes["strides"].as_ints()) if "strides" in node.attributes else ()
        )
        return (*out, *window[1:], *strides)
    if _is(node, "Gemm", "MatMul"):
        a = _dims(node.inputs[0])
        turned = "transA" in node.attributes and node.attributes["transA"].as_int()
        inner = a[0 if turned else -1] if a else 1
        return (prod(out[:-1]), out[-1] if out else 1, inner)
    return out


def _dims(value: ir.Value | None) -> tuple[int, ...]:
    if value is None or value.shape is None:
        return ()
    return tuple(d if isinstance(d, int) else 1 for d in value.shape)


def _bytes(values: object) -> int:
    total = 0
    for value in values:  # type: ignore[attr-defined]
        if value.dtype not in (None, ir.DataType.STRING):
            total += int(prod(_dims(value)) * value.dtype.itemsize)
    return total
