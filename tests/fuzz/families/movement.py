"""Operators that move, cut or repeat elements, and those that make shapes and ranges."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from tests.fuzz.graph import BOOL, DOUBLE, FLOAT, INT8, INT32, INT64, UINT8, Draw, Graph, Refused

ANY = (FLOAT, FLOAT, FLOAT, INT64, INT32, BOOL, UINT8, INT8, DOUBLE)


def factors(d: Draw, count: int, rank: int) -> list[int]:
    """`rank` sizes whose product is `count`."""
    sizes = [1] * rank
    for prime in _primes(count):
        sizes[d.integer(0, rank - 1)] *= prime
    return sizes


def _primes(count: int) -> list[int]:
    found, p = [], 2
    while count > 1:
        while count % p == 0:
            found.append(p)
            count //= p
        p += 1
    return found


def reshape(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, ANY, empty=True)
    shape = g.shape(x)
    count = prod(shape)
    if count == 0 or (count == 1 and d.chance(20)):
        wanted = list(shape) if count == 0 else []
    else:
        wanted = factors(d, count, d.integer(1, 4))
    if g.attribute("Reshape", "allowzero") and d.chance(10):
        return g.add("Reshape", x, g.ints(wanted), allowzero=1)
    way = d.integer(0, 9)
    if way >= 7:
        return (
            g.add("Reshape", x, g.sizes(d, wanted))
            if count
            else g.add("Reshape", x, g.ints(wanted))
        )
    if way >= 4 and wanted and count:
        wanted[d.integer(0, len(wanted) - 1)] = -1
    if way >= 6:
        for i in range(min(len(wanted), len(shape))):
            if wanted[i] == shape[i]:
                wanted[i] = 0
    return g.add("Reshape", x, g.ints(wanted))


def transpose(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, ANY, empty=True)
    rank = g.rank(x)
    return g.add("Transpose", x, perm=d.permutation(rank) if rank and d.chance(80) else None)


def squeeze(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, ANY, empty=True)
    ones = [i for i, size in enumerate(g.shape(x)) if size == 1]
    axes = d.some(ones)
    if not axes and ones and d.chance(50):
        return g.add("Squeeze", x)
    if not axes:
        return unsqueeze(g, d, "Unsqueeze")
    return g.with_axes("Squeeze", x, [a - g.rank(x) if d.chance(20) else a for a in axes])


def unsqueeze(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, ANY, high=4, empty=True)
    rank = g.rank(x) + 1
    axes = [d.axis(rank)] if d.chance(80) else [0, rank]
    return g.with_axes("Unsqueeze", x, axes)


def flatten(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, ANY, low=1, empty=True)
    return g.add("Flatten", x, axis=d.one_of((None, *range(-g.rank(x), g.rank(x) + 1))))


def concat(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, ANY, low=1, empty=True)
    axis = d.axis(g.rank(x))
    parts = [x]
    for _ in range(d.integer(0, 2)):
        shape = list(g.shape(x))
        shape[axis] = shape[axis] if d.chance(60) else d.size()
        parts.insert(d.integer(0, len(parts)), g.like(d, shape, x.dtype or FLOAT))
    return g.add("Concat", *parts, axis=axis)


def split(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, ANY, low=1, empty=True)
    axis = d.axis(g.rank(x))
    size, count = g.shape(x)[axis], d.integer(1, 3)
    cuts = sorted(d.integer(0, size) for _ in range(count - 1))
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    if g.opset >= 18 and size >= count and d.chance(40):
        return g.add("Split", x, outputs=count, axis=axis, num_outputs=count)
    if g.opset < 18 and size % count == 0 and d.chance(40):
        return g.add("Split", x, outputs=count, axis=axis)
    return g.add("Split", x, g.ints(lengths), outputs=count, axis=axis)


def slice_(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, ANY, low=1, empty=True)
    axes = d.some(range(g.rank(x))) or [d.integer(0, g.rank(x) - 1)]
    starts, ends, steps = [], [], []
    for axis in axes:
        size = g.shape(x)[axis]
        step = d.one_of((1, 1, 1, 2, 3, -1, -2))
        start, end = d.integer(0, size), d.integer(0, size)
        start, end = (
            (min(start, end), max(start, end)) if step > 0 else (max(start, end), min(start, end))
        )
        if d.chance(30):
            end = 2**63 - 1 if step > 0 else -(2**63)
        if d.chance(30):
            start = 0 if step > 0 else size
        if start and d.chance(20):
            start -= size
        starts.append(start)
        ends.append(end)
        steps.append(step)
    plain = axes == list(range(len(axes)))
    if plain and all(s == 1 for s in steps) and d.chance(50):
        return g.add("Slice", x, g.ints(starts), g.ints(ends))
    axes = [a - g.rank(x) if d.chance(20) else a for a in axes]
    given = g.ints(steps) if any(s != 1 for s in steps) or d.chance(50) else None
    return g.add("Slice", x, g.ints(starts), g.ints(ends), g.ints(axes), given)


def expand(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, ANY, high=3, empty=True)
    shape = [d.size() if size == 1 else size for size in g.shape(x)]
    shape = [*(d.one_of((1, 2, 3)) for _ in range(d.integer(0, 1))), *shape]
    return g.add("Expand", x, g.sizes(d, [1 if d.chance(20) else s for s in shape]))


def tile(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, ANY, low=1, high=4, empty=True)
    return g.add("Tile", x, g.ints([d.one_of((1, 2, 3)) for _ in g.shape(x)]))


def pad(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, (FLOAT, FLOAT, INT64, INT32), low=1, high=5)
    rank = g.rank(x)
    mode = d.one_of(("constant", "constant", "reflect", "edge", "wrap"))
    if mode == "wrap" and g.opset < 19:
        mode = "edge"
    axes = sorted(d.some(range(rank))) if g.opset >= 18 and d.chance(40) else list(range(rank))
    if not axes:
        raise Refused("no axes")

    def amount(axis: int) -> int:
        size = g.shape(x)[axis]
        if mode == "constant" and size > 2 and d.chance(15):
            return -1
        return d.integer(0, min(2, size - 1) if mode != "constant" else 2) if d.chance(60) else 0

    pads = [amount(a) for a in axes] + [amount(a) for a in axes]
    value = None
    if mode == "constant" and d.chance(50):
        value = g.weight(np.asarray(d.one_of((0, 1, -2))), x.dtype or FLOAT, shared=False)
    given = g.ints(axes) if len(axes) < rank else None
    return g.add("Pad", x, g.ints(pads), value, given, mode=mode)


def blocks(g: Graph, d: Draw, op_type: str) -> Any:
    size = d.one_of((2, 1, 3))
    n, c, h, w = d.one_of((1, 2)), d.one_of((1, 2, 3)), d.one_of((1, 2, 3)), d.one_of((1, 2, 4))
    if op_type == "DepthToSpace":
        x = g.like(d, (n, c * size * size, h, w))
        return g.add(op_type, x, blocksize=size, mode=d.one_of((None, "DCR", "CRD")))
    return g.add(op_type, g.like(d, (n, c, h * size, w * size)), blocksize=size)


def trilu(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, (FLOAT, FLOAT, INT64), low=2, empty=True)
    k = g.weight(np.asarray(d.integer(-3, 3)), INT64, shared=False) if d.chance(60) else None
    return g.add("Trilu", x, k, upper=d.one_of((None, 0, 1)))


def reverse_sequence(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, (FLOAT, FLOAT, INT64, INT32), low=2)
    batch = d.integer(0, 1)
    lengths = [d.integer(1, g.shape(x)[1 - batch]) for _ in range(g.shape(x)[batch])]
    return g.add("ReverseSequence", x, g.ints(lengths), batch_axis=batch, time_axis=1 - batch)


def center_crop_pad(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, (FLOAT, FLOAT, INT32), low=1, high=4)
    axes = d.some(range(g.rank(x))) or [0]
    wanted = [max(1, g.shape(x)[a] + d.integer(-3, 3)) for a in axes]
    every = axes == list(range(g.rank(x))) and d.chance(50)
    return g.add("CenterCropPad", x, g.ints(wanted), axes=None if every else axes)


def col2im(g: Graph, d: Draw, op_type: str) -> Any:
    image, block = (d.one_of((5, 4, 7)), d.one_of((5, 6))), (d.one_of((2, 1)), d.one_of((2, 3)))
    stride, pads = d.one_of((1, 2)), d.one_of((0, 1))
    count = prod((i + 2 * pads - b) // stride + 1 for i, b in zip(image, block, strict=True))
    x = g.like(d, (d.one_of((1, 2)), d.one_of((1, 3)) * prod(block), count))
    return g.add("Col2Im", x, g.ints(image), g.ints(block), strides=[stride] * 2,
                 pads=[pads] * 4)  # fmt: skip


# -- shapes and ranges --------------------------------------------------------------------


def shape(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, ANY, empty=True)
    if op_type == "Size":
        return g.add("Size", x)
    rank = g.rank(x)
    if not g.attribute("Shape", "start") or d.chance(50):
        return g.add("Shape", x)
    return g.add("Shape", x, start=d.integer(-rank - 1, rank), end=d.one_of((None, rank, -1, 1)))


def constant_of_shape(g: Graph, d: Draw, op_type: str) -> Any:
    wanted = [d.one_of((1, 2, 3, 5, 0)) for _ in range(d.integer(0, 3))]
    value = d.one_of((None, np.zeros(1, np.float32), np.full(1, 1.5, np.float32),
                      np.ones(1, np.int64), np.ones(1, bool)))  # fmt: skip
    tensor = None if value is None else ir.tensor(value)
    return g.add("ConstantOfShape", g.sizes(d, wanted), value=tensor)


def range_(g: Graph, d: Draw, op_type: str) -> Any:
    dtype = d.one_of((INT64, INT32, FLOAT))
    start, delta = d.integer(-3, 3), d.one_of((1, 2, -1))
    limit = start + delta * d.integer(0, 6)
    size = next((v for v in g.values if g.shape(v) == () and v.dtype == INT64
                 and 0 <= int(g.known[v]) <= 20 and v.const_value is None), None)  # fmt: skip
    if dtype == INT64 and size is not None and d.chance(50):
        return g.add("Range", _scalar(g, 0, dtype), size, _scalar(g, 1, dtype))
    return g.add("Range", *(_scalar(g, v, dtype) for v in (start, limit, delta)))


def _scalar(g: Graph, number: float, dtype: ir.DataType) -> ir.Value:
    return g.weight(np.asarray(number), dtype, shared=False)


def eye_like(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, (FLOAT, INT64), low=2, high=2)
    return g.add("EyeLike", x, k=d.one_of((None, 1, -1)), dtype=None)


def windows(g: Graph, d: Draw, op_type: str) -> Any:
    size = _scalar(g, d.one_of((8, 5, 2, 1)), d.one_of((INT64, INT32)))
    return g.add(op_type, size, periodic=d.one_of((None, 0, 1)),
                 output_datatype=onnx.TensorProto.FLOAT)  # fmt: skip


def reshaped(g: Graph, value: ir.Value, wanted: Sequence[int]) -> ir.Value:
    """`value` in another shape of as many elements."""
    if g.shape(value) == tuple(wanted):
        return value
    return g.add("Reshape", value, g.ints(list(wanted)))


FAMILIES = {
    "Reshape": reshape, "Transpose": transpose, "Squeeze": squeeze, "Unsqueeze": unsqueeze,
    "Flatten": flatten, "Concat": concat, "Split": split, "Slice": slice_, "Expand": expand,
    "Tile": tile, "Pad": pad, "DepthToSpace": blocks, "SpaceToDepth": blocks, "Trilu": trilu,
    "ReverseSequence": reverse_sequence, "CenterCropPad": center_crop_pad, "Col2Im": col2im,
    "Shape": shape, "Size": shape, "ConstantOfShape": constant_of_shape, "Range": range_,
    "EyeLike": eye_like, "HannWindow": windows, "HammingWindow": windows,
    "BlackmanWindow": windows,
}  # fmt: skip
