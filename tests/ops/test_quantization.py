"""QuantizeLinear and DequantizeLinear: values against ONNX Runtime, gradients against LSQ."""

import numpy as np
import onnx_ir as ir
import pytest
import torch

from optcompiler.executor import to_torch
from optcompiler.ops.quantization import dequantize_linear, quantize_linear
from optcompiler.program import Program
from tests.ops.comparing import check, run_torch, seeded, single

LIMITS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535)}


@pytest.mark.parametrize("dtype", LIMITS)
def test_quantize_rounds_to_even_and_saturates(dtype: str) -> None:
    constants = f"float s = {{0.5}}, {dtype} z = {{3}}"
    program = single("QuantizeLinear", "float[6] x", f"{dtype}[6] y", "", constants, opset=21)
    check(program, {"x": np.array([0.25, 0.75, -0.25, 1e6, -1e6, 1.1], np.float32)})


@pytest.mark.parametrize("axis", [0, 1])
def test_quantize_per_axis(axis: int) -> None:
    n = (3, 4)[axis]
    program = single(
        "QuantizeLinear",
        f"float[3,4] x, float[{n}] s, int8[{n}] z",
        "int8[3,4] y",
        f"axis = {axis}",
    )
    check(program, seeded(program, low=0.01, high=1))


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8"])
def test_blocked_round_trip(dtype: str) -> None:
    text = f"""
        <ir_version: 10, opset_import: ["" : 21]>
        g (float[2,8] x) => (float[2,8] y)
        <float[2,2] s = {{0.1, 0.2, 0.3, 0.4}}, {dtype}[2,2] z = {{1, 2, 0, 3}}> {{
            q = QuantizeLinear <axis = 1, block_size = 4> (x, s, z)
            y = DequantizeLinear <axis = 1, block_size = 4> (q, s, z)
        }}
    """
    check(Program(ir.from_onnx_text(text)), reference=dtype != "int8")


def test_default_levels_are_uint8() -> None:
    program = single("QuantizeLinear", "float[3] x, float s", "uint8[3] y")
    check(program, {"x": np.array([-3, 3, 300], np.float32), "s": np.array(1, np.float32)})


def test_output_dtype_decides_levels() -> None:
    program = single(
        "QuantizeLinear", "float[3] x, float s", "int16[3] y", "output_dtype = 5", opset=21
    )
    check(program, {"x": np.array([-3, 3, 1e6], np.float32), "s": np.array(1, np.float32)})


def test_float8_round_trip() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 19]>
        g (float[6] x) => (float[6] y) <float s = {0.5}, float8e4m3fn z = {0}> {
            q = QuantizeLinear (x, s, z)
            y = DequantizeLinear (q, s, z)
        }
    """
    inputs = {"x": np.array([0.3, -1.7, 100, 500, 0.01, 0], np.float32)}
    check(Program(ir.from_onnx_text(text)), inputs)


def test_int32_bias() -> None:
    constants = "int32[3] b = {16777217, -5, 7}, float[3] s = {0.5, 0.25, 2}"
    program = single("DequantizeLinear", "", "float[3] y", "axis = 0", constants)
    check(program, {})


def test_dynamic_quantize() -> None:
    program = single("DynamicQuantizeLinear", "float[20] x", "uint8[20] y, float s, uint8 z")
    check(program)


def test_levels_pass_through_moves_and_are_integers_elsewhere() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[1,2,4,4] x) => (float[1,8] y, uint8[1,2,2,2] p, int32[1,2,4,4] c)
        <float s = {0.02}, uint8 z = {100}, int64[2] shape = {1, -1}> {
            q = QuantizeLinear (x, s, z)
            p = MaxPool <kernel_shape = [2,2], strides = [2,2]> (q)
            r = Reshape (p, shape)
            y = DequantizeLinear (r, s, z)
            c = Cast <to = 6> (q)
        }
    """
    check(Program(ir.from_onnx_text(text)))


def test_qlinear_operators() -> None:
    program = single(
        "QLinearMatMul",
        "uint8[3,4] a, float as, uint8 az, int8[4,5] b, float bs, int8 bz, float ys, uint8 yz",
        "uint8[3,5] y",
    )
    scalar = {"as": 0.1, "bs": 0.2, "ys": 0.3, "az": 2, "bz": -1, "yz": 9}
    values = seeded(program)
    check(program, values | {k: np.array(v, values[k].dtype) for k, v in scalar.items()})
    program = single(
        "QLinearConv",
        "uint8[1,2,5,5] x, float xs, uint8 xz, int8[3,2,3,3] w, float[3] ws, int8[3] wz, "
        "float ys, uint8 yz, int32[3] b",
        "uint8[1,3,5,5] y",
        "pads = [1,1,1,1]",
    )
    values = seeded(program)
    scalar = {"xs": 0.0917, "ys": 0.3331, "xz": 2, "yz": 9}
    values |= {k: np.array(v, values[k].dtype) for k, v in scalar.items()}
    check(program, values | {"ws": np.array([0.1, 0.2, 0.3], np.float32), "wz": values["wz"] * 0})


def _fake_quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros((), dtype=torch.int8)
    levels = quantize_linear(x, scale, zero, target=int(ir.DataType.INT8))
    return dequantize_linear(levels, scale, zero)


def test_gradients_are_straight_through_and_lsq() -> None:
    """Esser et al. 2020, equations 3 and 5, on values inside and outside the range."""
    x = torch.tensor([0.3, -0.7, 0.26, 20.0, -20.0], requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    _fake_quantize(x, scale).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [1, 1, 1, 0, 0]
    ratio = x.detach()[:3] / 0.1
    expected = (torch.round(ratio) - ratio).sum() + 127 - 128
    torch.testing.assert_close(scale.grad, expected)


def test_gradients_of_channel_scales_keep_their_shape() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    scale = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    zero = torch.zeros(3, dtype=torch.int8)
    levels = quantize_linear(x, scale, zero, axis=0, target=int(ir.DataType.INT8))
    dequantize_linear(levels, scale, zero, axis=0).square().sum().backward()
    assert scale.grad is not None
    assert scale.grad.shape == (3,)
    assert bool((scale.grad != 0).all())


def test_gradients_reach_float_weights_and_scales_of_a_program() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[2,4] x) => (float[2,3] y)
        <float xs = {0.02}, uint8 xz = {128}, float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12},
         float[3] ws = {0.1, 0.12, 0.15}, int8[3] wz = {0, 0, 0}, float[3] b = {1, 2, 3}> {
            q = QuantizeLinear (x, xs, xz)
            d = DequantizeLinear (q, xs, xz)
            wq = QuantizeLinear <axis = 1> (w, ws, wz)
            wd = DequantizeLinear <axis = 1> (wq, ws, wz)
            y = Gemm (d, wd, b)
        }
    """
    program = Program(ir.from_onnx_text(text))
    check(program)
    module = to_torch(program)
    names = dict(module.named_parameters())
    assert set(names) == {"xs", "w", "ws", "b"}
    module(torch.randn(2, 4))[0].square().sum().backward()
    for name, parameter in names.items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


def test_float8_gradients_are_finite() -> None:
    x = torch.tensor([0.3, 2.0, 900.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    levels = quantize_linear(x, scale, None, target=int(ir.DataType.FLOAT8E4M3FN))
    dequantize_linear(levels, scale).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [1, 1, 0]
    assert bool(torch.isfinite(scale.grad))


def test_int4_output_is_carried_in_int8() -> None:
    program = single(
        "QuantizeLinear", "float[3] x", "int4[3] y", "", "float s = {1}, int4 z = {0}", opset=21
    )
    got = run_torch(program, {"x": np.array([-9, 3.4, 9], np.float32)})[0]
    assert got.astype(np.int8).tolist() == [-8, 3, 7]
