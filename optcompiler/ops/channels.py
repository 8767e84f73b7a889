"""How the channels of each ONNX operator's operands live and die together.

A rule reads one node and states its couplings; what it does not state is pinned. Only axes with a
static extent can shrink, so rules pass over symbolic ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from optcompiler.ops.spec import Axis, ChannelRule, Channels, Coupling, attributes_of

if TYPE_CHECKING:
    from optcompiler.program import Program

Dims = tuple[int | str | None, ...]
Extents = Mapping[Axis, int]
Repair = Callable[["Program", ir.Node, Extents], None]

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
RESHAPES = ("Flatten", "Squeeze", "Unsqueeze")
WEIGHT_CHAIN = ("Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Transpose")

SYMBOL_BASE = 1 << 61


def dims(value: ir.Value | None) -> Dims | None:
    """Extents: ints, names of symbolic dimensions, None where unknown; None for no shape."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def is_weight(value: ir.Value | None) -> bool:
    """Whether the value is an initializer, or one seen through casts, QDQ and layout changes."""
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is None or node.op_type not in WEIGHT_CHAIN:
            return False
        value = node.inputs[0]
    return value is not None


def operand(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def integers(node: ir.Node, index: int, attribute: str) -> tuple[int, ...] | None:
    """Constant integers given as an input or, in older operator sets, as an attribute."""
    value = operand(node, index)
    if value is not None:
        if value.const_value is None:
            return None
        return tuple(int(i) for i in value.const_value.numpy().reshape(-1))
    held = node.attributes.get(attribute)
    return tuple(held.as_ints()) if held is not None else ()


def aligned(value: ir.Value, out: ir.Value) -> tuple[Coupling, ...] | None:
    """Couplings of axes that numpy broadcasting lines up, those stretched from extent 1 left out.

    An axis that faces an unknown extent is coupled to it all the same, which pins it.
    """
    mine, whole = dims(value), dims(out)
    if mine is None or whole is None or len(mine) > len(whole):
        return None
    lead = len(whole) - len(mine)
    return tuple(
        Coupling(Axis(value, axis), Axis(out, lead + axis))
        for axis, extent in enumerate(mine)
        if extent == whole[lead + axis]
        or isinstance(extent, int) != isinstance(whole[lead + axis], int)
    )


def along(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def put_integers(program: Program, node: ir.Node, index: int, values: np.ndarray) -> None:
    """Replace the constant integers at an input; other users of the initializer keep theirs."""
    value = node.inputs[index]
    assert value is not None
    if len(tuple(value.uses())) == 1:
        program.set_weight(value, values)
    else:
        node.replace_input_with(index, program.add_weight(f"{value.name}", values))


# -- rules ----------------------------------------------------------------------------------


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
    couplings += _spread(Axis(w, 1), Axis(x, 1), groups, read)
    if groups > 1:
        couplings += _spread(Axis(w, 0), Axis(w, 0), groups, made // groups)
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
    couplings += _spread(Axis(w, 1), Axis(y, 1), groups, made)
    if groups > 1:
        couplings += _spread(Axis(w, 0), Axis(w, 0), groups, read // groups)
    return Channels(
        tuple(couplings),
        produced=(Axis(w, 1),),
        reduced=(Axis(w, 0), Axis(x, 1)),
        groups=groups,
    )


def _spread(source: Axis, target: Axis, groups: int, count: int) -> list[Coupling]:
    """The first `count` channels of `source`, each tied to its place in every group of `target`."""
    return [Coupling(source, target, target_offset=g * count, count=count) for g in range(groups)]


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


def opset_of(node: ir.Node) -> int:
    """The version of the default operator set that the node follows."""
    if node.version is not None:
        return node.version
    return node.graph.opset_imports.get("", 1) if node.graph is not None else 1


def concat(node: ir.Node) -> Channels | None:
    y = node.outputs[0]
    return _pieces(node, y, [v for v in node.inputs if v is not None], None)


def split(node: ir.Node) -> Channels | None:
    x = node.inputs[0]
    if x is None or (operand(node, 1) is not None and integers(node, 1, "split") is None):
        return None
    return _pieces(node, x, list(node.outputs), _split_sizes)


def _pieces(
    node: ir.Node, whole: ir.Value, pieces: list[ir.Value], repair: Repair | None
) -> Channels | None:
    shape = dims(whole)
    if shape is None:
        return None
    axis = along(int(attributes_of(node)["axis"]), len(shape))
    couplings: list[Coupling] = []
    offset: int | None = 0
    for piece in pieces:
        extent = dims(piece)
        if extent is None:
            return None
        couplings += [
            Coupling(Axis(piece, k), Axis(whole, k)) for k in range(len(shape)) if k != axis
        ]
        size = extent[axis]
        if offset is None or not isinstance(size, int):
            offset = None
            continue
        couplings.append(Coupling(Axis(piece, axis), Axis(whole, axis), target_offset=offset))
        offset += size
    if offset is None:
        couplings = [c for c in couplings if c.target.axis != axis]
    return Channels(tuple(couplings), repair=repair)


def _split_sizes(program: Program, node: ir.Node, extents: Extents) -> None:
    shape = dims(node.outputs[0])
    assert shape is not None
    axis = along(int(attributes_of(node)["axis"]), len(shape))
    if not any(k.axis == axis for k in extents):
        return
    sizes: list[int] = []
    for out in node.outputs:
        old = (dims(out) or ())[axis]
        assert isinstance(old, int)
        sizes.append(extents.get(Axis(out, axis), old))
    if operand(node, 1) is not None:
        put_integers(program, node, 1, np.array(sizes, np.int64))
    elif opset_of(node) < 13:
        node.attributes["split"] = ir.AttrInt64s("split", sizes)
    else:
        node.attributes.pop("num_outputs", None)
        node.resize_inputs(2)
        stated = program.add_weight(f"{node.name}.split", np.array(sizes, np.int64))
        node.replace_input_with(1, stated)


def row_major(old: Dims, new: Dims) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of a reshape that hold the same elements, innermost first; extents 1 left out.

    Works from the right, where equal products mean equal positions, and stops at the first
    extent that is unknown.
    """
    symbols = {s: i for i, s in enumerate(sorted({d for d in (*old, *new) if isinstance(d, str)}))}

    def size(extent: int | str) -> int:
        return SYMBOL_BASE + 2 * symbols[extent] + 1 if isinstance(extent, str) else extent

    runs: list[tuple[list[int], list[int]]] = []
    i, j = len(old), len(new)
    while i and j:
        ins: list[int] = []
        outs: list[int] = []
        left = right = 1
        while not ins or not outs or left != right:
            take_in = not ins or (bool(outs) and left < right)
            if (take_in and not i) or (not take_in and not j):
                return runs
            i, j = (i - 1, j) if take_in else (i, j - 1)
            extent = old[i] if take_in else new[j]
            if extent is None or extent == 0:
                return runs
            if take_in:
                ins.append(i)
                left *= size(extent)
            else:
                outs.append(j)
                right *= size(extent)
        runs.append(([k for k in ins if old[k] != 1], [k for k in outs if new[k] != 1]))
    return runs


def reshape_like(node: ir.Node) -> Channels | None:
    """Row-major relabelling: the outermost axis of each run carries the channels."""
    x, y = node.inputs[0], node.outputs[0]
    old, new = dims(x), dims(y)
    if x is None or old is None or new is None:
        return None
    couplings: list[Coupling] = []
    for ins, outs in row_major(old, new):
        if not ins or not outs:
            continue
        source, target = Axis(x, min(ins)), Axis(y, min(outs))
        few, many = old[source.axis], new[target.axis]
        if not isinstance(few, int) or not isinstance(many, int):
            continue
        if few > many:
            source, target, few, many = target, source, many, few
        if many % few == 0:
            couplings.append(Coupling(source, target, repeat=many // few))
    return Channels(tuple(couplings))


def reshape(node: ir.Node) -> Channels | None:
    rule = reshape_like(node)
    if rule is None or integers(node, 1, "shape") is None:
        return None
    return Channels(rule.couplings, repair=_reshape_target)


def _reshape_target(program: Program, node: ir.Node, extents: Extents) -> None:
    x, y = node.inputs[0], node.outputs[0]
    stated = integers(node, 1, "shape")
    assert x is not None
    assert stated is not None
    target = list(stated)
    shape = dims(y) or ()
    for axis, entry in enumerate(stated):
        extent = shape[axis]
        if entry != -1 and Axis(y, axis) in extents:
            target[axis] = extents[Axis(y, axis)]
        elif entry == 0 and Axis(x, axis) in extents and isinstance(extent, int):
            target[axis] = extent
    if tuple(target) != stated:
        put_integers(program, node, 1, np.array(target, np.int64))


def expand(node: ir.Node) -> Channels | None:
    x, y = node.inputs[0], node.outputs[0]
    couplings = aligned(x, y) if x is not None else None
    if couplings is None or integers(node, 1, "") is None:
        return None
    return Channels(couplings, repair=_expand_target)


def _expand_target(program: Program, node: ir.Node, extents: Extents) -> None:
    stated = integers(node, 1, "")
    y = node.outputs[0]
    assert stated is not None
    lead = len(dims(y) or ()) - len(stated)
    target = [
        extents.get(Axis(y, lead + k), entry) if entry != 1 else 1 for k, entry in enumerate(stated)
    ]
    if tuple(target) != stated:
        put_integers(program, node, 1, np.array(target, np.int64))


def transpose(node: ir.Node) -> Channels | None:
    x, y = node.inputs[0], node.outputs[0]
    shape = dims(x)
    if x is None or shape is None:
        return None
    perm = attributes_of(node)["perm"] or range(len(shape))[::-1]
    return Channels(tuple(Coupling(Axis(x, int(p)), Axis(y, k)) for k, p in enumerate(perm)))


def slice_(node: ir.Node) -> Channels | None:
    """Axes that are not sliced pass through."""
    x = node.inputs[0]
    shape = dims(x)
    starts = integers(node, 1, "starts")
    axes = integers(node, 3, "axes")
    if shape is None or starts is None or axes is None:
        return None
    cut = {along(a, len(shape)) for a in axes or range(len(starts))}
    return _except(node, cut)


def pad(node: ir.Node) -> Channels | None:
    """Axes without padding pass through."""
    shape = dims(node.inputs[0])
    pads = integers(node, 1, "pads")
    axes = integers(node, 3, "axes")
    if shape is None or pads is None or axes is None:
        return None
    half = len(pads) // 2
    named = [along(a, len(shape)) for a in axes] or list(range(len(shape)))
    return _except(node, {k for i, k in enumerate(named) if pads[i] or pads[half + i]})


def tile(node: ir.Node) -> Channels | None:
    repeats = integers(node, 1, "")
    if repeats is None:
        return None
    return _except(node, {k for k, r in enumerate(repeats) if r != 1})


def _except(node: ir.Node, cut: set[int]) -> Channels | None:
    x = node.inputs[0]
    couplings = aligned(x, node.outputs[0]) if x is not None else None
    if couplings is None:
        return None
    return Channels(tuple(c for c in couplings if c.target.axis not in cut))


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


def resize(node: ir.Node) -> Channels | None:
    """Axes whose scale is exactly one pass through."""
    x = node.inputs[0]
    old, new = dims(x), dims(node.outputs[0])
    attributes = attributes_of(node)
    if old is None or new is None or "crop" in str(attributes["coordinate_transformation_mode"]):
        return None
    named = [along(a, len(old)) for a in attributes.get("axes") or range(len(old))]
    scales, sizes = operand(node, 2), operand(node, 3)
    if sizes is not None:
        changed = {k for k in named if old[k] != new[k]}
        constant = sizes.const_value is not None
    else:
        constant = scales is not None and scales.const_value is not None
        factors = scales.const_value.numpy() if scales and scales.const_value else ()
        changed = {k for k, f in zip(named, factors, strict=False) if f != 1}
    rule = _except(node, changed) if constant else None
    return Channels(rule.couplings, repair=_resize_sizes) if rule is not None else None


def _resize_sizes(program: Program, node: ir.Node, extents: Extents) -> None:
    y = node.outputs[0]
    rank = len(dims(y) or ())
    stated = integers(node, 3, "") if operand(node, 3) is not None else None
    if stated is None:
        return
    named = [along(a, rank) for a in attributes_of(node).get("axes") or range(rank)]
    sizes = [extents.get(Axis(y, k), s) for k, s in zip(named, stated, strict=True)]
    if tuple(sizes) != stated:
        put_integers(program, node, 3, np.array(sizes, np.int64))


def gather(node: ir.Node) -> Channels | None:
    """Rows picked from a table: its other axes pass through; a weight's are made here."""
    table, indices, y = node.inputs[0], node.inputs[1], node.outputs[0]
    shape, picked = dims(table), dims(indices)
    if table is None or indices is None or shape is None or picked is None:
        return None
    axis = along(int(attributes_of(node)["axis"]), len(shape))
    kept = [k for k in range(len(shape)) if k != axis]
    passed = [
        Coupling(Axis(table, k), Axis(y, k if k < axis else k + len(picked) - 1)) for k in kept
    ]
    passed += [Coupling(Axis(indices, k), Axis(y, axis + k)) for k in range(len(picked))]
    produced = tuple(Axis(table, k) for k in kept) if is_weight(table) else ()
    return Channels(tuple(passed), produced=produced)


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


def shape_of_tensor(node: ir.Node) -> Channels | None:
    """Axes outside `start` to `end` do not show in the result."""
    x = node.inputs[0]
    shape = dims(x)
    if x is None or shape is None:
        return None
    attributes = attributes_of(node)
    end = attributes.get("end")
    seen = range(len(shape))[attributes.get("start") or 0 : end]
    return Channels(
        tuple(Coupling(Axis(x, k), Axis(x, k)) for k in range(len(shape)) if k not in seen)
    )


def depth_to_space(node: ir.Node) -> Channels | None:
    attributes = attributes_of(node)
    squared = int(attributes["blocksize"]) ** 2
    return _blocks(node, node.outputs[0], node.inputs[0], squared, attributes["mode"] == "CRD")


def space_to_depth(node: ir.Node) -> Channels | None:
    squared = int(attributes_of(node)["blocksize"]) ** 2
    return _blocks(node, node.inputs[0], node.outputs[0], squared, False)


def _blocks(
    node: ir.Node, few: ir.Value | None, many: ir.Value | None, squared: int, inner: bool
) -> Channels | None:
    shape = dims(few)
    if few is None or many is None or shape is None or not isinstance(shape[1], int):
        return None
    batch = Coupling(Axis(few, 0), Axis(many, 0))
    if inner:
        return Channels((batch, Coupling(Axis(few, 1), Axis(many, 1), repeat=squared)))
    return Channels((batch, *_spread(Axis(few, 1), Axis(many, 1), squared, shape[1])))


CHANNEL_RULES: dict[str, ChannelRule] = {
    **dict.fromkeys(POINTWISE, pointwise),
    **dict.fromkeys(ALONG_AXIS, along_axis),
    **dict.fromkeys(POOLS, pool),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(RESHAPES, reshape_like),
    **dict.fromkeys(("ArgMax", "ArgMin"), arg_reduction),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), layer_normalization),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), linear_quantization),
    "BatchNormalization": batch_normalization,
    "Concat": concat,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "Gather": gather,
    "Gemm": gemm,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "MatMul": matmul,
    "Pad": pad,
    "Reshape": reshape,
    "Resize": resize,
    "Shape": shape_of_tensor,
    "Slice": slice_,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Tile": tile,
    "Transpose": transpose,
}
"""Channel rule by operator type of the default domain; an operator without one pins its axes."""
