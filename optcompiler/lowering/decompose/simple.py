"""Operators that are a few others, where the ONNX schema does not say so itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from optcompiler.lowering.decompose.tape import Tape, ints, typed
from optcompiler.lowering.expand import Decomposition, Expansion, Facts
from optcompiler.ops.spec import attributes_of
from optcompiler.program import static_shape


def _x(node: ir.Node, place: int = 0) -> ir.Value:
    value = node.inputs[place]
    assert value is not None
    return value


def hardmax(node: ir.Node, facts: Facts) -> Expansion | None:
    """1 at the first largest element of an axis, 0 elsewhere."""
    x, tape = _x(node), Tape()
    shape = facts.shapes[x]
    axis = int(attributes_of(node).get("axis", -1)) % len(shape)
    best = tape("ArgMax", x, axis=axis, keepdims=1)
    place = np.arange(shape[axis], dtype=np.int64).reshape([-1] + [1] * (len(shape) - axis - 1))
    return tape.done(tape("Cast", tape("Equal", best, place), to=x.dtype))


def lp_normalization(node: ir.Node, facts: Facts) -> Expansion | None:
    """x / |x|, 0 where the norm is."""
    x, tape = _x(node), Tape()
    attributes = attributes_of(node)
    op = "ReduceL1" if attributes.get("p") == 1 else "ReduceL2"
    norm = tape(op, x, ints(int(attributes.get("axis", -1))), keepdims=1)
    nothing = typed(0, x)
    empty = tape("Equal", norm, nothing)
    return tape.done(tape("Where", empty, nothing, tape("Div", x, norm)))


def global_lp_pool(node: ir.Node, facts: Facts) -> Expansion | None:
    x, tape = _x(node), Tape()
    p = int(attributes_of(node).get("p") or 2)
    power = tape("Pow", tape("Abs", x), typed(p, x))
    axes = ints(*range(2, len(facts.shapes[x])))
    return tape.done(tape("Pow", tape("ReduceSum", power, axes), typed(1 / p, x)))


def lrn(node: ir.Node, facts: Facts) -> Expansion | None:
    """x / (bias + alpha / size * sum of squares of `size` channels) ** beta."""
    x, tape = _x(node), Tape()
    attributes = attributes_of(node)
    shape, size = facts.shapes[x], int(attributes["size"])
    before = (size - 1) // 2
    ends = [0, before] + [0] * (len(shape) - 2), [0, size - 1 - before] + [0] * (len(shape) - 2)
    squares = tape("Pad", tape("Mul", x, x), ints(*ends[0], *ends[1]))
    total = tape.part(squares, 1, 0, shape[1])
    for i in range(1, size):
        total = tape("Add", total, tape.part(squares, 1, i, i + shape[1]))
    scaled = tape("Mul", total, typed(attributes["alpha"] / size, x))
    base = tape("Add", scaled, typed(attributes["bias"], x))
    return tape.done(tape("Div", x, tape("Pow", base, typed(attributes["beta"], x))))


def dropout(node: ir.Node, facts: Facts) -> Expansion | None:
    """What inference does: nothing. Training draws numbers, unless its ratio is 0."""
    x, tape = _x(node), Tape()
    given = node.inputs[2] if len(node.inputs) > 2 else None
    training = facts.array(node, 2)
    ratio = facts.array(node, 1)
    nothing = ratio is not None and not ratio.any()
    if given is not None and (training is None or training.any()) and not nothing:
        return None
    results = [tape("Identity", x)]
    if len(node.outputs) > 1:
        results.append(tape.constant(np.ones(facts.shapes[x], np.bool_)))
    return tape.done(*results)


def batch_normalization(node: ir.Node, facts: Facts) -> Expansion | None:
    """With parameters known only when it runs, or statistics of the batch itself."""
    x, tape = _x(node), Tape()
    attributes, shape = attributes_of(node), facts.shapes[x]
    wide = [-1] + [1] * (len(shape) - 2)
    scale, bias, mean, variance = (_x(node, i) for i in range(1, 5))
    results: list[ir.Value] = []
    if attributes.get("training_mode"):
        axes = ints(0, *range(2, len(shape)))
        found = tape("ReduceMean", x, axes, keepdims=1)
        off = tape("Sub", x, found)
        spread = tape("ReduceMean", tape("Mul", off, off), axes, keepdims=0)
        momentum = float(attributes["momentum"])
        found = tape.reshape(found, [-1])
        for old, new in ((mean, found), (variance, spread)):
            kept = tape("Mul", old, typed(momentum, old))
            results.append(tape("Add", kept, tape("Mul", new, typed(1 - momentum, old))))
        mean, variance = found, spread
        dtype = x.dtype
    else:
        dtype = variance.dtype
    assert dtype is not None
    epsilon = np.asarray(attributes["epsilon"]).astype(dtype.numpy())
    deviation = tape("Sqrt", tape("Add", variance, epsilon))
    mean, deviation, scale, bias = (
        tape("Reshape", v, ints(*wide)) for v in (mean, deviation, scale, bias)
    )
    y = tape("Div", tape("Sub", x, mean), deviation)
    y = tape("Add", tape("Mul", y, scale), bias)
    return tape.done(y, *results[: len(node.outputs) - 1])


def one_hot(node: ir.Node, facts: Facts) -> Expansion | None:
    indices, values, tape = _x(node), _x(node, 2), Tape()
    known, shape = facts.array(node, 1), static_shape(node.outputs[0])
    rank = len(facts.shapes[indices]) + 1
    axis = int(attributes_of(node).get("axis", -1)) % rank
    if known is not None:
        depth = int(known.reshape(-1)[0])
    elif shape is not None:
        depth = shape[axis]
    else:
        return None
    index = tape("Unsqueeze", tape("Cast", indices, to=ir.DataType.INT64), ints(axis))
    below = tape("Less", index, ints(0))
    index = tape("Where", below, tape("Add", index, ints(depth)), index)
    place = np.arange(depth, dtype=np.int64).reshape([-1] + [1] * (rank - axis - 1))
    off, on = (tape("Gather", values, np.array(i, np.int64)) for i in (0, 1))
    return tape.done(tape("Where", tape("Equal", index, place), on, off))


def eye_like(node: ir.Node, facts: Facts) -> Expansion | None:
    attributes, tape = attributes_of(node), Tape()
    dtype = ir.DataType(attributes["dtype"]) if attributes.get("dtype") else _x(node).dtype
    assert dtype is not None
    eye = np.eye(*facts.shapes[_x(node)], k=int(attributes.get("k") or 0))
    return tape.done(tape.constant(eye.astype(dtype.numpy())))


def pad(node: ir.Node, facts: Facts) -> Expansion | None:
    """Modes that repeat the input: a gather by known places along every axis."""
    x, tape = _x(node), Tape()
    mode = str(attributes_of(node).get("mode") or "constant")
    pads, some = facts.array(node, 1), facts.array(node, 3)
    shape = facts.shapes[x]
    if mode == "constant" or pads is None or (len(node.inputs) > 3 and some is None):
        return None
    axes = range(len(shape)) if some is None else [int(a) % len(shape) for a in some]
    y = x
    for i, axis in enumerate(axes):
        low, high = int(pads[i]), int(pads[i + len(pads) // 2])
        if not low and not high:
            continue
        places = np.pad(np.arange(shape[axis]), (max(low, 0), max(high, 0)), mode=mode)  # type: ignore[reportCallIssue]
        places = places[max(-low, 0) : len(places) - max(-high, 0)]
        y = tape("Gather", y, places.astype(np.int64), axis=axis)
    return tape.done(tape("Identity", y))


def max_unpool(node: ir.Node, facts: Facts) -> Expansion | None:
    x, indices, tape = _x(node), _x(node, 1), Tape()
    shape = static_shape(node.outputs[0])
    if shape is None or len(node.inputs) > 2:
        return None
    nothing = tape.constant(np.zeros(int(np.prod(shape)), typed(0, x).dtype))
    flat = tape("ScatterElements", nothing, tape.reshape(indices, [-1]), tape.reshape(x, [-1]))
    return tape.done(tape.reshape(flat, shape))


def col2im(node: ir.Node, facts: Facts) -> Expansion | None:
    """Columns [N, C * kernel, blocks] added into the image at their places."""
    x, tape = _x(node), Tape()
    image, block = facts.array(node, 1), facts.array(node, 2)
    if image is None or block is None:
        return None
    attributes, rank = attributes_of(node), image.size
    strides = attributes.get("strides") or [1] * rank
    dilations = attributes.get("dilations") or [1] * rank
    pads = attributes.get("pads") or [0] * (2 * rank)
    n, rows, _ = facts.shapes[x]
    wide = [int(s) + pads[i] + pads[i + rank] for i, s in enumerate(image)]
    places = np.zeros((), np.int64)
    for i in range(rank):
        count = (wide[i] - dilations[i] * (int(block[i]) - 1) - 1) // strides[i] + 1
        at = np.arange(block[i])[:, None] * dilations[i] + np.arange(count) * strides[i]
        step = int(np.prod(wide[i + 1 :]))
        places = (places[..., None, None] + at * step) if i else at * step
    order = (*range(0, 2 * rank, 2), *range(1, 2 * rank, 2))
    flat = places.transpose(order).reshape(-1).astype(np.int64)
    channels = rows // int(np.prod(block))
    space = (n, channels, flat.size)
    nothing = np.zeros((n, channels, int(np.prod(wide))), typed(0, x).dtype)
    total = tape(
        "ScatterElements", nothing, np.broadcast_to(flat, space).copy(),
        tape.reshape(x, space), axis=2, reduction="add",
    )  # fmt: skip
    y = tape.reshape(total, (n, channels, *wide))
    for i, size in enumerate(image):
        y = tape.part(y, 2 + i, pads[i], pads[i] + int(size))
    return tape.done(y)


def tensor_scatter(node: ir.Node, facts: Facts) -> Expansion | None:
    """Rows of an update written into a cache from a place of every batch element on."""
    cache, update, tape = _x(node), _x(node, 1), Tape()
    attributes = attributes_of(node)
    shape, part = facts.shapes[cache], facts.shapes[update]
    axis = int(attributes.get("axis", -2)) % len(shape)
    rows = np.arange(part[axis], dtype=np.int64).reshape([-1] + [1] * (len(shape) - axis - 1))
    first = node.inputs[2] if len(node.inputs) > 2 else None
    index = tape.constant(rows)
    if first is not None:
        start = tape.reshape(first, [-1] + [1] * (len(shape) - 1))
        index = tape("Add", start, index)
    if attributes.get("mode") == "circular":
        index = tape("Mod", index, ints(shape[axis]))
    index = tape("Expand", index, ints(*part))
    return tape.done(tape("ScatterElements", cache, index, update, axis=axis))


def einsum(node: ir.Node, facts: Facts) -> Expansion | None:
    """Two operands without repeated letters, as a matrix product."""
    text = str(attributes_of(node)["equation"]).replace(" ", "")
    if "." in text or text.count(",") != 1:
        return None
    inputs, _, out = text.partition("->")
    a, b = inputs.split(",")
    if "->" not in text:
        out = "".join(sorted(c for c in {*a, *b} if (a + b).count(c) == 1))
    if any(len(set(t)) != len(t) for t in (a, b, out)):
        return None
    batch = [c for c in out if c in a and c in b]
    inner = [c for c in a if c in b and c not in out]
    rows = [c for c in a if c not in b and c in out]
    columns = [c for c in b if c not in a and c in out]
    if len(batch) + len(inner) + len(rows) != len(a):
        return None
    if len(batch) + len(inner) + len(columns) != len(b):
        return None
    tape = Tape()
    sizes = dict(zip(a + b, (*facts.shapes[_x(node)], *facts.shapes[_x(node, 1)]), strict=True))

    def count(letters: list[str]) -> int:
        return int(np.prod([sizes[c] for c in letters], dtype=np.int64))

    def arranged(x: ir.Value, have: str, want: list[str], shape: list[int]) -> ir.Value:
        turned = tape("Transpose", x, perm=[have.index(c) for c in want])
        return tape.reshape(turned, shape)

    outer = [sizes[c] for c in batch]
    left = arranged(_x(node), a, batch + rows + inner, [*outer, count(rows), count(inner)])
    right = arranged(
        _x(node, 1), b, batch + inner + columns, [*outer, count(inner), count(columns)]
    )
    have = batch + rows + columns
    y = tape.reshape(tape("MatMul", left, right), [sizes[c] for c in have])
    return tape.done(tape("Transpose", y, perm=[have.index(c) for c in out]))


def implied(node: ir.Node, facts: Facts) -> Expansion | None:
    """A shape given only when it runs, from the shape that the model declares for the output."""
    place = {"ConstantOfShape": 0, "CenterCropPad": 1, "AffineGrid": 1}[node.op_type]
    shape = static_shape(node.outputs[0])
    if shape is None or facts.array(node, place) is not None:
        return None
    if node.op_type == "CenterCropPad":
        axes = attributes_of(node).get("axes")
        shape = shape if axes is None else tuple(shape[a] for a in axes)
    elif node.op_type == "AffineGrid":
        shape = (shape[0], 1, *shape[1:-1])
    tape = Tape()
    wanted = tape.constant(ints(*shape))
    inputs = [wanted if i == place else v for i, v in enumerate(node.inputs)]
    again = ir.Node(
        "", node.op_type, inputs, list(node.attributes.values()), version=node.version
    )  # fmt: skip
    tape.nodes.append(again)
    return tape.done(again.outputs[0])


SIMPLE: Mapping[str, Decomposition] = {
    "Hardmax": hardmax, "LpNormalization": lp_normalization, "GlobalLpPool": global_lp_pool,
    "LRN": lrn, "Dropout": dropout, "BatchNormalization": batch_normalization, "OneHot": one_hot,
    "EyeLike": eye_like, "Pad": pad, "MaxUnpool": max_unpool, "Col2Im": col2im,
    "TensorScatter": tensor_scatter, "Einsum": einsum, "ConstantOfShape": implied,
    "CenterCropPad": implied, "AffineGrid": implied,
}  # fmt: skip
