"""Fourier transforms and windows against ONNX Runtime and the ONNX reference."""

import numpy as np
import pytest

from tests.ops.comparing import check, single


@pytest.mark.parametrize(
    ("x", "y", "attributes"),
    [
        ("[2,8,1]", "[2,8,2]", ""),
        ("[2,8,2]", "[2,8,2]", "inverse = 1"),
        ("[2,8,1]", "[2,5,2]", "onesided = 1"),
    ],
)
def test_dft(x: str, y: str, attributes: str) -> None:
    check(single("DFT", f"float{x} x", f"float{y} y", attributes), reference=True)


def test_dft_of_another_axis_and_length() -> None:
    constants = "int64 n = {6}, int64 axis = {1}"
    program = single("DFT", "float[2,4,3,1] x", "float[2,6,3,2] y", "", constants)
    check(program, reference=True)
    program = single("DFT", "float[2,4,3,1] x", "float[2,4,3,2] y", "axis = 2", opset=19)
    check(program, reference=True)


def test_stft() -> None:
    constants = "int64 step = {4}, float[8] w = {1, 2, 3, 4, 4, 3, 2, 1}"
    check(single("STFT", "float[2,20,1] x", "float[2,4,5,2] y", "", constants))


@pytest.mark.parametrize("op_type", ["HannWindow", "HammingWindow", "BlackmanWindow"])
@pytest.mark.parametrize("periodic", [0, 1])
def test_windows(op_type: str, periodic: int) -> None:
    program = single(op_type, "int32 n", "float[10] y", f"periodic = {periodic}")
    check(program, {"n": np.array(10, np.int32)})


def test_mel_weights() -> None:
    program = single(
        "MelWeightMatrix", "int64 b, int64 n, int64 r, float low, float high", "float[9,6] y"
    )
    edges = {"low": np.array(20, np.float32), "high": np.array(3900, np.float32)}
    check(program, {"b": np.array(6), "n": np.array(16), "r": np.array(8000), **edges})
