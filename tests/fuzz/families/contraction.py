"""Convolutions, matrix products and Einsum, in float and in integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from tests.fuzz.families.movement import reshaped
from tests.fuzz.graph import INT8, UINT8, Draw, Graph, Refused


def window(
    d: Draw, sizes: Sequence[int], *, dilated: bool = True, most: int = 3
) -> tuple[list[int], dict[str, Any]]:
    """A kernel that fits into the spatial `sizes`, and strides, pads and dilations for it."""
    kernel = [d.integer(1, min(most, size)) for size in sizes]
    given: dict[str, Any] = {}
    dilations = [1] * len(sizes)
    if dilated and d.chance(20):
        dilations = [
            d.one_of((1, 2)) if 2 * (k - 1) < s else 1 for k, s in zip(kernel, sizes, strict=True)
        ]
        given["dilations"] = dilations
    if d.chance(40):
        given["strides"] = [d.one_of((1, 2, 3)) for _ in sizes]
    way = d.integer(0, 9)
    if way >= 8:
        # ONNX Runtime takes neither a dilation nor a stride that skips elements with SAME
        strides = given.get("strides", [1] * len(sizes))
        plain = "dilations" not in given and all(
            s <= k for s, k in zip(strides, kernel, strict=True)
        )
        given["auto_pad"] = d.one_of(("SAME_UPPER", "SAME_LOWER", "VALID")) if plain else "VALID"
    elif way >= 3:
        given["pads"] = [d.integer(0, k - 1) for k in [*kernel, *kernel]]
    return kernel, given


def conv(g: Graph, d: Draw, op_type: str) -> Any:
    return convolved(g, d, g.image(d))


def convolved(g: Graph, d: Draw, x: ir.Value, channels: int | None = None) -> ir.Value:
    """A Conv of `x` to so many channels, with or without groups and bias."""
    sizes = g.shape(x)
    kernel, given = window(d, sizes[2:])
    channels = channels or d.one_of((1, 2, 3, 4, 8, 5))
    groups = d.one_of([k for k in (1, 1, 1, sizes[1], 2) if sizes[1] % k == 0])
    channels = -(-channels // groups) * groups
    shape = (channels, sizes[1] // groups, *kernel)
    weight = _filter(g, d, shape)
    bias = g.like(d, (channels,)) if d.chance(60) else None
    return g.add("Conv", x, weight, bias, group=groups if groups > 1 or d.chance(20) else None,
                 kernel_shape=kernel if d.chance(50) else None, **given)  # fmt: skip


def _filter(g: Graph, d: Draw, shape: Sequence[int]) -> ir.Value:
    """Weights of a contraction: shared with another node, an activation, or fresh."""
    if d.chance(20):
        return g.like(d, shape)
    return g.scaled(shape)


def conv_transpose(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.image(d)
    sizes = g.shape(x)
    kernel = [d.integer(1, 3) for _ in sizes[2:]]
    groups = d.one_of([k for k in (1, 1, sizes[1]) if sizes[1] % k == 0])
    channels = d.one_of((1, 2, 3))
    given: dict[str, Any] = {}
    strides = [d.one_of((1, 2)) for _ in kernel]
    if d.chance(50):
        given["strides"] = strides
        if d.chance(40):
            given["output_padding"] = [s - 1 for s in strides]
    if d.chance(50):
        given["pads"] = [d.integer(0, (k - 1) // 2) for k in [*kernel, *kernel]]
    bias = g.like(d, (channels * groups,)) if d.chance(50) else None
    weight = _filter(g, d, (sizes[1], channels, *kernel))
    return g.add("ConvTranspose", x, weight, bias, group=groups if groups > 1 else None, **given)


def matrix(g: Graph, d: Draw) -> ir.Value:
    """A float value [M, K]."""
    x = g.find(d)
    shape = g.shape(x)
    if len(shape) == 2:
        return x
    rows = shape[0] if len(shape) > 1 else 1
    return reshaped(g, x, (rows, g.known[x].numel() // rows))


def matmul(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, low=1, empty=d.chance(10))
    depth = g.shape(x)[-1]
    way = d.integer(0, 9)
    columns = d.size()
    if way == 9:
        other = g.like(d, (depth,))
    elif way >= 7 and g.rank(x) > 2:
        lead = [
            1 if d.chance(30) else size for size in g.shape(x)[d.integer(0, g.rank(x) - 2) : -2]
        ]
        other = g.like(d, (*lead, depth, columns))
    elif way >= 5:
        other = g.like(d, (depth, columns))
    else:
        other = g.scaled((depth, columns), max(depth, 1))
    if way == 0 and g.rank(x) >= 2:
        return g.add("MatMul", g.scaled((columns, g.shape(x)[-2]), max(g.shape(x)[-2], 1)), x)
    return g.add("MatMul", x, other)


def gemm(g: Graph, d: Draw, op_type: str) -> Any:
    x = matrix(g, d)
    turned, other = d.chance(20), d.chance(50)
    rows, depth = g.shape(x)[::-1] if turned else g.shape(x)
    columns = d.size()
    weight = _filter(g, d, (columns, depth) if other else (depth, columns))
    bias = None
    if d.chance(70):
        shape = d.one_of(((columns,), (1, columns), (rows, columns), (rows, 1), (), (1,)))
        bias = g.like(d, shape)
    return g.add(
        "Gemm", x, weight, bias, transA=int(turned) or None, transB=int(other) or None,
        alpha=d.one_of((None, 0.5, 1.0)),
        beta=d.one_of((None, 2.0, 0.0)) if bias is not None else None,
    )  # fmt: skip


EQUATIONS = ("ij,jk->ik", "bij,bjk->bik", "ij,ij->", "ij->ji", "ij->i", "bij,bkj->bik", "i,j->ij",
             "...ij,...jk->...ik", "ij,jk", "bhid,bhjd->bhij")  # fmt: skip


def einsum(g: Graph, d: Draw, op_type: str) -> Any:
    equation = d.one_of(EQUATIONS)
    extents: dict[str, int] = {}
    operands = []
    for i, term in enumerate(equation.split("->")[0].split(",")):
        letters = term.replace("...", "")
        x = g.find(d, low=len(letters), high=len(letters)) if i == 0 else None
        for letter, size in zip(letters, g.shape(x) if x is not None else (), strict=False):
            extents[letter] = size
        wanted = [extents.setdefault(letter, d.size()) for letter in letters]
        operands.append(x if x is not None else g.like(d, wanted))
    return g.add("Einsum", *operands, equation=equation)


def integer(g: Graph, d: Draw, op_type: str) -> Any:
    kind, weight_kind = d.one_of((UINT8, INT8)), d.one_of((INT8, UINT8))
    if op_type == "MatMulInteger":
        x = g.find(d, (kind,), low=2, high=3)
        if x.dtype != kind:
            raise Refused("no integers")
        y = g.weight(g.array((g.shape(x)[-1], d.size()), weight_kind), weight_kind)
    else:
        fitting = [v for v in g.values if v.dtype == kind and g.rank(v) == 4 and g.known[v].numel()]
        x = d.one_of(fitting) if fitting else g.fresh(d, (1, d.size(), 5, 4), kind)
        kernel, given = window(d, g.shape(x)[2:], dilated=False)
        shape = (d.size(), g.shape(x)[1], *kernel)
        y = g.weight(g.array(shape, weight_kind), weight_kind)
        zeros = _zeros(g, d, kind, weight_kind)
        return g.add("ConvInteger", x, y, *zeros, **given)
    return g.add("MatMulInteger", x, y, *_zeros(g, d, kind, weight_kind))


def _zeros(g: Graph, d: Draw, *kinds: ir.DataType) -> list[ir.Value]:
    return [
        g.weight(np.asarray(d.integer(0, 3)), kind, shared=False)
        for kind in kinds[: d.integer(0, len(kinds))]
    ]


FAMILIES = {
    "Conv": conv, "ConvTranspose": conv_transpose, "MatMul": matmul, "Gemm": gemm,
    "Einsum": einsum, "MatMulInteger": integer, "ConvInteger": integer,
}  # fmt: skip
