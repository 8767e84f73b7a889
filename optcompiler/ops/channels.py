"""How the channels of each ONNX operator's operands live and die together.

A rule reads one node and states its couplings; what it does not state is pinned. Only axes with a
static extent can shrink, so rules pass over symbolic ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from optcompiler.ops.axes import (
    Extents,
    aligned,
    along,
    dims,
    integers,
    is_weight,
    operand,
    opset_of,
    spread,
)
from optcompiler.ops.channels_layout import LAYOUT_RULES
from optcompiler.ops.spec import Axis, ChannelRule, Channels, Coupling, attributes_of

if TYPE_CHECKING:
    from optcompiler.program import Program

POINTWISE = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitwiseAnd",
    "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div",
    "Dropout", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual",
    "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual",
    "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow",
    "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus",
    "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
)  # fmt: skip
ALONG_AXIS = ("CumSum", "Hardmax", "LogSoftmax", "LpNormalization", "Softmax")
POOLS = ("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool")
REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
ZERO_IS_NEUTRAL = ("ReduceL1", "ReduceL2", "ReduceSum", "ReduceSumSquare")


def pointwise(node: ir.Node) -> Channels | None:
    """Unary and broadcasting operators: equal extents of aligned axes are one."""
    couplings: list[Coupling] = []
    for value in (*node.inputs, *node.outputs[1:]):
        if value is None:
            continue
        found = aligned(value, node.outputs[0])
        if found is None:
            return None
        couplings += found
    return Channels(tuple(couplings))


def conv(node: ir.Node) -> Channels | None:
    """[N, C, …] by [M, C/g, …]; depthwise channels pass through, other groups shrink evenly."""
    x, w, b, y = node.inputs[0], node.inputs[1], operand(node, 2), node.outputs[0]
    shape = dims(w)
    if x is None or w is None or shape is None:
        return None
    made, read = shape[0], shape[1]
    if not isinstance(made, int) or not isinstance(read, int):
        return None
    groups = int(attributes_of(node)["group"])
    couplings = [Coupling(Axis(x, 0), Axis(y, 0)), Coupling(Axis(w, 0), Axis(y, 1))]
    if b is not None:
        couplings.append(Coupling(Axis(b, 0), Axis(y, 1)))
    if groups > 1 and read == 1:
        couplings.append(Coupling(Axis(x, 1), Axis(y, 1), repeat=made // groups))
        return Channels(tuple(couplings), groups=groups, repair=_depthwise_group)
    couplings += spread(Axis(w, 1), Axis(x, 1), groups, read)
    if groups > 1:
        couplings += spread(Axis(w, 0), Axis(w, 0), groups, made // groups)
    return Channels(
        tuple(couplings),
        produced=(Axis(w, 0),),
        reduced=(Axis(w, 1), Axis(x, 1)),
        groups=groups,
    )


def conv_transpose(node: ir.Node) -> Channels | None:
    """[N, C, …] by [C, M/g, …]."""
    x, w, b, y = node.inputs[0], node.inputs[1], operand(node, 2), node.outputs[0]
    shape = dims(w)
    if x is None or w is None or shape is None:
        return None
    read, made = shape[0], shape[1]
    if not isinstance(made, int) or not isinstance(read, int):
        return None
    groups = int(attributes_of(node)["group"])
    couplings = [Coupling(Axis(x, 0), Axis(y, 0)), Coupling(Axis(x, 1), Axis(w, 0))]
    if b is not None:
        couplings.append(Coupling(Axis(b, 0), Axis(y, 1)))
    if groups > 1 and read == groups:
        couplings.append(Coupling(Axis(x, 1), Axis(y, 1), repeat=made))
        return Channels(tuple(couplings), groups=groups, repair=_depthwise_group)
    couplings += spread(Axis(w, 1), Axis(y, 1), groups, made)
    if groups > 1:
        couplings += spread(Axis(w, 0), Axis(w, 0), groups, read // groups)
    return Channels(
        tuple(couplings),
        produced=(Axis(w, 1),),
        reduced=(Axis(w, 0), Axis(x, 1)),
        groups=groups,
    )


def _depthwise_group(program: Program, node: ir.Node, extents: Extents) -> None:
    x = node.inputs[0]
    if x is not None and Axis(x, 1) in extents:
        node.attributes["group"] = ir.AttrInt64("group", extents[Axis(x, 1)])


def gemm(node: ir.Node) -> Channels | None:
    a, b, c, y = node.inputs[0], node.inputs[1], operand(node, 2), node.outputs[0]
    if a is None or b is None:
        return None
    attributes = attributes_of(node)
    rows, left = (1, 0) if attributes["transA"] else (0, 1)
    right, columns = (1, 0) if attributes["transB"] else (0, 1)
    couplings = [
        Coupling(Axis(a, rows), Axis(y, 0)),
        Coupling(Axis(b, right), Axis(a, left)),
        Coupling(Axis(b, columns), Axis(y, 1)),
    ]
    if c is not None:
        bias = aligned(c, y)
        if bias is None:
            return None
        couplings += bias
    produced = [Axis(v, k) for v, k in ((b, columns), (a, rows)) if is_weight(v)]
    return Channels(tuple(couplings), tuple(produced), (Axis(b, right), Axis(a, left)))


def matmul(node: ir.Node) -> Channels | None:
    """numpy.matmul: batch axes broadcast, the inner axis is summed, the outer ones are made."""
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    left, right, whole = dims(a), dims(b), dims(y)
    if a is None or b is None or left is None or right is None or whole is None:
        return None
    inner_a, inner_b = Axis(a, len(left) - 1), Axis(b, max(len(right) - 2, 0))
    couplings = [Coupling(inner_b, inner_a)]
    produced: list[Axis] = []
    tail = 0
    if len(right) > 1:
        tail += 1
        columns = Axis(b, len(right) - 1)
        couplings.append(Coupling(columns, Axis(y, len(whole) - 1)))
        if is_weight(b):
            produced.append(columns)
    if len(left) > 1:
        tail += 1
        rows = Axis(a, len(left) - 2)
        couplings.append(Coupling(rows, Axis(y, len(whole) - tail)))
        if is_weight(a):
            produced.append(rows)
    for value, shape in ((a, left), (b, right)):
        batch = len(shape) - 2
        for axis in range(batch):
            out = len(whole) - tail - batch + axis
            if shape[axis] != 1 or whole[out] == 1:
                couplings.append(Coupling(Axis(value, axis), Axis(y, out)))
    return Channels(tuple(couplings), tuple(produced), (inner_b, inner_a))


def batch_normalization(node: ir.Node) -> Channels | None:
    x, y = node.inputs[0], node.outputs[0]
    same = aligned(x, y) if x is not None else None
    if same is None:
        return None
    vectors = [v for v in (*node.inputs[1:], *node.outputs[1:]) if v is not None]
    return Channels((*same, *(Coupling(Axis(v, 0), Axis(y, 1)) for v in vectors)))


def instance_normalization(node: ir.Node) -> Channels | None:
    x, y = node.inputs[0], node.outputs[0]
    if x is None:
        return None
    vectors = [v for v in node.inputs[1:] if v is not None]
    return Channels(
        (
            Coupling(Axis(x, 0), Axis(y, 0)),
            Coupling(Axis(x, 1), Axis(y, 1)),
            *(Coupling(Axis(v, 0), Axis(y, 1)) for v in vectors),
        )
    )


def group_normalization(node: ir.Node) -> Channels | None:
    """Channels of one group share statistics, so a group leaves whole."""
    x, y = node.inputs[0], node.outputs[0]
    shape = dims(x)
    if x is None or shape is None or not isinstance(shape[1], int):
        return None
    groups = int(attributes_of(node)["num_groups"])
    size = shape[1] // groups
    couplings = [Coupling(Axis(x, 0), Axis(y, 0)), Coupling(Axis(x, 1), Axis(y, 1))]
    couplings += [
        Coupling(Axis(x, 1), Axis(x, 1), size, g * size, g * size, count=1) for g in range(groups)
    ]
    for vector in node.inputs[1:]:
        extent = dims(vector)
        if vector is None or extent is None:
            return None
        repeat = size if extent == (groups,) else 1
        couplings.append(Coupling(Axis(vector, 0), Axis(y, 1), repeat))

    def repair(program: Program, node: ir.Node, extents: Extents) -> None:
        left = extents.get(Axis(node.outputs[0], 1))
        if left is not None:
            node.attributes["num_groups"] = ir.AttrInt64("num_groups", left // size)

    return Channels(tuple(couplings), groups=groups, repair=repair)


def layer_normalization(node: ir.Node) -> Channels | None:
    """Axes from `axis` on are normalised together: coupled, but never exactly removable."""
    x, y = node.inputs[0], node.outputs[0]
    shape = dims(x)
    if x is None or shape is None:
        return None
    start = along(int(attributes_of(node)["axis"]), len(shape))
    couplings: list[Coupling] = []
    for value in (*node.inputs, *node.outputs[1:]):
        found = aligned(value, y) if value is not None else ()
        if found is None:
            return None
        couplings += found
    normalised = tuple(Axis(y, axis) for axis in range(start, len(shape)))
    return Channels(tuple(couplings), normalised=normalised)


def along_axis(node: ir.Node) -> Channels | None:
    """Operators that mix one axis and keep the shape: the other axes pass through."""
    x, y = node.inputs[0], node.outputs[0]
    shape = dims(x)
    couplings = aligned(x, y) if x is not None else None
    if shape is None or couplings is None:
        return None
    if node.op_type == "CumSum":
        axes = integers(node, 1, "")
        if not axes:
            return None
        mixed = {along(axes[0], len(shape))}
    else:
        axis = along(int(attributes_of(node)["axis"]), len(shape))
        # Before opset 13 Softmax and its kin worked on the input flattened to a matrix at `axis`.
        coerced = node.op_type != "LpNormalization" and opset_of(node) < 13
        mixed = set(range(axis, len(shape))) if coerced else {axis}
    return Channels(tuple(c for c in couplings if c.target.axis not in mixed))


def pool(node: ir.Node) -> Channels | None:
    """Spatial axes are mixed; batch and channels pass through."""
    x, y = node.inputs[0], node.outputs[0]
    # Indices of MaxPool count through channels.
    if x is None or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return None
    return Channels(tuple(Coupling(Axis(x, k), Axis(y, k)) for k in (0, 1)))


def reduction(node: ir.Node) -> Channels | None:
    """Axes that are not reduced pass through; sums also let channels leave the reduced axes."""
    x, y = node.inputs[0], node.outputs[0]
    shape = dims(x)
    axes = integers(node, 1, "axes")
    if x is None or shape is None or axes is None:
        return None
    attributes = attributes_of(node)
    if axes:
        gone = {along(a, len(shape)) for a in axes}
    else:
        gone = set[int]() if attributes.get("noop_with_empty_axes") else set(range(len(shape)))
    kept = [k for k in range(len(shape)) if attributes["keepdims"] or k not in gone]
    couplings = tuple(Coupling(Axis(x, k), Axis(y, kept.index(k))) for k in kept if k not in gone)
    summed = tuple(Axis(x, k) for k in sorted(gone)) if node.op_type in ZERO_IS_NEUTRAL else ()
    return Channels(couplings, reduced=summed)


def arg_reduction(node: ir.Node) -> Channels | None:
    x, y = node.inputs[0], node.outputs[0]
    shape = dims(x)
    if x is None or shape is None:
        return None
    attributes = attributes_of(node)
    gone = along(int(attributes["axis"]), len(shape))
    kept = [k for k in range(len(shape)) if attributes["keepdims"] or k != gone]
    return Channels(tuple(Coupling(Axis(x, k), Axis(y, kept.index(k))) for k in kept if k != gone))


def linear_quantization(node: ir.Node) -> Channels | None:
    """Shapes pass through; a scale per channel goes with its channel, a block stays whole."""
    x, y = node.inputs[0], node.outputs[0]
    shape = dims(x)
    couplings = aligned(x, y) if x is not None else None
    if shape is None or couplings is None:
        return None
    attributes = attributes_of(node)
    vectors = [v for v in node.inputs[1:] if v is not None]
    axis = along(int(attributes.get("axis", 1)), len(shape))
    if axis >= len(shape):  # the default axis says nothing of a vector with one scale
        return Channels(couplings)
    if attributes.get("block_size"):
        couplings = tuple(c for c in couplings if c.target.axis != axis)
        for vector in vectors:
            scaled = aligned(vector, y)
            if scaled is None:
                return None
            couplings += tuple(c for c in scaled if c.target.axis != axis)
        return Channels(couplings)
    couplings += tuple(
        Coupling(Axis(v, 0), Axis(y, axis)) for v in vectors if dims(v) == (shape[axis],)
    )
    return Channels(couplings)


CHANNEL_RULES: dict[str, ChannelRule] = {
    **LAYOUT_RULES,
    **dict.fromkeys(POINTWISE, pointwise),
    **dict.fromkeys(ALONG_AXIS, along_axis),
    **dict.fromkeys(POOLS, pool),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(("ArgMax", "ArgMin"), arg_reduction),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), layer_normalization),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), linear_quantization),
    "BatchNormalization": batch_normalization,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "MatMul": matmul,
}
"""Channel rule by operator type of the default domain; an operator without one pins its axes."""
