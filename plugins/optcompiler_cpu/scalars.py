"""Expressions as C on single elements, in every type; `runtime/scalar.h` has what C lacks."""

from __future__ import annotations

from collections.abc import Callable

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.lowering.extents import is_run_time
from optcompiler.lowering.ir import (
    Accumulator,
    Call,
    Const,
    Dequantize,
    Expr,
    Index,
    Load,
    Quantize,
    View,
)

C_TYPES = {
    "FLOAT": "float", "DOUBLE": "double", "INT64": "int64_t", "INT32": "int32_t",
    "INT16": "int16_t", "INT8": "int8_t", "UINT8": "uint8_t", "BOOL": "uint8_t",
    "UINT16": "uint16_t", "UINT32": "uint32_t", "UINT64": "uint64_t",
    "FLOAT16": "float", "BFLOAT16": "float", "FLOAT8E4M3FN": "float", "FLOAT8E4M3FNUZ": "float",
    "FLOAT8E5M2": "float", "FLOAT8E5M2FNUZ": "float", "FLOAT4E2M1": "float",
    "INT4": "int8_t", "UINT4": "uint8_t", "INT2": "int8_t", "UINT2": "uint8_t",
}  # fmt: skip
"""What is computed with; floats of less than 32 bits are rounded when cast to and when stored."""

SMALL_FLOATS = {
    "FLOAT16": "uint16_t", "BFLOAT16": "uint16_t", "FLOAT8E4M3FN": "uint8_t",
    "FLOAT8E4M3FNUZ": "uint8_t", "FLOAT8E5M2": "uint8_t", "FLOAT8E5M2FNUZ": "uint8_t",
    "FLOAT4E2M1": "uint8_t",
}  # fmt: skip
"""Floats that C cannot compute with, and what holds their bits."""

FEW_BITS = {"INT4": (-8, 7), "UINT4": (0, 15), "INT2": (-2, 1), "UINT2": (0, 3)}
"""Integers of less than a byte, which take one each."""

PACKED = {**SMALL_FLOATS, **dict.fromkeys(FEW_BITS, "uint8_t")}
"""What is converted between memory and arithmetic, and the C type in memory."""

LIMITS = {
    "UINT8": (0, 255), "INT8": (-128, 127), "INT16": (-32768, 32767), "UINT16": (0, 65535),
    **FEW_BITS,
}  # fmt: skip
WIDE = {"INT64": "uint64_t", "INT32": "uint32_t"}
"""Types whose overflow C leaves undefined: sums and products are those of the unsigned type."""


def c_type(dtype: str) -> str:
    """The C type that elements are computed with."""
    try:
        return C_TYPES[dtype]
    except KeyError:
        raise UnsupportedOperatorError(
            f"target cpu has no C type for {dtype} tensors; cast them to FLOAT."
        ) from None


def stored_type(dtype: str) -> str:
    """The C type that elements have in memory."""
    return PACKED.get(dtype) or c_type(dtype)


def loaded(dtype: str, element: str) -> str:
    """The value of an element in memory."""
    return f"oc_load_{dtype}({element})" if dtype in PACKED else element


def stored(dtype: str, value: str) -> str:
    """What memory holds for a value."""
    return f"oc_store_{dtype}({value})" if dtype in PACKED else value


class ScalarPrinter:
    """Prints an expression as C statements on single elements, in any type.

    `element` spells a load as an lvalue, `index` an axis of the space.
    """

    def __init__(
        self, element: Callable[[View], str], index: Callable[[int], str], accumulator: str = ""
    ) -> None:
        self.element = element
        self.index = index
        self.accumulator = accumulator
        self.lines: list[str] = []
        self._memo: dict[int, str] = {}

    def print(self, expr: Expr) -> str:
        known = self._memo.get(id(expr))
        if known is None:
            known = f"t{len(self._memo)}"
            text = self._spell(expr)
            known = f"t{len(self._memo)}"
            self.lines.append(f"const {c_type(expr.dtype)} {known} = {text};")
            self._memo[id(expr)] = known
        return known

    def _spell(self, expr: Expr) -> str:
        match expr:
            case Accumulator():
                return self.accumulator
            case Const():
                return literal(expr)
            case Load():
                return loaded(expr.view.dtype, self.element(expr.view))
            case Index():
                return self.index(expr.axis)
            case Dequantize():
                q, s, z = self.print(expr.arg), self.print(expr.scale), self.print(expr.zero_point)
                if expr.arg.dtype in SMALL_FLOATS:
                    return f"({q} - {z}) * {s}"
                return f"(float)((int64_t){q} - (int64_t){z}) * {s}"
            case Quantize():
                x, z = self.print(expr.arg), self.print(expr.zero_point)
                if isinstance(expr.scale, Const):
                    text = f"{x} * {(1 / expr.scale.value).hex()}f"
                else:
                    text = f"{x} / {self.print(expr.scale)}"
                low, high = LIMITS[expr.dtype]
                total = f"nearbyintf({text}) + (float){z}"
                return f"({c_type(expr.dtype)})fminf(fmaxf({total}, {low}.0f), {high}.0f)"
            case Call():
                return self._call(expr)
            case _:
                raise AssertionError(expr)

    def _cast(self, expr: Call, arg: str) -> str:
        dtype = expr.dtype
        if dtype == "BOOL":
            return f"{arg} != 0"
        if dtype in SMALL_FLOATS:
            return f"oc_{expr.op}_{dtype}({arg})"
        if dtype in FEW_BITS:
            return f"oc_cast_{dtype}((int64_t){arg})"
        return f"({c_type(dtype)}){arg}"

    def _call(self, expr: Call) -> str:
        a = [self.print(arg) for arg in expr.args]
        dtype = expr.args[-1].dtype
        real = dtype in REAL
        f = "" if dtype == "DOUBLE" else "f"
        kind = c_type(dtype)
        if expr.op in INFIX:
            sign = INFIX[expr.op]
            if sign in "+-*" and dtype in WIDE:
                wide = WIDE[dtype]
                return f"({kind})(({wide}){a[0]} {sign} ({wide}){a[1]})"
            return f"({c_type(expr.dtype)})({a[0]} {sign} {a[1]})"
        match expr.op:
            case "cast" | "open":
                return self._cast(expr, a[0])
            case "not":
                return f"!{a[0]}"
            case "bnot":
                return f"({kind})~{a[0]}"
            case "shl" | "shr":
                sign = "<<" if expr.op == "shl" else ">>"
                return f"{a[1]} >= 8 * sizeof({kind}) ? 0 : ({kind})({a[0]} {sign} {a[1]})"
            case "where":
                return f"{a[0]} ? {a[1]} : {a[2]}"
            case "bits":
                return self._bits(expr, a[0])
            case "min" | "max":
                sign = "<" if expr.op == "min" else ">"
                if is_number(expr.args[1]):
                    a.reverse()
                nan = f" || {a[0]} != {a[0]}" if real and not any(map(is_number, expr.args)) else ""
                return f"{a[0]} {sign} {a[1]}{nan} ? {a[0]} : {a[1]}"
            case "div" if real:
                return f"{a[0]} / {a[1]}"
            case "mod" if real:
                return f"{a[0]} - floor{f}({a[0]} / {a[1]}) * {a[1]}"
            case "fmod" if real:
                return f"fmod{f}({a[0]}, {a[1]})"
            case "div" | "mod" | "fmod" | "pow" if not real:
                return f"oc_{expr.op}_{dtype}({a[0]}, {a[1]})"
            case "neg":
                return (
                    f"({kind})(0 - ({WIDE[dtype]}){a[0]})" if dtype in WIDE else f"({kind})-{a[0]}"
                )
            case "abs":
                if real:
                    return f"fabs{f}({a[0]})"
                wide = f"({WIDE[dtype]})" if dtype in WIDE else ""
                return f"({kind})({a[0]} < 0 ? 0 - {wide}{a[0]} : {wide}{a[0]})"
            case "sign" if real:
                return f"{a[0]} != {a[0]} ? {a[0]} : ({kind})(({a[0]} > 0) - ({a[0]} < 0))"
            case "sign":
                return f"({kind})(({a[0]} > 0) - ({a[0]} < 0))"
            case "reciprocal":
                return f"1 / {a[0]}"
            case "sigmoid":
                return f"1 / (1 + exp{f}(-{a[0]}))"
            case "gelu":
                return f"0.5f * {a[0]} * (1 + erff(0.70710678f * {a[0]}))"
            case "gelu_tanh":
                inner = f"0.79788456f * ({a[0]} + 0.044715f * {a[0]} * {a[0]} * {a[0]})"
                return f"0.5f * {a[0]} * (1 + tanhf({inner}))"
            case "round":
                return f"nearbyint{f}({a[0]})"
            case "isnan" | "isinf":
                return f"{expr.op}({a[0]}) != 0" if real else "0"
            case _:
                return f"{expr.op}{f}({', '.join(a)})"

    def _bits(self, expr: Call, arg: str) -> str:
        """The bits of a value as another type of the same size."""
        source = stored_type(expr.args[0].dtype)
        target = stored_type(expr.dtype)
        held = stored(expr.args[0].dtype, arg)
        text = f"((union {{ {source} a; {target} b; }}){{ .a = {held} }}).b"
        return loaded(expr.dtype, text)


REAL = frozenset({"FLOAT", "DOUBLE", *SMALL_FLOATS})
INFIX = {
    "add": "+", "sub": "-", "mul": "*", "eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "and": "&", "or": "|", "xor": "^", "band": "&", "bor": "|", "bxor": "^",
}  # fmt: skip


def is_number(expr: Expr) -> bool:
    """Whether it is a constant and not NaN: a comparison chooses the other operand for being NaN
    when that comes second."""
    return isinstance(expr, Const) and expr.value == expr.value


def literal(expr: Const) -> str:
    """A constant in C, exact."""
    if expr.dtype in REAL:
        value = float(expr.value)
        if value != value:
            return "NAN"
        if value in (float("inf"), float("-inf")):
            return "INFINITY" if value > 0 else "-INFINITY"
        return value.hex() + ("" if expr.dtype == "DOUBLE" else "f")
    if is_run_time(expr.value):
        return f"({C_TYPES[expr.dtype]}){expr.value}"
    value = int(expr.value)
    if value == -(1 << 63):
        return "INT64_MIN"
    return f"{value}" + ("LL" if expr.dtype == "INT64" else "U" if value > 0x7FFFFFFF else "")
