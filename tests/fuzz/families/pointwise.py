"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from tests.fuzz.graph import (
    BOOL,
    DOUBLE,
    FLOAT,
    INT8,
    INT32,
    INT64,
    TYPES,
    UINT8,
    Draw,
    Graph,
    Refused,
    runs,
    schema_of,
)

DOMAINS: Mapping[str, tuple[float, float]] = {
    "Log": (0.05, 50), "Sqrt": (0.01, 100), "Reciprocal": (0.2, 20), "Asin": (-0.95, 0.95),
    "Acos": (-0.95, 0.95), "Atanh": (-0.9, 0.9), "Acosh": (1.1, 20), "Tan": (-1.2, 1.2),
    "Exp": (-10, 4), "Sinh": (-4, 4), "Cosh": (-4, 4),
}  # fmt: skip
"""Where the operator is defined, and smooth enough to be compared."""

STRINGS: Mapping[str, tuple[str, ...]] = {"approximate": ("none", "tanh")}


def types_of(schema: onnx.defs.OpSchema, opset: int) -> list[ir.DataType]:
    """Types of the first operand that ONNX allows and ONNX Runtime computes, float first."""
    if not schema.inputs:
        return []
    variable = schema.inputs[0].type_str
    allowed = next(
        (set(c.allowed_type_strs) for c in schema.type_constraints if c.type_param_str == variable),
        {variable},
    )
    return [
        t for t in TYPES
        if (text := f"tensor({t.name.lower()})") in allowed
        and runs(schema.name, opset, ((variable, text),))
    ]  # fmt: skip


def operand(g: Graph, d: Draw, op_type: str) -> ir.Value:
    schema = schema_of(op_type, g.opset)
    types = types_of(schema, g.opset) if schema is not None else []
    if not types:
        raise Refused(f"{op_type} has no type here")
    if d.chance(60):
        types = types[:1]
    return g.find(d, types, empty=True)


def numbers(g: Graph, d: Draw, op_type: str) -> dict[str, Any]:
    """Float and string attributes of the schema, sometimes left at their defaults."""
    schema = schema_of(op_type, g.opset)
    given: dict[str, Any] = {}
    for name, attribute in schema.attributes.items() if schema is not None else ():
        if d.chance(50):
            continue
        if name in STRINGS:
            given[name] = d.one_of(STRINGS[name])
        elif attribute.type == onnx.defs.OpSchema.AttrType.FLOAT:
            given[name] = d.one_of((0.5, 0.25, 1.0, 1.5, 0.01))
    return given


def generic(g: Graph, d: Draw, op_type: str) -> Any:
    """One operand, or several that broadcast; float attributes anywhere in (0, 1.5]."""
    schema = schema_of(op_type, g.opset)
    if schema is None:
        raise Refused(op_type)
    x = operand(g, d, op_type)
    if x.dtype in (FLOAT, DOUBLE) and op_type in DOMAINS:
        x = g.into(x, *DOMAINS[op_type])
    operands = [x]
    last = schema.inputs[-1]
    if last.option == onnx.defs.OpSchema.FormalParameterOption.Variadic:
        operands += [g.meeting(d, x) for _ in range(d.integer(0, 2))]
    elif len(schema.inputs) == 2:
        operands.append(g.meeting(d, x))
        if op_type in ("Sub", "And", "Or", "Less") and d.chance(5):
            operands[1] = x
        if d.chance(30):
            operands.reverse()
    return g.add(op_type, *operands, **numbers(g, d, op_type))


def div(g: Graph, d: Draw, op_type: str) -> Any:
    x = operand(g, d, "Div")
    if x.dtype in (FLOAT, DOUBLE):
        return g.add("Div", x, g.into(g.meeting(d, x), 0.3, 5))
    shape = g.shape(g.meeting(d, x))
    by = g.array(shape, x.dtype)
    return g.add("Div", x, g.weight(np.where(by == 0, 2, by), x.dtype))


def mod(g: Graph, d: Draw, op_type: str) -> Any:
    x = operand(g, d, "Mod")
    by = g.array(g.shape(g.meeting(d, x)), x.dtype)
    floats = x.dtype in (FLOAT, DOUBLE)
    return g.add("Mod", x, g.weight(np.where(np.abs(by) < 0.5, 2, by), x.dtype),
                 fmod=1 if floats else d.integer(0, 1))  # fmt: skip


def power(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, (FLOAT, FLOAT, INT32, INT64), empty=True)
    if x.dtype != FLOAT:
        return g.add("Pow", x, g.weight(np.asarray(d.integer(0, 2)), x.dtype, shared=False))
    if d.chance(60):
        exponent = d.one_of((2.0, 1.0, 0.0, 3.0))
        kind = d.one_of((FLOAT, FLOAT, INT64, INT32))
        return g.add("Pow", x, g.weight(np.asarray(exponent), kind, shared=False))
    return g.add("Pow", g.into(x, 0.1, 4), g.into(g.meeting(d, x), -2, 2))


def prelu(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, low=1)
    shape = g.shape(x)
    slope = [size if d.chance(50) else 1 for size in shape[d.integer(0, len(shape)) :]]
    return g.add("PRelu", x, g.weight(np.abs(g.array(slope)) * 0.3))


def clip(g: Graph, d: Draw, op_type: str) -> Any:
    x = operand(g, d, "Clip")
    low, high = sorted((d.integer(-3, 3), d.integer(-3, 3)))
    if x.dtype == UINT8:
        low, high = abs(low), abs(low) + 2
    bounds = [g.weight(np.asarray(b), x.dtype, shared=False) for b in (low, high)]
    way = d.integer(0, 3)
    return g.add("Clip", x, None if way == 2 else bounds[0], None if way == 3 else bounds[1])


def where(g: Graph, d: Draw, op_type: str) -> Any:
    condition = g.find(d, (BOOL,), empty=True)
    if d.chance(50):
        condition = g.weight(g.array(g.shape(condition), BOOL), BOOL)
    dtype = d.one_of((FLOAT, FLOAT, INT64, INT32, UINT8))
    x = g.meeting(d, condition, dtype)
    return g.add("Where", condition, x, g.meeting(d, x))


def shift(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, (UINT8,), empty=True)
    by = np.abs(g.array(g.shape(g.meeting(d, x)), UINT8).astype(int)) % 8
    return g.add("BitShift", x, g.weight(by, UINT8), direction=d.one_of(("LEFT", "RIGHT")))


def cast(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, (FLOAT, FLOAT, INT64, BOOL, INT32, INT8, UINT8, DOUBLE), empty=True)
    to = d.one_of((FLOAT, INT64, INT32, BOOL, INT8, UINT8, DOUBLE))
    if x.dtype in (FLOAT, DOUBLE) and to not in (FLOAT, DOUBLE, BOOL):
        # what lies outside the type's range has no defined conversion
        x = g.into(x, 0 if to == UINT8 else -100, 100)
    if op_type == "CastLike":
        return g.add("CastLike", x, g.find(d, (to,), empty=True))
    return g.add("Cast", x, to=int(to), dtype=to)


def bit_cast(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, (INT8, UINT8), empty=True)
    to = UINT8 if x.dtype == INT8 else INT8
    return g.add("BitCast", x, to=int(to), dtype=to)


def is_inf(g: Graph, d: Draw, op_type: str) -> Any:
    x = g.find(d, (FLOAT, DOUBLE), empty=True)
    return g.add("IsInf", x, detect_negative=d.integer(0, 1), detect_positive=d.integer(0, 1))


FAMILIES = {
    "Div": div, "Mod": mod, "Pow": power, "PRelu": prelu, "Clip": clip, "Where": where,
    "BitShift": shift, "Cast": cast, "CastLike": cast, "BitCast": bit_cast, "IsInf": is_inf,
}  # fmt: skip
