"""Gelu that an exporter spelled out, in whatever order, as the one operator that it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import onnx_ir as ir

from optcompiler.program import Program, constant
from optcompiler_passes._regions import is_op, is_scalar, same_shape, sole_consumer

OPSET = 20
"""The first that has Gelu."""

Polynomial = Mapping[tuple[int, int], float]
"""Coefficients by powers of x and of the bell: the Erf or Tanh."""

_DEGREE = 4
_DEPTH = 8
_RTOL = 1e-5
"""How far a constant may be from the exact one: exporters write six digits at least."""

_X: Polynomial = {(1, 0): 1.0}
_GELU: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
_ROOT = math.sqrt(2 / math.pi)
_INNER: Mapping[str, tuple[str, Polynomial]] = {
    "Erf": ("none", {(1, 0): math.sqrt(0.5)}),
    "Tanh": ("tanh", {(1, 0): _ROOT, (3, 0): 0.044715 * _ROOT}),
}


def as_gelu(program: Program, bell: ir.Node) -> None:
    """x/2 · (1 + Erf(x/√2)) and x/2 · (1 + Tanh(√(2/π)·(x + 0.044715·x³))) of float x become Gelu.

    `bell` is the Erf or Tanh, which nothing else may read.
    """
    if not is_op(bell, "Erf", "Tanh") or program.opset < OPSET:
        return
    inside = bell.inputs[0]
    if inside is None or inside.dtype != ir.DataType.FLOAT:
        return
    form, wanted = _INNER[bell.op_type]
    for x in _operands(inside):
        if not same_shape(x, inside) or not _equal(_polynomial(inside, x, None), wanted):
            continue
        value = bell.outputs[0]
        for _ in range(_DEPTH):
            node = sole_consumer(value)
            if node is None or not is_op(node, "Add", "Mul", "Div", "Sub"):
                return
            value = node.outputs[0]
            if _equal(_polynomial(value, x, bell.outputs[0]), _GELU):
                if same_shape(x, value):
                    _replace(program, node, x, form)
                return


def _replace(program: Program, last: ir.Node, x: ir.Value, form: str) -> None:
    result = last.outputs[0]
    made = ir.Value(name=result.name, type=result.type, shape=result.shape)
    node = ir.Node("", "Gelu", [x], [ir.AttrString("approximate", form)], outputs=[made])
    ir.convenience.replace_nodes_and_values(program.graph, last, [last], [node], [result], [made])


def _operands(value: ir.Value, depth: int = 5) -> Iterator[ir.Value]:
    """Values that arithmetic makes `value` of, and itself, nearest first."""
    level = [value]
    seen: set[ir.Value] = set()
    for _ in range(depth):
        following: list[ir.Value] = []
        for item in level:
            if item in seen or constant(item) is not None:
                continue
            seen.add(item)
            yield item
            node = item.producer()
            if node is not None and is_op(node, "Add", "Mul", "Div", "Pow", "Sub"):
                following += [v for v in node.inputs if v is not None]
        level = following


def _polynomial(
    value: ir.Value | None, x: ir.Value, bell: ir.Value | None, depth: int = _DEPTH
) -> Polynomial | None:
    """`value` in terms of `x` and `bell`, or None where it is no polynomial of a low degree."""
    if value is x:
        return _X
    if bell is not None and value is bell:
        return {(0, 1): 1.0}
    if value is not None and is_scalar(value):
        array = constant(value)
        assert array is not None
        return {(0, 0): float(array.reshape(()))}
    node = value.producer() if value is not None else None
    if node is None or depth == 0 or not is_op(node, "Add", "Sub", "Mul", "Div", "Pow"):
        return None
    a, b = (_polynomial(v, x, bell, depth - 1) for v in node.inputs[:2])
    if a is None or b is None:
        return None
    match node.op_type:
        case "Add":
            return _sum(a, b, 1.0)
        case "Sub":
            return _sum(a, b, -1.0)
        case "Mul":
            return _product(a, b)
        case _:
            number = b[0, 0] if set(b) == {(0, 0)} else 0.0
            if node.op_type == "Div":
                return _product(a, {(0, 0): 1 / number}) if number else None
            square = _product(a, a)
            if square is None or number not in (2.0, 3.0):
                return None
            return square if number == 2.0 else _product(square, a)


def _sum(a: Polynomial, b: Polynomial, sign: float) -> Polynomial:
    return {k: a.get(k, 0.0) + sign * b.get(k, 0.0) for k in {*a, *b}}


def _product(a: Polynomial, b: Polynomial) -> Polynomial | None:
    result: dict[tuple[int, int], float] = {}
    for (i, j), u in a.items():
        for (k, l), v in b.items():
            result[i + k, j + l] = result.get((i + k, j + l), 0.0) + u * v
    return result if all(i + j <= _DEGREE for i, j in result) else None


def _equal(found: Polynomial | None, wanted: Polynomial) -> bool:
    return found is not None and all(
        abs(found.get(k, 0.0) - wanted.get(k, 0.0)) <= _RTOL * wanted.get(k, 0.0)
        for k in {*found, *wanted}
    )
