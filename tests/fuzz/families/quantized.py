"""Operators on quantised levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from tests.fuzz.families.contraction import window
from tests.fuzz.graph import INT8, INT32, UINT8, Draw, Graph


def grid(
    g: Graph, d: Draw, dtype: ir.DataType | None = None, spread: float = 4.0
) -> tuple[ir.Value, ir.Value]:
    """A scale that takes [-spread, spread] to the type's range, and a zero point."""
    dtype = dtype or d.one_of((UINT8, INT8))
    scale = g.weight(np.float32(spread / 127), shared=False)
    zero = 128 if dtype == UINT8 and d.chance(80) else 0
    if d.chance(20):
        zero += 3
    return scale, g.weight(np.asarray(zero), dtype, shared=False)


def quantized(
    g: Graph, d: Draw, x: ir.Value, parameters: tuple[ir.Value, ir.Value] | None = None
) -> ir.Value:
    """The levels of `x`."""
    return g.add("QuantizeLinear", x, *(parameters or grid(g, d)))


def quantize(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, empty=d.chance(10))
    if g.rank(x) and d.chance(30):
        axis = d.axis(g.rank(x))
        size = g.shape(x)[axis]
        scale = g.weight((np.abs(g.array((size,))) + 1) / 64, shared=False)
        return g.add(op_type, x, scale, g.weight(np.zeros(size), INT8, shared=False), axis=axis)
    return quantized(g, d, x)


def dequantize(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, (UINT8, INT8, INT32), empty=d.chance(10))
    scale = g.weight(np.float32(4 / 127), shared=False)
    zero = None
    if x.dtype != INT32 and d.chance(70):
        zero = g.weight(np.asarray(d.one_of((0, 3, 100))), x.dtype, shared=False)
    return g.add(op_type, x, scale, zero)


def dynamic(g: Graph, d: Draw, op_type: str) -> Any:
    return g.add(op_type, g.find(d, low=1), outputs=3)


def qlinear(g: Graph, d: Draw, op_type: str) -> Any:
    kind = d.one_of((UINT8, INT8))
    scale, zero = grid(g, d, kind)
    given: dict[str, Any] = {}
    bias = []
    if op_type == "QLinearMatMul":
        x = g.add("QuantizeLinear", g.find(d, low=2, high=3), scale, zero)
        weight = g.array((g.shape(x)[-1], d.size()))
    else:
        x = g.add("QuantizeLinear", g.image(d, 2), scale, zero)
        kernel, given = window(d, g.shape(x)[2:])
        weight = g.array((d.size(), g.shape(x)[1], *kernel))
        if d.chance(50):
            bias = [g.weight(g.rng.integers(-50, 50, weight.shape[:1]), INT32, shared=False)]
    levels = g.weight(np.clip(np.rint(weight * 40), -127, 127), INT8)
    second = [g.weight(np.float32(0.02), shared=False), g.weight(np.asarray(0), INT8, shared=False)]
    return g.add(op_type, x, scale, zero, levels, *second, *grid(g, d, kind, 3.3), *bias, **given)


FAMILIES = {
    "QuantizeLinear": quantize, "DequantizeLinear": dequantize, "DynamicQuantizeLinear": dynamic,
    "QLinearMatMul": qlinear, "QLinearConv": qlinear,
}  # fmt: skip
