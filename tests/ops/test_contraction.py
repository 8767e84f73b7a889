"""Convolutions and matrix products against ONNX Runtime."""

import numpy as np
import pytest

from tests.ops.comparing import check, run_torch, seeded, single


@pytest.mark.parametrize(
    ("x", "w", "y", "attributes"),
    [
        ("[2,4,9]", "[6,4,3]", "[2,6,9]", "pads = [1,1]"),
        ("[2,4,8,8]", "[6,4,3,3]", "[2,6,4,4]", "pads = [1,1,1,1], strides = [2,2]"),
        ("[2,4,8,8]", "[6,4,3,3]", "[2,6,7,6]", "pads = [0,1,1,0], dilations = [1,1]"),
        ("[1,4,9,9]", "[4,1,3,3]", "[1,4,5,5]", "group = 4, dilations = [2,2]"),
        ("[1,4,7,7]", "[6,2,3,3]", "[1,6,4,4]", 'group=2, strides = [2,2],auto_pad = "SAME_UPPER"'),
        ("[1,4,8,8]", "[6,4,3,3]", "[1,6,4,4]", 'auto_pad = "SAME_LOWER", strides = [2,2]'),
        ("[1,4,8,8]", "[6,4,3,3]", "[1,6,6,6]", 'auto_pad = "VALID"'),
        ("[1,2,5,6,7]", "[3,2,2,3,3]", "[1,3,4,4,5]", ""),
    ],
)  # fmt: skip
def test_conv(x: str, w: str, y: str, attributes: str) -> None:
    bias = w[1:].split(",")[0]
    inputs = f"float{x} x, float{w} w, float[{bias}] b"
    check(single("Conv", inputs, f"float{y} y", attributes))


@pytest.mark.parametrize(
    ("w", "y", "attributes"),
    [
        ("[4,3,3,3]", "[1,3,11,11]", "strides = [2,2]"),
        ("[4,3,3,3]", "[1,3,10,10]", "strides = [2,2], pads = [1,1,1,1], output_padding = [1,1]"),
        ("[4,3,3,3]", "[1,3,10,10]", "strides = [2,2], output_shape = [10,10]"),
        ("[4,3,3,3]", "[1,3,10,9]", "strides = [2,2], pads = [0,1,1,1]"),
        ("[4,2,3,3]", "[1,4,9,9]", "group = 2, dilations = [2,2]"),
        ("[4,3,2,2]", "[1,3,10,10]", 'strides = [2,2], auto_pad = "SAME_UPPER"'),
    ],
)
def test_conv_transpose(w: str, y: str, attributes: str) -> None:
    program = single(
        "ConvTranspose",
        f"float[1,4,5,5] x, float{w} w, float[{y[1:].split(',')[1]}] b",
        f"float{y} y",
        attributes,
    )
    check(program)


@pytest.mark.parametrize(
    ("a", "b", "c", "attributes"),
    [
        ("[3,4]", "[4,5]", "[5]", ""),
        ("[4,3]", "[5,4]", "[3,5]", "transA = 1, transB = 1, alpha = 0.5, beta = 2.0"),
        ("[3,4]", "[4,5]", "[3,1]", "beta = 0.5"),
    ],
)
def test_gemm(a: str, b: str, c: str, attributes: str) -> None:
    check(single("Gemm", f"float{a} a, float{b} b, float{c} c", "float[3,5] y", attributes))


@pytest.mark.parametrize(
    ("a", "b", "y"), [("[2,3,4]", "[4,5]", "[2,3,5]"), ("[4]", "[4,5]", "[5]"), ("[4]", "[4]", "")]
)
def test_matmul(a: str, b: str, y: str) -> None:
    check(single("MatMul", f"float{a} a, float{b} b", f"float{y} y"))


def test_einsum() -> None:
    inputs = "float[2,3,4] a, float[2,5,4] b"
    check(single("Einsum", inputs, "float[2,3,5] y", 'equation = "bij, bkj -> bik"'))


def test_matmul_integer_with_zero_points() -> None:
    program = single(
        "MatMulInteger", "uint8[3,4] a, int8[4,5] b, uint8 az, int8 bz", "int32[3,5] y"
    )
    values = seeded(program) | {"az": np.array(3, np.uint8), "bz": np.array(-2, np.int8)}
    check(program, values)


def test_matmul_integer_takes_zero_points_by_row_and_column() -> None:
    program = single(
        "MatMulInteger", "uint8[3,4] a, int8[4,5] b, uint8[3] az, int8[5] bz", "int32[3,5] y"
    )
    values = seeded(program)
    left = values["a"].astype(np.int32) - values["az"].astype(np.int32)[:, None]
    right = values["b"].astype(np.int32) - values["bz"].astype(np.int32)
    np.testing.assert_array_equal(run_torch(program, values)[0], left @ right)


def test_conv_integer() -> None:
    program = single(
        "ConvInteger",
        "uint8[1,2,6,6] x, uint8[3,2,3,3] w, uint8 xz, uint8 wz",
        "int32[1,3,6,6] y",
        "pads = [1,1,1,1]",
    )
    values = seeded(program) | {"xz": np.array(3, np.uint8), "wz": np.array(2, np.uint8)}
    check(program, values)
