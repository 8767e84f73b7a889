"""Arithmetic, mathematics, comparisons, logic, bits and casts."""

import numpy as np
import pytest

from tests.ops.comparing import check, run_torch, seeded, single

UNARY = {
    "Neg": (-2, 2), "Abs": (-2, 2), "Sign": (-2, 2), "Reciprocal": (0.5, 2), "Sqrt": (0, 4),
    "Exp": (-2, 2), "Log": (0.1, 4), "Sin": (-3, 3), "Cos": (-3, 3), "Tan": (-1, 1),
    "Asin": (-1, 1), "Acos": (-1, 1), "Atan": (-3, 3), "Sinh": (-2, 2), "Cosh": (-2, 2),
    "Asinh": (-2, 2), "Acosh": (1, 4), "Atanh": (-0.9, 0.9), "Erf": (-2, 2), "Ceil": (-3, 3),
    "Floor": (-3, 3), "Identity": (-1, 1),
}  # fmt: skip


@pytest.mark.parametrize("op_type", UNARY)
def test_unary(op_type: str) -> None:
    program = single(op_type, "float[3,7] x", "float[3,7] y")
    check(program, seeded(program, low=UNARY[op_type][0], high=UNARY[op_type][1]))


def test_round_goes_to_even() -> None:
    program = single("Round", "float[6] x", "float[6] y")
    check(program, {"x": np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2.4], np.float32)})


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div", "Pow"])
def test_binary_broadcasts(op_type: str) -> None:
    program = single(op_type, "float[2,1,4] a, float[3,1] b", "float[2,3,4] y")
    check(program, seeded(program, low=0.5, high=2))


@pytest.mark.parametrize("op_type", ["Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"])
def test_comparison(op_type: str) -> None:
    check(single(op_type, "int64[3,4] a, int64[4] b", "bool[3,4] y"))


@pytest.mark.parametrize("op_type", ["And", "Or", "Xor"])
def test_logic(op_type: str) -> None:
    check(single(op_type, "bool[3,4] a, bool[4] b", "bool[3,4] y"))


def test_not() -> None:
    check(single("Not", "bool[5] a", "bool[5] y"))


@pytest.mark.parametrize("op_type", ["Sum", "Mean", "Max", "Min"])
def test_variadic(op_type: str) -> None:
    check(single(op_type, "float[2,3] a, float[3] b, float[2,1] c", "float[2,3] y"))


def test_integer_division_truncates_towards_zero() -> None:
    program = single("Div", "int32[4] a, int32[4] b", "int32[4] y")
    a = np.array([7, -7, 7, -7], np.int32)
    check(program, {"a": a, "b": np.array([2, 2, -2, -2], np.int32)})


@pytest.mark.parametrize(("fmod", "dtype"), [(0, "int32"), (1, "int32"), (1, "float")])
def test_mod(fmod: int, dtype: str) -> None:
    program = single("Mod", f"{dtype}[4] a, {dtype}[4] b", f"{dtype}[4] y", f"fmod = {fmod}")
    kind = np.float32 if dtype == "float" else np.int32
    a, b = np.array([7, -7, 7, -7], kind), np.array([3, 3, -3, -3], kind)
    check(program, {"a": a, "b": b})


@pytest.mark.parametrize(
    ("constants", "arguments"),
    [
        ("float low = {-0.5}, float high = {0.75}", "x, low, high"),
        ("float high = {0.25}", 'x, "", high'),
        ("float low = {0.25}", "x, low"),
    ],
)
def test_clip(constants: str, arguments: str) -> None:
    check(single("Clip", "float[20] x", "float[20] y", "", constants, arguments=arguments))


def test_clip_with_computed_bounds() -> None:
    program = single("Clip", "float[20] x, float low, float high", "float[20] y")
    low, high = np.float32(-0.5), np.float32(1)
    check(program, seeded(program) | {"low": np.array(low), "high": np.array(high)})


def test_where() -> None:
    check(single("Where", "bool[3,1] c, float[3,4] a, float[4] b", "float[3,4] y"))


@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
def test_bit_shift(direction: str) -> None:
    program = single(
        "BitShift", "uint8[4] a, uint8[4] b", "uint8[4] y", f'direction = "{direction}"'
    )
    check(
        program, {"a": np.array([1, 16, 255, 3], np.uint8), "b": np.array([1, 2, 7, 0], np.uint8)}
    )


@pytest.mark.parametrize("op_type", ["BitwiseAnd", "BitwiseOr", "BitwiseXor"])
def test_bitwise(op_type: str) -> None:
    program = single(op_type, "uint16[4] a, uint16[4] b", "uint16[4] y")
    a, b = np.array([1, 16, 65535, 3], np.uint16), np.array([1, 65535, 7, 0], np.uint16)
    check(program, {"a": a, "b": b}, reference=True)


def test_nan_and_infinity() -> None:
    x = np.array([1, np.nan, np.inf, -np.inf], np.float32)
    check(single("IsNaN", "float[4] x", "bool[4] y"), {"x": x})
    check(single("IsInf", "float[4] x", "bool[4] y", "detect_negative = 0"), {"x": x})


@pytest.mark.parametrize("target", ["int8", "uint8", "int32", "int64", "float16", "bool", "double"])
def test_cast_from_float(target: str) -> None:
    codes = {"uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "double": 11}
    program = single("Cast", "float[5] x", f"{target}[5] y", f"to = {codes[target]}")
    check(program, {"x": np.array([0, 1.75, 2.5, 100.9, 3], np.float32)})


def test_narrowing_integer_casts_wrap() -> None:
    program = single("Cast", "int32[4] x", "int8[4] y", "to = 3")
    check(program, {"x": np.array([1, 130, -129, 256], np.int32)})


def test_cast_to_float8_saturates() -> None:
    program = single("Cast", "float[5] x", "float8e4m3fn[5] y", "to = 17")
    x = np.array([0.3, 448, 470, -1e6, 0.001], np.float32)
    got = run_torch(program, {"x": x})[0].astype(np.float32)
    expected = np.array([0.3125, 448, 448, -448, 0.001953125 / 2], np.float32)
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_cast_like() -> None:
    check(single("CastLike", "float[4] x, int32[1] like", "int32[4] y"))
