"""Operators that pick and place elements by indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from tests.fuzz.families.movement import ANY
from tests.fuzz.graph import BOOL, FLOAT, INT32, INT64, Draw, Graph, Refused

NUMBERS = (FLOAT, FLOAT, INT64, INT32)


def indices(
    g: Graph, d: Draw, shape: Sequence[int], size: int, dtype: ir.DataType = INT64
) -> ir.Value:
    """Constant indices into an axis of `size`, some counted from its end; or computed ones."""
    if not size:
        raise Refused("nothing to index")
    fitting = [
        v for v in g.values
        if v.dtype == dtype and v.const_value is None and g.shape(v) == tuple(shape)
        and g.known[v].numel() and int(g.known[v].min()) >= -size and int(g.known[v].max()) < size
    ]  # fmt: skip
    if fitting and d.chance(60):
        return d.one_of(fitting)
    low = -size if d.chance(30) else 0
    return g.weight(g.rng.integers(low, size, shape), dtype, shared=False)


def distinct(g: Graph, shape: Sequence[int], axis: int, size: int) -> np.ndarray:
    """Indices of which no two along `axis` are the same."""
    if shape[axis] > size:
        raise Refused("too many indices")
    order = np.argsort(g.rng.random((*np.delete(shape, axis), size)), -1)[..., : shape[axis]]
    return np.moveaxis(order, -1, axis)


def gather(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, ANY, low=1)
    axis = d.axis(g.rank(x))
    picked = indices(
        g, d, d.one_of(((), (1,), (3,), (2, 2))), g.shape(x)[axis], d.one_of((INT64, INT32))
    )
    return g.add("Gather", x, picked, axis=axis)


def gather_elements(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, ANY, low=1)
    axis = d.integer(0, g.rank(x) - 1)
    shape = [d.integer(1, size) for size in g.shape(x)]
    shape[axis] = d.size()
    return g.add("GatherElements", x, indices(g, d, shape, g.shape(x)[axis]), axis=axis)


def gather_nd(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, ANY, low=1)
    batch = d.integer(0, 1) if g.rank(x) > 1 and d.chance(30) else 0
    depth = d.integer(1, g.rank(x) - batch)
    lead = (*g.shape(x)[:batch], *d.shape(0, 2))
    columns = [g.rng.integers(0, size, lead) for size in g.shape(x)[batch : batch + depth]]
    return g.add("GatherND", x, g.weight(np.stack(columns, -1), INT64, shared=False),
                 batch_dims=batch or None)  # fmt: skip


def scatter_elements(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, NUMBERS, low=1)
    axis = d.integer(0, g.rank(x) - 1)
    shape = [d.integer(1, size) for size in g.shape(x)]
    picked = distinct(g, shape, axis, g.shape(x)[axis])
    kinds = (None, "add", "mul", "max", "min")[: 1 if g.opset < 16 else 3 if g.opset < 18 else 5]
    return g.add("ScatterElements", x, g.weight(picked, INT64, shared=False),
                 g.like(d, shape, x.dtype or FLOAT), axis=axis,
                 reduction=d.one_of(kinds))  # fmt: skip


def scatter_nd(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, NUMBERS, low=1)
    shape = g.shape(x)
    if d.chance(20):
        rows = np.arange(shape[0])[:, None]
        return g.add(
            "ScatterND", x, g.weight(rows, INT64, shared=False), g.like(d, shape, x.dtype or FLOAT)
        )
    depth = d.integer(1, g.rank(x))
    count = d.integer(1, min(3, int(np.prod(shape[:depth]))))
    flat = g.rng.permutation(int(np.prod(shape[:depth])))[:count]
    picked = np.stack(np.unravel_index(flat, shape[:depth]), -1)
    kinds = (None, "add", "mul", "max", "min")[: 1 if g.opset < 16 else 3 if g.opset < 18 else 5]
    return g.add("ScatterND", x, g.weight(picked, INT64, shared=False),
                 g.like(d, (count, *shape[depth:]), x.dtype or FLOAT),
                 reduction=d.one_of(kinds))  # fmt: skip


def tensor_scatter(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.like(d, (2, d.size(), 6, d.one_of((3, 1))))
    shape = list(g.shape(x))
    shape[2] = d.integer(1, 3)
    mode = d.one_of((None, "circular"))
    starts = [d.integer(0, 5 if mode else 6 - shape[2]) for _ in range(shape[0])]
    return g.add("TensorScatter", x, g.like(d, shape), g.ints(starts), axis=-2, mode=mode)


def one_hot(g: Graph, d: Draw, op_type: str) -> Any:
    picked = g.find(d, (INT64,), low=1, high=3)
    depth = g.weight(np.asarray(d.integer(1, 5)), INT64, shared=False)
    pair = d.one_of((np.array([0, 1], np.float32), np.array([-1.5, 2], np.float32)))
    return g.add("OneHot", picked, depth, g.weight(pair), axis=d.one_of((None, 0)))


def non_zero(g: Graph, d: Draw, op_type: str) -> Any:
    return g.add("NonZero", g.find(d, (BOOL, INT64, FLOAT, INT32), low=1))


def compress(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, NUMBERS, low=1)
    axis = d.integer(0, g.rank(x) - 1) if d.chance(60) else None
    length = int(np.prod(g.shape(x))) if axis is None else g.shape(x)[axis]
    return g.add("Compress", x, g.like(d, (length,), BOOL), axis=axis)


FAMILIES = {
    "Gather": gather, "GatherElements": gather_elements, "GatherND": gather_nd,
    "ScatterElements": scatter_elements, "ScatterND": scatter_nd,
    "TensorScatter": tensor_scatter, "OneHot": one_hot, "NonZero": non_zero, "Compress": compress,
}  # fmt: skip
