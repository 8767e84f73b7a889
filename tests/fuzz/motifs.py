"""Compositions that the exact passes look for, and some that they must leave alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from tests.fuzz.families import movement
from tests.fuzz.families.contraction import convolved, matrix
from tests.fuzz.families.quantized import grid
from tests.fuzz.families.reduction import normalized
from tests.fuzz.graph import DOUBLE, FLOAT, INT8, INT32, INT64, Draw, Graph

ACTIVATIONS = ("Relu", "Sigmoid", "Tanh", "HardSwish", "LeakyRelu", "Elu", "Softplus", "Erf")


def activated(g: Graph, d: Draw, x: ir.Value) -> ir.Value:
    kind = d.one_of((*ACTIVATIONS, "none"))
    return x if kind == "none" or (g.opset < 14 and kind == "HardSwish") else g.add(kind, x)


def conv_block(g: Graph, d: Draw) -> Any:
    """Conv, batch normalisation, activation; or the normalisation first."""
    x = g.image(d)
    if d.chance(30):
        x = normalized(g, d, x)
    y = convolved(g, d, x)
    if d.chance(70):
        y = normalized(g, d, y)
    return activated(g, d, y)


def residual(g: Graph, d: Draw) -> Any:
    """x + f(x)."""
    x = g.image(d, 2)
    channels, spatial = g.shape(x)[1], g.shape(x)[2:]
    kernel = [1, 3][d.integer(0, 1) if min(spatial) > 2 else 0]
    pads = [kernel // 2] * 4
    inner = d.one_of((4, 2, 3))
    y = g.add("Conv", x, g.scaled((inner, channels, kernel, kernel)), pads=pads)
    y = activated(g, d, normalized(g, d, y) if d.chance(60) else y)
    y = g.add("Conv", y, g.scaled((channels, inner, kernel, kernel)), pads=pads)
    return activated(g, d, g.add("Add", *((x, y) if d.chance(50) else (y, x))))


def dense(g: Graph, d: Draw) -> Any:
    """MatMul, bias, activation, and perhaps a factor by number that folds into the weights."""
    x = matrix(g, d) if d.chance(50) else g.find(d, low=1)
    depth, width = g.shape(x)[-1], d.size()
    y = g.add("MatMul", x, g.scaled((depth, width), max(1, depth)))
    if d.chance(70):
        y = g.add("Add", y, g.weight(g.array((width,))))
    if d.chance(30):
        y = g.add(d.one_of(("Mul", "Div")), y, g.weight(np.asarray(d.one_of((2.0, 0.5, 3.0)))))
    return activated(g, d, y)


def shared_weight(g: Graph, d: Draw) -> Any:
    """Two products with one matrix, one of them scaled."""
    x = matrix(g, d)
    depth = g.shape(x)[1]
    weight = g.scaled((depth, depth), depth)
    y = g.add("MatMul", x, weight)
    if d.chance(60):
        y = g.add("Mul", y, g.weight(1 + 0.3 * g.array((depth,))))
    return g.add("Add", g.add("MatMul", y, weight), x)


def dead_channels(g: Graph, d: Draw) -> Any:
    """A contraction some of whose channels are constant, or are not read."""
    x = g.image(d, 2)
    channels, inner = g.shape(x)[1], d.one_of((4, 3, 5))
    first, bias = g.array((inner, channels, 1, 1)), g.array((inner,))
    second = g.array((d.one_of((2, 3)), inner, 1, 1)) / np.sqrt(inner)
    for c in range(inner):
        way = d.integer(0, 3)
        if way == 1:
            first[c], bias[c] = 0, -abs(bias[c])
        elif way == 2:
            first[c] = 0
        elif way == 3:
            second[:, c] = 0
    y = g.add("Conv", x, g.weight(first), g.weight(bias))
    if d.chance(70):
        y = g.add("Relu", y)
    if d.chance(30):
        y = g.add("Add", g.add("Mul", y, y), y)
    return g.add("Conv", y, g.weight(second), g.weight(g.array(second.shape[:1])),
                 pads=[1, 1, 1, 1] if d.chance(30) else None)  # fmt: skip


def dead_units(g: Graph, d: Draw) -> Any:
    """The same for two matrix products."""
    x = matrix(g, d)
    depth, inner = g.shape(x)[1], d.one_of((4, 6))
    first, bias = g.array((depth, inner)) / np.sqrt(depth), g.array((inner,))
    first[:, 1], bias[1] = 0, -0.5
    first[:, 2] = 0
    y = g.add("Gemm", x, g.weight(first), g.weight(bias))
    y = g.add(d.one_of(("Relu", "Sigmoid", "LeakyRelu")), y)
    return g.add("Gemm", y, g.scaled((inner, d.size()), inner), None)


def layer_norm(g: Graph, d: Draw) -> Any:
    """Layer normalisation spelled out."""
    x = g.find(d, low=2)
    mean = g.with_axes("ReduceMean", x, [-1], keepdims=1)
    centred = g.add("Sub", x, mean)
    square = (g.add("Pow", centred, g.weight(np.asarray(2.0), shared=False)) if d.chance(60)
              else g.add("Mul", centred, centred))  # fmt: skip
    variance = g.with_axes("ReduceMean", square, [-1], keepdims=1)
    root = g.add("Sqrt", g.add("Add", variance, g.weight(np.asarray(1e-2), shared=False)))
    y = g.add("Div", centred, root)
    width = (g.shape(x)[-1],)
    y = g.add("Mul", y, g.weight(1 + 0.3 * g.array(width)))
    return g.add("Add", y, g.weight(g.array(width))) if d.chance(70) else y


def attention(g: Graph, d: Draw) -> Any:
    """Softmax(q·kᵀ·s + mask)·v, perhaps guarded against rows without any score."""
    x = g.find(d, low=3, high=3)
    rows, width = g.shape(x)[-2:]
    q, k, v = (g.add("MatMul", x, g.scaled((width, width), width)) for _ in range(3))
    scores = g.add("MatMul", q, g.add("Transpose", k, perm=[0, 2, 1]))
    if d.chance(60):
        scores = g.add(d.one_of(("Mul", "Div")), scores, g.weight(np.asarray(0.5)))
    if d.chance(40):
        lowest = -np.inf if d.chance(30) else -1e4
        mask = np.triu(np.full((rows, rows), lowest, np.float32), 1) if lowest else None
        scores = g.add("Add", scores, g.weight(mask, shared=False), finite=False, hidden=True)
    p = g.add("Softmax", scores, axis=-1)
    if d.chance(50):
        p = g.add("Where", g.add("IsNaN", p), g.weight(np.zeros(()), shared=False), p)
    return g.add("MatMul", p, v)


def gelu(g: Graph, d: Draw) -> Any:
    """The Erf and the Tanh form of Gelu, or x · sigmoid(x)."""
    x = g.find(d)
    way = d.integer(0, 2)
    if way == 0:
        return g.add("Mul", x, g.add("Sigmoid", x))
    if way == 1:
        inner = g.add("Erf", g.add("Div", x, g.weight(np.asarray(np.sqrt(2)), shared=False)))
    else:
        cube = g.add("Mul", x, g.add("Mul", x, x))
        small = g.add("Mul", g.weight(np.asarray(0.044715), shared=False), cube)
        root = g.weight(np.asarray(np.sqrt(2 / np.pi)), shared=False)
        inner = g.add("Tanh", g.add("Mul", g.add("Add", x, small), root))
    half = g.add("Mul", x, g.weight(np.asarray(0.5), shared=False))
    return g.add("Mul", half, g.add("Add", inner, g.weight(np.ones(()), shared=False)))


def chain(g: Graph, d: Draw) -> Any:
    """Movements and conversions in a row, many of which do nothing or undo each other."""
    x = g.find(d, movement.ANY, empty=True)
    for _ in range(d.integer(2, 4)):
        way = d.integer(0, 6)
        rank = g.rank(x)
        if way == 0:
            x = g.add("Identity", x)
        elif way == 1 and rank:
            x = g.add("Transpose", x, perm=d.permutation(rank))
        elif way == 2 and g.known[x].numel():
            sizes = movement.factors(d, g.known[x].numel(), d.integer(1, 4))
            x = g.add("Reshape", x, g.ints(sizes))
        elif way == 3:
            to = d.one_of((FLOAT, DOUBLE, INT64, INT32, INT8))
            source = g.into(x, -100, 100) if x.dtype in (FLOAT, DOUBLE) else x
            x = g.add("Cast", source, to=int(to), dtype=to)
        elif way == 4 and rank:
            lows = [d.integer(0, 1) if size > 2 else 0 for size in g.shape(x)]
            ends = [2**31 if d.chance(50) else size for size in g.shape(x)]
            x = g.add("Slice", x, g.ints(lows), g.ints(ends), g.ints(list(range(rank))))
        elif way == 5 and x.dtype == FLOAT:
            low = d.integer(-2, 0)
            bounds = [g.weight(np.asarray(b), shared=False) for b in (low, low + d.integer(0, 3))]
            x = g.add("Relu", x) if d.chance(40) else g.add("Clip", x, *bounds)
        elif rank < 5:
            x = g.with_axes("Unsqueeze", x, [d.integer(0, rank)])
    return x


def nothing(g: Graph, d: Draw) -> Any:
    """Arithmetic without effect."""
    x = g.find(d, (FLOAT, FLOAT, INT64), empty=True)
    kind = d.one_of(("Add", "Mul", "Sub", "Div"))
    number = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}[kind]
    shape = d.one_of(((), (1,), g.shape(x), (1, *(1 for _ in g.shape(x)))))
    operands = [x, g.weight(np.full(shape, number), x.dtype or FLOAT, shared=False)]
    if kind in ("Add", "Mul") and d.chance(40):
        operands.reverse()
    return g.add(kind, *operands)


def twice(g: Graph, d: Draw) -> Any:
    """The same computed twice and joined."""
    x = g.find(d)
    kind = d.one_of(("Relu", "Tanh", "Neg", "Abs"))
    pair = [g.add(kind, x), g.add(kind, x)]
    return g.add("Concat", *pair, axis=0) if g.rank(x) and d.chance(50) else g.add("Add", *pair)


def constants(g: Graph, d: Draw) -> Any:
    """A branch of constants that meets the data: it can be computed beforehand."""
    x = g.find(d)
    shape = g.shape(x)
    c = g.weight(g.array(shape))
    for _ in range(d.integer(1, 3)):
        c = g.add(d.one_of(("Tanh", "Neg", "Abs", "Sigmoid")), c)
    if len(shape) > 1 and d.chance(50):
        order = d.permutation(len(shape))
        back = [order.index(i) for i in range(len(shape))]
        c = g.add("Transpose", g.add("Transpose", c, perm=order), perm=back)
    return g.add(d.one_of(("Add", "Mul", "Sub")), x, c)


def pad_conv(g: Graph, d: Draw) -> Any:
    """Pad, then Conv."""
    x = g.image(d, 2)
    pads = [0, 0, *(d.integer(0, 2) for _ in range(2)), 0, 0, *(d.integer(0, 2) for _ in range(2))]
    value = g.weight(np.asarray(d.one_of((0.0, 0.0, 1.0))), shared=False)
    mode = "constant" if d.chance(80) else "edge"
    return convolved(g, d, g.add("Pad", x, g.ints(pads), value, mode=mode))


def half_turned(g: Graph, d: Draw) -> Any:
    """Reshape to three axes, Transpose of the last two, Reshape back."""
    x = g.find(d, low=3)
    shape = g.shape(x)
    lead = int(np.prod(shape[:-2]))
    flat = g.add("Reshape", x, g.ints([lead, *shape[-2:]]))
    turned = g.add("Transpose", flat, perm=[0, 2, 1])
    return g.add("Reshape", turned, g.ints([*shape[:-2], shape[-1], shape[-2]]))


# -- quantised ----------------------------------------------------------------------------


def pair(g: Graph, d: Draw, x: ir.Value, parameters: tuple[ir.Value, ir.Value]) -> ir.Value:
    return g.add("DequantizeLinear", g.add("QuantizeLinear", x, *parameters), *parameters)


def qdq_move(g: Graph, d: Draw) -> Any:
    """A movement between two pairs of the same parameters, or of others."""
    x = g.image(d, 2)
    parameters = grid(g, d)
    y = pair(g, d, x, parameters)
    kind = d.one_of(("Transpose", "Reshape", "MaxPool", "Concat", "Slice", "Flatten", "Unsqueeze"))
    if kind == "Transpose":
        y = g.add(kind, y, perm=d.permutation(4))
    elif kind == "Reshape":
        y = g.add(kind, y, g.ints([-1]))
    elif kind == "MaxPool":
        if min(g.shape(x)[2:]) < 2:
            return y
        y = g.add(kind, y, kernel_shape=[2, 2], pads=[1, 0, 0, 1] if d.chance(50) else None)
    elif kind == "Concat":
        y = g.add(kind, y, pair(g, d, g.add("Relu", x), parameters), axis=d.integer(0, 3))
    elif kind == "Slice":
        y = g.add(kind, y, g.ints([0]), g.ints([1]), g.ints([1]))
    elif kind == "Unsqueeze":
        y = g.with_axes(kind, y, [0])
    else:
        y = g.add(kind, y)
    return pair(g, d, y, parameters if d.chance(70) else grid(g, d))


def qdq_layer(g: Graph, d: Draw) -> Any:
    """A contraction of quantised data and quantised weights, with a float bias."""
    conv = d.chance(60)
    x = g.image(d, 2) if conv else matrix(g, d)
    depth, width = g.shape(x)[1], d.one_of((3, 4, 1))
    x = pair(g, d, x, grid(g, d))
    if conv:
        weight, axis = g.scaled((width, depth, 1, 1)), 0
    else:
        weight, axis = g.scaled((depth, width), max(1, depth)), 1
    if d.chance(60):
        largest = np.abs(g.known[weight].numpy()).max(
            tuple(i for i in range(g.rank(weight)) if i != axis)
        )
        scale = g.weight(np.maximum(largest, 1e-3) / 127, shared=False)
        zero = g.weight(np.zeros(width), INT8, shared=False)
        levels = g.add("QuantizeLinear", weight, scale, zero, axis=axis, hidden=True)
        weight = g.add("DequantizeLinear", levels, scale, zero, axis=axis, hidden=True)
    else:
        weight = pair(g, d, weight, grid(g, d, spread=d.one_of((2.0, 0.2))))
    bias = g.weight(0.3 * g.array((width,))) if d.chance(70) else None
    if conv:
        y = g.add("Conv", x, weight, bias)
    elif d.chance(50):
        y = g.add("Gemm", x, weight, bias)
    else:
        y = g.add("MatMul", x, weight)
        y = g.add("Add", y, bias) if bias is not None else y
    if d.chance(50):
        y = g.add("Relu", y)
    return pair(g, d, y, grid(g, d)) if d.chance(60) else y


def masks(g: Graph, d: Draw) -> Any:
    """A branch of integers and booleans that selects."""
    x = g.find(d, empty=True)
    test = g.add(d.one_of(("Less", "Greater", "GreaterOrEqual")), x, g.meeting(d, x))
    if d.chance(50):
        test = g.add("Not", test)
    if d.chance(40):
        counted = g.add("Cast", test, to=int(INT64), dtype=INT64)
        total = g.with_axes("ReduceSum", counted, None, keepdims=0)
        return g.add("Mul", counted, total)
    if d.chance(30):
        return g.add("Cast", test, to=int(d.one_of((FLOAT, INT32))))
    return g.add("Where", test, x, g.meeting(d, x))


MOTIFS: Mapping[str, Callable[[Graph, Draw], Any]] = {
    f.__name__: f
    for f in (
        conv_block, residual, dense, shared_weight, dead_channels, dead_units, layer_norm,
        attention, gelu, chain, nothing, twice, constants, pad_conv, half_turned, qdq_move,
        qdq_layer, masks,
    )
}  # fmt: skip
