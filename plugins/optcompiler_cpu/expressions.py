"""Expressions as C on vectors, over `runtime/simd.h`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

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
    walk,
)
from optcompiler_cpu.scalars import LIMITS, is_number

NARROW = frozenset({"UINT8", "INT8", "INT32"})
HALVES = {"BFLOAT16": "vb", "FLOAT16": "vh"}
"""Floats of two bytes, and how their operations begin: they are rounded when cast to and stored."""

WIDENED = frozenset({"FLOAT", *HALVES})
"""Types that vectors of floats hold."""

PREFIXES = {"FLOAT": "vf", "INT32": "vi", "BOOL": "vm", **HALVES}
"""How loads and stores of whole vectors begin, by type; bytes are of several spellings."""

FLOAT_OPS = frozenset({
    "add", "sub", "mul", "div", "pow", "min", "max", "neg", "abs", "sign", "sqrt", "exp", "log",
    "erf", "tanh", "sigmoid", "gelu", "gelu_tanh", "sin", "cos", "floor", "ceil", "round",
    "reciprocal", "isnan", "isinf", "eq", "lt", "le", "gt", "ge", "where",
})  # fmt: skip
NEAR = frozenset({"gelu", "gelu_tanh"})
NEAR_SCALE = 0.004
"""Functions with a shorter form that is off by a thirtieth of this step at most."""

SAFE = 2.0**30
"""Below this a whole number keeps its sign when a zero point is added to it."""

PLAIN = (0.0, 1.0, -1.0, 0.5, 2.0)
"""Constants that stay in the code; others are parameters, so that like kernels share code."""


@dataclass
class Params:
    """Numbers a kernel reads from its parameter array `p`, instead of from its text."""

    values: list[float] = field(default_factory=list[float])

    def add(self, value: float) -> str:
        if value not in self.values:
            self.values.append(value)
        return f"p[{self.values.index(value)}]"

    def whole(self, value: int) -> str:
        """A whole number as an int; 0 stays in the code, which is shorter for it."""
        return f"(int){self.add(float(value))}" if value else "0"


@dataclass
class Place:
    """Where a printed load reads: pointer expression, lane stride, and how often it changes.

    `level` 0 is once a kernel, 1 once a column of vectors, 2 at every row.
    """

    pointer: str
    stride: int
    level: int


def vectorisable(*exprs: Expr) -> bool:
    """Whether the vector printer has a spelling for every sub-expression."""
    seen: set[int] = set()
    return all(_vector_node(e) for expr in exprs for e in walk(expr, seen))


def _vector_node(expr: Expr) -> bool:
    match expr:
        case Load() | Const():
            return expr.dtype in NARROW | WIDENED | {"BOOL"}
        case Accumulator():
            return expr.dtype in NARROW | WIDENED
        case Quantize():
            return expr.dtype in {"UINT8", "INT8"} and expr.arg.dtype == "FLOAT"
        case Dequantize():
            return expr.arg.dtype in NARROW
        case Call(op="cast"):
            source = expr.args[0].dtype
            if {source, expr.dtype} <= WIDENED:
                return True
            return (source in NARROW | {"BOOL"} and expr.dtype == "FLOAT") or (
                source == "FLOAT" and expr.dtype == "BOOL"
            )
        case Call(op="and" | "or" | "xor" | "not"):
            return all(a.dtype == "BOOL" for a in expr.args)
        case Call(op="min" | "max") if expr.dtype in NARROW:
            return True
        case Call(op="where"):
            return expr.dtype == "FLOAT"
        case Call():
            return expr.op in FLOAT_OPS and all(a.dtype == "FLOAT" for a in expr.args)
        case Index():
            return False
        case _:
            return False


def is_packed(expr: Expr) -> bool:
    """Whether the expression is bytes by a constant scale and zero point: see `unpacked`."""
    return (
        isinstance(expr, Quantize)
        and isinstance(expr.scale, Const)
        and isinstance(expr.zero_point, Const)
    )


def without_clips(arg: Expr, inverse: float, low: int, high: int) -> Expr:
    """`arg` without minima and maxima that saturation to [low, high] after scaling repeats."""
    while isinstance(arg, Call) and arg.op in {"min", "max"} and isinstance(arg.args[1], Const):
        bound = round(arg.args[1].value * inverse)
        if not (bound <= low if arg.op == "max" else bound >= high):
            break
        arg = arg.args[0]
    return arg


def _unclipped(expr: Quantize) -> Expr:
    """What is quantised, given a constant scale and zero point, without needless clips."""
    assert isinstance(expr.scale, Const)
    assert isinstance(expr.zero_point, Const)
    low, high = LIMITS[expr.dtype]
    zero = int(expr.zero_point.value)
    return without_clips(expr.arg, 1 / expr.scale.value, low - zero, high - zero)


class VectorPrinter:
    """Prints an expression as statements, each at the outermost level where it is constant.

    `place` locates a load, `accumulator` is the C expression (vf, or vi for integers) of the
    accumulator. `count` is None for whole vectors, else the C expression of the lanes in use.
    `factor` splits an accumulator into (sum, scale), so that requantisation is one product, whose
    magnitude before the result's own scale is at most `largest`. Names of variables begin with
    `prefix`.
    """

    def __init__(
        self,
        params: Params,
        place: Callable[[View], Place],
        accumulator: str = "",
        count: str | None = None,
        factor: tuple[str, str] | None = None,
        prefix: str = "t",
        largest: float = math.inf,
    ) -> None:
        self.params = params
        self.prefix = prefix
        self.factor = factor
        self.largest = largest
        self._texts: dict[str, str] = {}
        self.place = place
        self.accumulator = accumulator
        self.count = count
        self.lines: tuple[list[str], list[str], list[str]] = ([], [], [])
        self._memo: dict[int, tuple[str, int]] = {}
        self._made = 0

    def print(self, expr: Expr) -> str:
        """The name of a variable (or a plain spelling) that holds the expression."""
        return self._value(expr)[0]

    def store(self, expr: Expr, pointer: str, stride: int) -> None:
        """Append the store of `expr` (of the destination's type) to the innermost level."""
        dtype = expr.dtype
        if dtype in HALVES and isinstance(expr, Call) and expr.op == "cast":
            expr = expr.args[0]  # the store rounds
        name = self.print(expr)
        kind, prefix = kind_of(dtype), PREFIXES.get(dtype, "vi_to8")
        count = self.count or "VL"
        if stride != 1:
            verb = f"{prefix}s" if prefix == "vi_to8" else f"{prefix}_stores"
            self.lines[2].append(f"{verb}({pointer}, {name}, {stride}, {count});")
        elif self.count is None and kind != "vm":
            verb = prefix if prefix == "vi_to8" else f"{prefix}_store"
            self.lines[2].append(f"{verb}({pointer}, {name});")
        else:
            verb = f"{prefix}n" if prefix == "vi_to8" else f"{prefix}_storen"
            self.lines[2].append(f"{verb}({pointer}, {name}, {count});")

    def _value(self, expr: Expr) -> tuple[str, int]:
        known = self._memo.get(id(expr))
        if known is None:
            text, level = self._spell(expr)
            name = f"{self.prefix}{self._made}"
            self._made += 1
            self.lines[level].append(f"const {kind_of(expr.dtype)} {name} = {text};")
            known = self._memo[id(expr)] = (name, level)
        return known

    def _number(self, value: float) -> str:
        value = float(value)
        if value in PLAIN:
            return f"{value}f"
        return self.params.add(value)

    def _spell(self, expr: Expr) -> tuple[str, int]:
        match expr:
            case Accumulator():
                return self.accumulator, 2
            case Const(dtype="FLOAT" | "BFLOAT16" | "FLOAT16"):
                return f"vf_set({self._number(expr.value)})", 0
            case Const(dtype="BOOL"):
                return f"vm_set({int(bool(expr.value))})", 0
            case Const():
                return f"vi_set({int(expr.value)})", 0
            case Load():
                return self._load(expr.view)
            case Quantize():
                return self._quantize(expr)
            case Dequantize():
                return self._dequantize(expr)
            case Call():
                return self._call(expr)
            case _:
                raise AssertionError(expr)

    def _load(self, view: View) -> tuple[str, int]:
        place = self.place(view)
        dtype, pointer, count = view.dtype, place.pointer, self.count or "VL"
        if place.stride == 0:
            one = f"*({pointer})"
            return f"{PREFIXES.get(dtype, 'vi')}_set({one})", place.level
        short = {"UINT8": "vi_u8", "INT8": "vi_s8"}.get(dtype)
        prefix = PREFIXES.get(dtype, "")
        if place.stride != 1:
            verb = f"{short}s" if short else f"{prefix}_loads"
            return f"{verb}({pointer}, {place.stride}, {count})", place.level
        if self.count is None and dtype != "BOOL":
            return f"{short or prefix + '_load'}({pointer})", place.level
        verb = f"{short}n" if short else f"{prefix}_loadn"
        return f"{verb}({pointer}, {count})", place.level

    def _quantize(self, expr: Quantize) -> tuple[str, int]:
        low, high = LIMITS[expr.dtype]
        if not (isinstance(expr.scale, Const) and isinstance(expr.zero_point, Const)):
            x, level = self._value(expr.arg)
            (scale, l1), (zero, l2) = self._value(expr.scale), self._real(expr.zero_point)
            text = f"vf_add(vf_round(vf_div({x}, {scale})), {zero})"
            limits = f"vf_set({float(low)}f)), vf_set({float(high)}f)"
            return f"vf_int(vf_min(vf_max({text}, {limits}))", max(level, l1, l2)
        zero = int(expr.zero_point.value)
        text, level = self._scaled(expr)
        low_text, high_text = (self._number(float(v - zero)) for v in (low, high))
        text = f"vf_int(vf_min(vf_max({text}, vf_set({low_text})), vf_set({high_text})))"
        # the zero point is added to whole numbers: rounding half to even comes before it
        return (text if zero == 0 else f"vi_add({text}, vi_set({self._whole(zero)}))"), level

    def _scaled(self, expr: Quantize) -> tuple[str, int]:
        """What is rounded, given a constant scale and zero point."""
        assert isinstance(expr.scale, Const)
        factor = f"vf_set({self._number(1 / expr.scale.value)})"
        arg = _unclipped(expr)
        if isinstance(arg, Accumulator) and self.factor is not None:
            raw, scales = self.factor
            return f"vf_mul({raw}, {self._shared(f'vf_mul({scales}, {factor})', 1)})", 2
        if isinstance(arg, Call) and arg.op in NEAR and expr.scale.value >= NEAR_SCALE:
            arg = replace(arg, op=f"{arg.op}_near")
        x, level = self._value(arg)
        return f"vf_mul({x}, {factor})", level

    def unpacked(self, expr: Quantize) -> str:
        """Whole numbers less the zero point, not saturated below: for `vi_join_u8` and its like."""
        text, level = self._scaled(expr)
        assert isinstance(expr.scale, Const)
        assert isinstance(expr.zero_point, Const)
        if self._is_sum(expr) and self.largest / expr.scale.value < SAFE:
            return self._whole_number(text, level)
        high = self._number(float(LIMITS[expr.dtype][1] - int(expr.zero_point.value)))
        # of a NaN and a number the second: it becomes the least integer
        return self._whole_number(f"vf_min(vf_set({high}), {text})", level)

    def _whole_number(self, text: str, level: int) -> str:
        name = f"{self.prefix}{self._made}"
        self._made += 1
        self.lines[level].append(f"const vi {name} = vf_int({text});")
        return name

    def _is_sum(self, expr: Quantize) -> bool:
        """Whether a sum and its scale are all that is quantised, once needless clips are gone."""
        return self.factor is not None and isinstance(_unclipped(expr), Accumulator)

    def _whole(self, value: int) -> str:
        return f"(int32_t){self._number(float(value))}"

    def _shared(self, text: str, level: int) -> str:
        """A variable of type vf for `text`, made once."""
        known = self._texts.get(text)
        if known is None:
            known = self._texts[text] = f"{self.prefix}{self._made}"
            self._made += 1
            self.lines[level].append(f"const vf {known} = {text};")
        return known

    def _dequantize(self, expr: Dequantize) -> tuple[str, int]:
        q, level = self._value(expr.arg)
        text = f"vi_float({q})"
        if not (isinstance(expr.zero_point, Const) and expr.zero_point.value == 0):
            zero, zero_level = self._real(expr.zero_point)
            text, level = f"vf_sub({text}, {zero})", max(level, zero_level)
        scale, scale_level = self._value(expr.scale)
        return f"vf_mul({text}, {scale})", max(level, scale_level)

    def _real(self, expr: Expr) -> tuple[str, int]:
        """An integer operand as a vector of floats."""
        if isinstance(expr, Const):
            return f"vf_set({self._number(expr.value)})", 0
        name, level = self._value(expr)
        return f"vi_float({name})", level

    def _call(self, expr: Call) -> tuple[str, int]:
        values = [self._value(a) for a in expr.args]
        names, level = [v[0] for v in values], max((v[1] for v in values), default=0)
        source = expr.args[0].dtype
        match expr.op:
            case "cast":
                if expr.dtype == "BOOL":
                    return f"vm_not(vf_eq({names[0]}, vf_set(0.0f)))", level
                if expr.dtype in HALVES:
                    return f"{HALVES[expr.dtype]}_round({names[0]})", level
                if source in HALVES:
                    return names[0], level
                verb = "vm_float" if source == "BOOL" else "vi_float"
                return f"{verb}({names[0]})", level
            case "gt" | "ge":
                verb = "vf_lt" if expr.op == "gt" else "vf_le"
                return f"{verb}({names[1]}, {names[0]})", level
            case "and" | "or" | "xor" | "not":
                return f"vm_{expr.op}({', '.join(names)})", level
            case "min" | "max" if expr.dtype in NARROW:
                return f"vi_{expr.op}({', '.join(names)})", level
            case "min" | "max" if any(map(is_number, expr.args)):
                first, second = reversed(names) if is_number(expr.args[1]) else names
                return f"vf_{expr.op}({first}, {second})", level
            case "min" | "max":
                return f"vf_{expr.op}_nan({', '.join(names)})", level
            case _:
                return f"vf_{expr.op}({', '.join(names)})", level


def kind_of(dtype: str) -> str:
    return "vf" if dtype in WIDENED else "vm" if dtype == "BOOL" else "vi"
