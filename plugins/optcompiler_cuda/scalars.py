"""Printing scalar expressions as Triton."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.lowering.ir import (
    Accumulator,
    Call,
    Const,
    Dequantize,
    Expr,
    Index,
    Load,
    Quantize,
    operands_of,
    walk,
)
from optcompiler_cuda.text import Axis, KernelText

TYPES: Mapping[str, str] = {
    "FLOAT": "tl.float32", "DOUBLE": "tl.float64", "FLOAT16": "tl.float32",
    "BFLOAT16": "tl.float32", "INT64": "tl.int64", "INT32": "tl.int32", "INT16": "tl.int16",
    "INT8": "tl.int8", "UINT8": "tl.uint8", "BOOL": "tl.int1",
}  # fmt: skip
"""The type arithmetic is done in; half precisions compute in float32 and round when stored."""

FLOATS = frozenset({"FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16"})

RANGES: Mapping[str, tuple[int, int]] = {
    "INT8": (-(1 << 7), (1 << 7) - 1), "UINT8": (0, (1 << 8) - 1),
    "INT16": (-(1 << 15), (1 << 15) - 1), "INT32": (-(1 << 31), (1 << 31) - 1),
    "INT64": (-(1 << 63), (1 << 63) - 1), "BOOL": (0, 1),
}  # fmt: skip

SPELLINGS: Mapping[str, Callable[..., str]] = {
    "add": lambda x, y: f"({x} + {y})",
    "sub": lambda x, y: f"({x} - {y})",
    "mul": lambda x, y: f"({x} * {y})",
    "fmod": lambda x, y: f"({x} % {y})",
    "mod": lambda x, y: f"floor_mod({x}, {y})",
    "pow": lambda x, y: f"power({x}, {y})",
    "min": lambda x, y: f"smaller({x}, {y})",
    "max": lambda x, y: f"larger({x}, {y})",
    "neg": lambda x: f"(-{x})",
    "abs": lambda x: f"tl.abs({x})",
    "sign": lambda x: f"tl.where({x} > 0, 1, tl.where({x} < 0, -1, 0))",
    "exp": lambda x: f"tl.exp({x})",
    "log": lambda x: f"tl.log({x})",
    "erf": lambda x: f"tl.erf({x})",
    "tanh": lambda x: f"(1.0 - 2.0 / (tl.exp(2.0 * {x}) + 1.0))",
    "gelu": lambda x: f"(0.5 * {x} * (1.0 + tl.erf(0.7071067811865476 * {x})))",
    # with u = 2·sqrt(2 / pi)·(x + 0.044715·x³), x·sigmoid(u)
    "gelu_tanh": lambda x: (
        f"({x} / (1.0 + tl.exp(-1.5957691216057308 * {x} * (1.0 + 0.044715 * {x} * {x}))))"
    ),
    "sigmoid": lambda x: f"(1.0 / (1.0 + tl.exp(-{x})))",
    "sin": lambda x: f"tl.sin({x})",
    "cos": lambda x: f"tl.cos({x})",
    "floor": lambda x: f"tl.floor({x})",
    "ceil": lambda x: f"tl.ceil({x})",
    "reciprocal": lambda x: f"(1.0 / {x})",
    "isnan": lambda x: f"({x} != {x})",
    "isinf": lambda x: f'(tl.abs({x}) == float("inf"))',
    "eq": lambda x, y: f"({x} == {y})",
    "lt": lambda x, y: f"({x} < {y})",
    "le": lambda x, y: f"({x} <= {y})",
    "gt": lambda x, y: f"({x} > {y})",
    "ge": lambda x, y: f"({x} >= {y})",
    "and": lambda x, y: f"({x} & {y})",
    "or": lambda x, y: f"({x} | {y})",
    "xor": lambda x, y: f"({x} ^ {y})",
    "not": lambda x: f"({x} == 0)",
    "where": lambda c, x, y: f"tl.where({c}, {x}, {y})",
}

LONGEST_INLINE = 60


class Scalars:
    """Prints expressions over one index into a kernel; sub-expressions used twice get a name."""

    def __init__(
        self, kernel: KernelText, axes: Sequence[Axis], *, accumulator: str = "", role: str = "src"
    ) -> None:
        self.kernel = kernel
        self.axes = axes
        self.accumulator = accumulator
        self.role = role
        self.uses: Counter[int] = Counter()
        self.done: dict[int, str] = {}

    def print(self, expr: Expr) -> str:
        """The text of `expr`'s value; lines it needs are added to the kernel."""
        for inner in walk(expr):
            self.uses.update(map(id, operands_of(inner)))
        return self._value(expr)

    def _value(self, expr: Expr) -> str:
        if id(expr) not in self.done:
            text = self._text(expr)
            long = len(text) > LONGEST_INLINE or self.uses[id(expr)] > 1
            if long and not isinstance(expr, Const | Accumulator | Index):
                text = self.kernel.temporary(text)
            self.done[id(expr)] = text
        return self.done[id(expr)]

    def _text(self, expr: Expr) -> str:
        match expr:
            case Const():
                return literal(expr)
            case Load():
                return self.kernel.load(self.role, expr.view, self.axes)
            case Accumulator():
                return self.accumulator
            case Index():
                text = self.axes[expr.axis].text
                return text if text == "0" else f"({text}).to(tl.int64)"
            case Quantize():
                return self._quantize(expr)
            case Dequantize():
                return self._dequantize(expr)
            case Call():
                return self._call(expr)
            case _:
                raise UnsupportedOperatorError(
                    f"the cuda backend does not print {type(expr).__name__}; update optcompiler."
                )

    def _tensor(self, expr: Expr) -> str:
        """As `_value`, but never a bare number: some of Triton's functions take tensors alone."""
        text = self._value(expr)
        if isinstance(expr, Const):
            return f"tl.full((), {text}, {TYPES[expr.dtype]})"
        return text

    def _call(self, expr: Call) -> str:
        if expr.op == "cast":
            return self._cast(expr.args[0], expr.dtype)
        args = [self._value(a) for a in expr.args]
        if all(isinstance(a, Const) for a in expr.args):
            args = [self._tensor(a) for a in expr.args]
        operand = expr.args[-1].dtype
        match expr.op:
            case "pow":
                # Helpers are functions of tensors.
                args = [self._tensor(a) for a in expr.args]
            case "div":
                return f"({' / '.join(args)})" if operand in FLOATS else f"({' // '.join(args)})"
            case "sqrt":
                return f"tl.sqrt({args[0]})" if operand == "DOUBLE" else f"tl.sqrt_rn({args[0]})"
            case "round":
                return f"{'nearest64' if operand == 'DOUBLE' else 'nearest'}({args[0]})"
            case "sign":
                return f"{SPELLINGS['sign'](args[0])}.to({TYPES[expr.dtype]})"
            case "reciprocal" | "tanh" | "sigmoid" if operand not in FLOATS:
                args = [f"{args[0]}.to(tl.float32)"]
            case _:
                pass
        if expr.op not in SPELLINGS:
            raise UnsupportedOperatorError(
                f"the cuda backend has no kernel for the operation {expr.op!r} on {operand}; "
                f"use target onnxruntime or cpu."
            )
        return SPELLINGS[expr.op](*args)

    def _cast(self, arg: Expr, dtype: str) -> str:
        if isinstance(arg, Const):
            return literal(Const(dtype, arg.value if dtype != "BOOL" else int(arg.value != 0)))
        text = self._value(arg)
        if dtype == "BOOL":
            return f"({text} != 0)"
        if dtype in {"FLOAT16", "BFLOAT16"}:
            narrow = "tl.float16" if dtype == "FLOAT16" else "tl.bfloat16"
            return f"{text}.to({narrow}).to(tl.float32)"
        return f"{text}.to({TYPES[dtype]})"

    def _quantize(self, expr: Quantize) -> str:
        low, high = RANGES[expr.dtype]
        value = self._tensor(expr.arg)
        if isinstance(expr.scale, Const):
            per_scale = self.kernel.real(1.0 / expr.scale.value, ("per", expr.scale))
        else:
            per_scale = f"(1.0 / {self._value(expr.scale)})"
        if isinstance(expr.zero_point, Const):
            shift = float(expr.zero_point.value)
            zero_point = self.kernel.real(shift, expr.zero_point) if shift else "0.0"
        else:
            zero_point = f"{self._value(expr.zero_point)}.to(tl.float32)"
        if expr.dtype == "INT32":
            # float32 holds no integer next to 2**31: the largest below it is the bound.
            text = f"nearest({value} * {per_scale}) + {zero_point}"
            text = f"tl.minimum(tl.maximum({text}, {float(low)}), 2147483520.0)"
        else:
            text = f"quantize({value}, {per_scale}, {zero_point}, {float(low)}, {float(high)})"
        return f"{text}.to({TYPES[expr.dtype]})"

    def _dequantize(self, expr: Dequantize) -> str:
        value = f"{self._tensor(expr.arg)}.to(tl.float32)"
        if not isinstance(expr.zero_point, Const):
            value = f"({value} - {self._tensor(expr.zero_point)}.to(tl.float32))"
        elif expr.zero_point.value:
            value = f"({value} - {self.kernel.real(float(expr.zero_point.value), expr.zero_point)})"
        if isinstance(expr.scale, Const):
            return f"({value} * {self.kernel.real(float(expr.scale.value), expr.scale)})"
        return f"({value} * {self._value(expr.scale)})"


def literal(expr: Const) -> str:
    if expr.dtype in FLOATS:
        return number_text(float(expr.value))
    return str(int(expr.value))


def number_text(value: float) -> str:
    """A float as Triton reads it; infinities and NaN have no literal."""
    if math.isfinite(value):
        return repr(float(value))
    return f'float("{value}")'
