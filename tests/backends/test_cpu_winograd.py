"""Winograd convolutions of the cpu backend: chosen where they win, and right at every edge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from optcompiler.lowering import lower
from optcompiler.lowering.ir import Conv
from optcompiler.program import Program
from optcompiler.target import Target
from optcompiler_cpu.backend import CpuBackend
from optcompiler_cpu.isa import ISAS, supported
from optcompiler_cpu.legalize import legalize
from optcompiler_cpu.winograd import is_winograd, multiplications, weight_transform
from tests.support import assert_close, filled_program, random_inputs, run_onnx

HERE = [name for name, isa in ISAS.items() if supported(isa)]


def convolution(
    n: int, c: int, h: int, w: int, oc: int, attributes: str = "pads=[1,1,1,1]"
) -> Program:
    return filled_program(
        f"""<ir_version: 10, opset_import: ["": 20]> g (float[{n},{c},{h},{w}] x)
            => (float[{n},{oc},{h},{w}] y)
            <float[{oc},{c},3,3] w0, float[{oc}] b0> {{
            c0 = Conv<{attributes}>(x, w0, b0)
            s0 = Sigmoid(c0)
            y = Mul(c0, s0)
        }}"""
    )


def step_of(program: Program, isa: str = "portable") -> Conv:
    lowered = lower(program, plan=False)
    legalize(lowered, ISAS[isa])
    return next(s for s in lowered.steps if isinstance(s, Conv))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(
    ("n", "c", "h", "w", "oc"),
    [(1, 32, 12, 12, 32), (2, 48, 13, 18, 40), (1, 64, 21, 9, 70)],
    ids=["even", "two images, ragged", "ragged columns"],
)
def test_equals_the_direct_sum(
    isa: str, n: int, c: int, h: int, w: int, oc: int, tmp_path: Path
) -> None:
    program = convolution(n, c, h, w, oc)
    assert is_winograd(step_of(program), ISAS[isa])
    inputs = random_inputs(program)
    expected = run_onnx(program, inputs)
    for threads in (1, 2):
        backend = CpuBackend()
        directory = tmp_path / str(threads)
        directory.mkdir()
        info = backend.lower(program, Target("cpu", threads=threads, isa=isa), directory)
        runner = backend.load(directory, info, threads=threads)
        try:
            assert_close(runner.run(inputs), expected, rtol=1e-5)
        finally:
            runner.close()


@pytest.mark.parametrize(
    "attributes",
    ["pads=[2,2,2,2], dilations=[2,2]", "pads=[1,1,1,1], group=2"],
)
def test_other_convolutions_stay_direct(attributes: str) -> None:
    group = 2 if "group" in attributes else 1
    program = filled_program(
        f"""<ir_version: 10, opset_import: ["": 20]> g (float[1,64,24,24] x)
            => (float[1,64,24,24] y) <float[64,{64 // group},3,3] w0> {{
            y = Conv<{attributes}>(x, w0)
        }}"""
    )
    assert not is_winograd(step_of(program), ISAS["avx2"])


def test_few_channels_stay_direct() -> None:
    assert not is_winograd(step_of(convolution(1, 8, 24, 24, 8)), ISAS["avx2"])


def test_the_cost_model_counts_the_products_that_are_made() -> None:
    program = convolution(1, 64, 24, 24, 64)
    kernel = next(
        k for k in CpuBackend().kernels(program, Target("cpu", isa="avx2")) if k.kind == "winograd"
    )
    assert kernel.macs == multiplications(step_of(program)) == 36 * 36 * 64 * 64
    assert kernel.macs * 4 == 24 * 24 * 9 * 64 * 64


def test_the_transforms_belong_together() -> None:
    """A constant kernel on constant pixels sums to nine: G's first and last rows see the ends."""
    g = weight_transform()
    assert g.shape == (6, 3)
    np.testing.assert_array_equal(g[5], [0, 0, 1])
    np.testing.assert_allclose(g[0], [1 / np.prod([-0.75, 0.75, -1.5, 1.5]), 0, 0])
