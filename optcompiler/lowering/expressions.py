"""The scalar operations of `Call`, and ONNX's pointwise operators written with them.

Both printers share the table: a printer supplies one spelling per operation, and every pointwise
ONNX operator follows. Meaning: the ONNX operator specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optcompiler.lowering.ir import Call, Const, Expr

OPERATIONS: Mapping[str, int] = {
    "add": 2, "sub": 2, "mul": 2, "div": 2, "mod": 2, "fmod": 2, "pow": 2, "min": 2, "max": 2,
    "neg": 1, "abs": 1, "sign": 1, "sqrt": 1, "exp": 1, "log": 1, "erf": 1, "tanh": 1,
    "sigmoid": 1, "sin": 1, "cos": 1, "floor": 1, "ceil": 1, "round": 1, "reciprocal": 1,
    "isnan": 1, "isinf": 1, "eq": 2, "lt": 2, "le": 2, "gt": 2, "ge": 2,
    "and": 2, "or": 2, "xor": 2, "not": 1, "where": 3, "cast": 1,
    "tan": 1, "asin": 1, "acos": 1, "atan": 1, "sinh": 1, "cosh": 1, "asinh": 1, "acosh": 1,
    "atanh": 1, "gelu": 1, "gelu_tanh": 1, "band": 2, "bor": 2, "bxor": 2, "bnot": 1, "shl": 2,
    "shr": 2, "bits": 1, "open": 1,
}  # fmt: skip
"""Arity by operation. "div" truncates and "mod" has the divisor's sign on integers; "round" rounds
half to even; "min" and "max" of floats are NaN when an operand is; "where" takes
(condition, then, else). "band" to "bnot" and the shifts work on the bits of integers, "bits" reads
those of a value as a type of the same size; "open" is a cast to a float of 8 bits that does not end
at its largest number. "gelu" and "gelu_tanh" are of FLOAT alone."""

REAL = frozenset({
    "FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2",
    "FLOAT8E5M2FNUZ", "FLOAT4E2M1",
})  # fmt: skip
"""Element types whose constants are floats."""

SMALL = REAL - {"FLOAT", "DOUBLE"}
"""Those that are for storage: they are computed with as FLOAT."""

BOOLEAN = frozenset({"isnan", "isinf", "eq", "lt", "le", "gt", "ge", "and", "or", "xor", "not"})

Builder = Callable[[Sequence[Expr], Mapping[str, Any]], Expr]


def call(op: str, *args: Expr) -> Expr:
    """`op` on `args`; the type is BOOL for a predicate, else that of the last argument."""
    return Call("BOOL" if op in BOOLEAN else args[-1].dtype, op, args)


def is_extreme(value: Expr, extreme: Expr) -> Expr:
    """Whether `value` is the minimum or maximum that was found: equal, or NaN as it is then."""
    equal = call("eq", value, extreme)
    return call("or", equal, call("isnan", value)) if value.dtype in REAL else equal


def cast(arg: Expr, dtype: str) -> Expr:
    return arg if arg.dtype == dtype else Call(dtype, "cast", (arg,))


def number(value: float, like: Expr) -> Const:
    """A constant of the type of `like`."""
    return Const(like.dtype, float(value) if like.dtype in REAL else int(value))


def simple(op: str) -> Builder:
    def build(args: Sequence[Expr], attributes: Mapping[str, Any]) -> Expr:
        return call(op, *args)

    return build


def variadic(op: str) -> Builder:
    def build(args: Sequence[Expr], attributes: Mapping[str, Any]) -> Expr:
        result = args[0]
        for arg in args[1:]:
            result = call(op, result, arg)
        return result

    return build


def clamp(x: Expr, low: float, high: float) -> Expr:
    return call("min", call("max", x, number(low, x)), number(high, x))


def relu(args: Sequence[Expr], attributes: Mapping[str, Any]) -> Expr:
    return call("max", args[0], number(0, args[0]))


def clip(x: Expr, low: Expr | None, high: Expr | None) -> Expr:
    """Clip, whose bounds may be absent: the one pointwise operator outside `POINTWISE`."""
    if low is not None:
        x = call("max", x, low)
    return x if high is None else call("min", x, high)


def gelu(args: Sequence[Expr], attributes: Mapping[str, Any]) -> Expr:
    x = args[0]
    if x.dtype == "FLOAT":
        return call("gelu_tanh" if attributes.get("approximate") == "tanh" else "gelu", x)
    half = call("mul", number(0.5, x), x)
    if attributes.get("approximate") == "tanh":
        cube = call("mul", call("mul", x, x), x)
        inner = call("add", x, call("mul", number(0.044715, x), cube))
        bell = call("tanh", call("mul", number(math.sqrt(2 / math.pi), x), inner))
    else:
        bell = call("erf", call("mul", number(math.sqrt(0.5), x), x))
    return call("mul", half, call("add", number(1, x), bell))


def leaky_relu(args: Sequence[Expr], attributes: Mapping[str, Any]) -> Expr:
    x = args[0]
    slope = number(attributes.get("alpha") or 0.01, x)
    return call("where", call("lt", x, number(0, x)), call("mul", slope, x), x)


def prelu(args: Sequence[Expr], attributes: Mapping[str, Any]) -> Expr:
    x, slope = args
    return call("where", call("lt", x, number(0, x)), call("mul", slope, x), x)


def elu(args: Sequence[Expr], attributes: Mapping[str, Any]) -> Expr:
    x = args[0]
    alpha = number(attributes.get("alpha", 1.0), x)
    low = call("mul", alpha, call("sub", call("exp", x), number(1, x)))
    return call("where", call("lt", x, number(0, x)), low, x)


def softplus(args: Sequence[Expr], attributes: Mapping[str, Any]) -> Expr:
    x = args[0]
    tail = call("exp", call("neg", call("abs", x)))
    return call("add", relu(args, attributes), call("log", call("add", number(1, x), tail)))


def hard_sigmoid_of(x: Expr, alpha: float, beta: float) -> Expr:
    line = call("add", call("mul", number(alpha, x), x), number(beta, x))
    return clamp(line, 0, 1)


def hard_sigmoid(args: Sequence[Expr], attributes: Mapping[str, Any]) -> Expr:
    return hard_sigmoid_of(args[0], attributes.get("alpha", 0.2), attributes.get("beta", 0.5))


def hard_swish(args: Sequence[Expr], attributes: Mapping[str, Any]) -> Expr:
    return call("mul", args[0], hard_sigmoid_of(args[0], 1 / 6, 0.5))


def swish(args: Sequence[Expr], attributes: Mapping[str, Any]) -> Expr:
    x = args[0]
    alpha = attributes.get("alpha", 1.0)
    inner = x if alpha == 1.0 else call("mul", number(alpha, x), x)
    return call("mul", x, call("sigmoid", inner))


def mish(args: Sequence[Expr], attributes: Mapping[str, Any]) -> Expr:
    return call("mul", args[0], call("tanh", softplus(args, attributes)))


def power(args: Sequence[Expr], attributes: Mapping[str, Any]) -> Expr:
    base, exponent = args
    if isinstance(exponent, Const):
        if exponent.value == 2:
            return call("mul", base, base)
        if exponent.value == 3:
            return call("mul", call("mul", base, base), base)
        if exponent.value == 0.5 and base.dtype == "FLOAT":
            return call("sqrt", base)
    return call("pow", base, cast(exponent, base.dtype))


def modulo(args: Sequence[Expr], attributes: Mapping[str, Any]) -> Expr:
    return call("fmod" if attributes.get("fmod") else "mod", *args)


def shift(args: Sequence[Expr], attributes: Mapping[str, Any]) -> Expr:
    return call("shl" if attributes.get("direction") == "LEFT" else "shr", *args)


def isinf(args: Sequence[Expr], attributes: Mapping[str, Any]) -> Expr:
    x = args[0]
    found: Expr = call("isinf", x)
    for name, op in (("detect_negative", "gt"), ("detect_positive", "lt")):
        if attributes.get(name) == 0:
            found = call("and", found, call(op, x, number(0, x)))
    return found


def mean(args: Sequence[Expr], attributes: Mapping[str, Any]) -> Expr:
    total = variadic("add")(args, attributes)
    return call("mul", total, number(1 / len(args), total))


POINTWISE: Mapping[str, Builder] = {
    "Add": simple("add"), "Sub": simple("sub"), "Mul": simple("mul"), "Div": simple("div"),
    "Mod": modulo, "Pow": power, "Min": variadic("min"), "Max": variadic("max"),
    "Sum": variadic("add"), "Mean": mean, "Neg": simple("neg"), "Abs": simple("abs"),
    "Sign": simple("sign"), "Sqrt": simple("sqrt"), "Exp": simple("exp"), "Log": simple("log"),
    "Erf": simple("erf"), "Tanh": simple("tanh"), "Sigmoid": simple("sigmoid"),
    "Sin": simple("sin"), "Cos": simple("cos"), "Floor": simple("floor"),
    "Ceil": simple("ceil"), "Round": simple("round"), "Reciprocal": simple("reciprocal"),
    "Relu": relu, "Gelu": gelu, "LeakyRelu": leaky_relu, "PRelu": prelu,
    "Elu": elu, "Softplus": softplus, "HardSigmoid": hard_sigmoid, "HardSwish": hard_swish,
    "Swish": swish, "Mish": mish, "IsNaN": simple("isnan"), "IsInf": isinf,
    "Equal": simple("eq"), "Less": simple("lt"), "LessOrEqual": simple("le"),
    "Greater": simple("gt"), "GreaterOrEqual": simple("ge"), "And": simple("and"),
    "Or": simple("or"), "Xor": simple("xor"), "Not": simple("not"), "Where": simple("where"),
    "Tan": simple("tan"), "Asin": simple("asin"), "Acos": simple("acos"), "Atan": simple("atan"),
    "Sinh": simple("sinh"), "Cosh": simple("cosh"), "Asinh": simple("asinh"),
    "Acosh": simple("acosh"), "Atanh": simple("atanh"), "BitwiseAnd": simple("band"),
    "BitwiseOr": simple("bor"), "BitwiseXor": simple("bxor"), "BitwiseNot": simple("bnot"),
    "BitShift": shift,
}  # fmt: skip
"""ONNX operator → expression of its inputs' expressions and its attributes (defaults filled in)."""
