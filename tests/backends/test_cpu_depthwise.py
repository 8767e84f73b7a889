"""Depthwise convolutions of bytes: the same integers from every instruction set, and the right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.backends.test_cpu import HERE, compiled, program
from tests.backends.test_cpu_integers import integers, scale
from tests.support import random_inputs, run_onnx

CASES = {
    "whole groups": (64, (7, 9), 3, {}),
    "an odd column": (128, (5, 8), 3, {"strides": (1, 1)}),
    "most of a group": (120, (6, 7), 3, {}),
    "a tail": (80, (6, 7), 3, {}),
    "a tail of strides": (96, (9, 9), 3, {"strides": (2, 2)}),
    "two pixels side by side": (32, (5, 13), 3, {}),
    "four pixels side by side": (16, (5, 10), 3, {}),
    "dilated": (64, (9, 9), 3, {"dilations": (2, 2)}),
    "five by five": (72, (9, 8), 5, {"strides": (2, 1)}),
    "two by two": (64, (6, 6), 2, {}),
}


@pytest.mark.parametrize("output", ["uint8", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_bytes(case: str, output: str, tmp_path: Path) -> None:
    channels, (height, width), kernel, options = CASES[case]
    pad = kernel // 2
    given = "".join(f", {name} = {list(values)}" for name, values in options.items())
    source = program(
        f"""(float[2, {channels}, {height}, {width}] x) => ({output}[n, c, h, w] y) {{
            q = QuantizeLinear(x, sx, zx)
            d = DequantizeLinear(q, sx, zx)
            wd = DequantizeLinear<axis = 0>(w, sw, zw)
            e = Conv<group = {channels}, pads = [{pad}, {pad}, {pad}, {pad}]{given}>(d, wd, b)
            r = Clip(e, low, high)
            y = QuantizeLinear(r, sy, zy)
        }}""",
        sx=np.array(0.03, np.float32), zx=np.array(101, np.uint8),
        w=integers(channels, 1, kernel, kernel), sw=scale(channels),
        zw=np.zeros(channels, np.int8), b=(channels,), low=np.array(-1, np.float32),
        high=np.array(6, np.float32), sy=np.array(7 / 255, np.float32),
        zy=np.array(36, np.uint8) if output == "uint8" else np.array(-92, np.int8),
    )  # fmt: skip
    inputs = random_inputs(source, 7)
    (want,) = run_onnx(source, inputs)
    results = [compiled(source, tmp_path / isa, isa, inputs, threads=2)[0] for isa in HERE]
    assert np.abs(results[0].astype(int) - want.astype(int)).max() <= 1
    assert (results[0] == want).mean() > 0.98
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)
