"""Operators that reduce, order or run along axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from tests.fuzz.families.pointwise import types_of
from tests.fuzz.graph import DOUBLE, FLOAT, INT32, INT64, Draw, Graph, Refused, schema_of

POSITIVE = ("ReduceLogSum",)


def reduce(g: Graph, d: Draw, op_type: str) -> Any:
    schema = schema_of(op_type, g.opset)
    types = [t for t in types_of(schema, g.opset) if t != DOUBLE] if schema is not None else []
    x = g.find(d, types if d.chance(30) else (FLOAT,), empty=d.chance(20))
    if op_type in POSITIVE:
        x = g.into(x, 0.1, 10)
    rank = g.rank(x)
    axes: list[int] | None = [a - rank if d.chance(30) else a for a in d.some(range(rank))]
    if not axes and d.chance(70):
        axes = None
    noop = d.one_of((None, 0, 1)) if g.attribute(op_type, "noop_with_empty_axes") else None
    if axes == [] and g.attribute(op_type, "axes"):
        axes = None
    return g.with_axes(op_type, x, axes, keepdims=d.one_of((None, 0, 1)), noop_with_empty_axes=noop)


def arg(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, (FLOAT, FLOAT, INT32), low=1)
    return g.add(op_type, x, axis=d.one_of((None, *range(-g.rank(x), g.rank(x)))),
                 keepdims=d.one_of((None, 0, 1)),
                 select_last_index=d.one_of((None, 0, 1)))  # fmt: skip


def top_k(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, (FLOAT, FLOAT, INT64), low=1)
    axis = d.axis(g.rank(x))
    k = g.ints([d.integer(1, g.shape(x)[axis])])
    return g.add("TopK", x, k, outputs=2, axis=axis, largest=d.integer(0, 1), sorted=1)


def softmax(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, low=1, empty=d.chance(10))
    return g.add(op_type, x, axis=d.one_of((None, *range(-g.rank(x), g.rank(x)))))


def scan(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, (FLOAT, FLOAT, INT64, INT32), low=1)
    axis = g.weight(np.asarray(d.axis(g.rank(x))), d.one_of((INT64, INT32)), shared=False)
    return g.add(op_type, x, axis, exclusive=d.one_of((None, 1)), reverse=d.one_of((None, 1)))


def det(g: Graph, d: Draw, op_type: str) -> Any:
    size = d.one_of((2, 1, 3))
    return g.add("Det", g.like(d, (*d.shape(0, 1), size, size)))


def unique(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, (INT64, FLOAT), low=1)
    axis = d.axis(g.rank(x)) if d.chance(40) else None
    return g.add("Unique", x, outputs=d.one_of((1, 4)), axis=axis, sorted=d.one_of((None, 0, 1)))


def normalize(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, low=1)
    if op_type == "MeanVarianceNormalization":
        axes = d.some(range(g.rank(x))) or [0]
        deviation, mean = torch.std_mean(g.known[x], axes, correction=0)
        if not bool((deviation > 0.1 * mean.abs() + 0.01).all()):
            raise Refused("no variance, which ONNX Runtime takes from a difference of squares")
        return g.add(op_type, x, axes=axes)
    return g.add(op_type, x, axis=d.axis(g.rank(x)), p=d.one_of((None, 1, 2)))


def layer_norm(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, low=1)
    axis = d.axis(g.rank(x))
    inner = g.shape(x)[axis:]
    scale = parameter(g, d, inner)
    if op_type == "RMSNormalization":
        return g.add(op_type, x, scale, axis=axis, epsilon=d.one_of((None, 1e-3)))
    bias = g.like(d, inner) if d.chance(60) else None
    return g.add(op_type, x, scale, bias, axis=axis, epsilon=d.one_of((None, 1e-3, 0.1)))


def channel_norm(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.image(d, 2 if op_type == "LRN" else None)
    channels = g.shape(x)[1]
    if op_type == "InstanceNormalization":
        return g.add(op_type, x, parameter(g, d, (channels,)), g.like(d, (channels,)))
    if op_type == "LRN":
        return g.add(op_type, x, size=d.one_of((1, 3, 5)), alpha=d.one_of((None, 0.1)),
                     beta=d.one_of((None, 0.5)), bias=d.one_of((None, 2.0)))  # fmt: skip
    groups = d.one_of([k for k in range(1, channels + 1) if channels % k == 0])
    count = channels if g.opset >= 21 else groups
    return g.add(op_type, x, parameter(g, d, (count,)), g.like(d, (count,)), num_groups=groups)


def batch_norm(g: Graph, d: Draw, op_type: str) -> Any:
    return normalized(g, d, g.find(d, low=2) if d.chance(40) else g.image(d))


def normalized(g: Graph, d: Draw, x: ir.Value) -> ir.Value:
    """BatchNormalization of `x` with drawn statistics."""
    channels = (g.shape(x)[1],)
    if not channels[0]:
        raise Refused("no channels")
    scale, mean, bias = parameter(g, d, channels), g.array(channels), g.array(channels)
    variance = np.abs(g.array(channels)) + 0.1
    return g.add("BatchNormalization", x, scale, *(g.weight(a) for a in (bias, mean, variance)),
                 epsilon=d.one_of((None, 1e-3)))  # fmt: skip


def parameter(g: Graph, d: Draw, shape: tuple[int, ...]) -> ir.Value:
    """A vector near 1; sometimes exactly 1, sometimes with zeros."""
    way = d.integer(0, 9)
    array = 1 + 0.3 * g.array(shape)
    if way == 8:
        array = np.ones(shape)
    if way == 9:
        array = array * g.rng.integers(0, 2, shape)
    return g.weight(array)


def dropout(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, empty=True)
    ratio = g.weight(np.asarray(0.5), FLOAT, shared=False) if d.chance(50) else None
    return g.add("Dropout", x, ratio, outputs=1)


_REDUCTIONS = ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSum", "LogSumExp")

FAMILIES = {
    **{f"Reduce{name}": reduce for name in _REDUCTIONS},
    "ArgMax": arg, "ArgMin": arg, "TopK": top_k, "Softmax": softmax, "LogSoftmax": softmax,
    "Hardmax": softmax, "CumSum": scan, "CumProd": scan, "Det": det, "Unique": unique,
    "LpNormalization": normalize, "MeanVarianceNormalization": normalize,
    "LayerNormalization": layer_norm, "RMSNormalization": layer_norm,
    "InstanceNormalization": channel_norm, "GroupNormalization": channel_norm,
    "LRN": channel_norm, "BatchNormalization": batch_norm, "Dropout": dropout,
}  # fmt: skip
