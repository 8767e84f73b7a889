"""Depthwise convolutions of bytes: the same integers from every instruction set, and the right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from optcompiler.lowering.ir import Conv
from optcompiler.program import Program
from optcompiler.target import Target
from optcompiler_cpu.backend import CpuBackend, emit
from optcompiler_cpu.depthwise_bytes import DOWN, FLAT, best_tile
from optcompiler_cpu.isa import ISAS, named_isas, supported
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
    "five by five in all rows": (64, (6, 9), 5, {}),
    "seven by seven": (64, (9, 10), 7, {}),
    "two by two": (64, (6, 6), 2, {}),
    "one row": (64, (1, 9), 3, {}),
    "strides of side by side": (16, (9, 12), 3, {"strides": (2, 2)}),
    "narrower than side by side": (16, (5, 3), 3, {}),
    "dilated side by side": (32, (7, 9), 3, {"dilations": (1, 2)}),
}


def source_of(
    case: str, output: str, step: float = 7 / 255, bias: str = ", b",
    height: str = "", width: str = "",
) -> Program:  # fmt: skip
    """A depthwise convolution from bytes to bytes of scale `step`, by default with a float bias."""
    channels, size, kernel, options = CASES[case]
    height, width = height or str(size[0]), width or str(size[1])
    pad = kernel // 2
    given = "".join(f", {name} = {list(values)}" for name, values in options.items())
    return program(
        f"""(float[2, {channels}, {height}, {width}] x) => ({output}[n, c, h, w] y) {{
            q = QuantizeLinear(x, sx, zx)
            d = DequantizeLinear(q, sx, zx)
            wd = DequantizeLinear<axis = 0>(w, sw, zw)
            e = Conv<group = {channels}, pads = [{pad}, {pad}, {pad}, {pad}]{given}>(d, wd{bias})
            r = Clip(e, low, high)
            y = QuantizeLinear(r, sy, zy)
        }}""",
        sx=np.array(0.03, np.float32), zx=np.array(101, np.uint8),
        w=integers(channels, 1, kernel, kernel), sw=scale(channels),
        zw=np.zeros(channels, np.int8), b=(channels,), low=np.array(-1, np.float32),
        high=np.array(6, np.float32), sy=np.array(step, np.float32),
        zy=np.array(36, np.uint8) if output == "uint8" else np.array(-92, np.int8),
    )  # fmt: skip


@pytest.mark.parametrize("output", ["uint8", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_bytes(case: str, output: str, tmp_path: Path) -> None:
    source = source_of(case, output)
    inputs = random_inputs(source, 7)
    (want,) = run_onnx(source, inputs)
    results = [compiled(source, tmp_path / isa, isa, inputs, threads=2)[0] for isa in HERE]
    assert np.abs(results[0].astype(int) - want.astype(int)).max() <= 1
    assert (results[0] == want).mean() > 0.98
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_what_is_beyond_32_bits_saturates(tmp_path: Path) -> None:
    source = source_of("whole groups", "uint8", 1e-10, bias="")
    inputs = random_inputs(source, 7)
    (want,) = run_onnx(source, inputs)
    assert {0, 255} <= set(want.flat)
    for isa in HERE:
        (got,) = compiled(source, tmp_path / isa, isa, inputs)
        np.testing.assert_array_equal(got, want)


def test_only_sums_that_may_be_larger_are_held_below_32_bits() -> None:
    for step, held in ((7 / 255, False), (1e-10, True)):
        _, module = emit(source_of("whole groups", "uint8", step, ""), named_isas("avx512_vnni"))
        text = "".join(t for name, t in module.sources.items() if "kernels_" in name)
        [kernel] = [part for part in text.split("\nvoid ") if "vi_join_lanes_u8" in part]
        assert ("vf_int(vf_min(" in kernel) == held


@pytest.mark.parametrize("axis", ["height", "width"])
@pytest.mark.parametrize("case", ["whole groups", "a tail", "two pixels side by side"])
def test_sizes_at_run_time(case: str, axis: str, tmp_path: Path) -> None:
    if not supported(ISAS["avx512_vnni"]):
        pytest.skip("needs AVX-512 with VNNI")
    source = source_of(case, "uint8", height="size" if axis == "height" else "",
                       width="size" if axis == "width" else "")  # fmt: skip
    target = Target("cpu", threads=1, isa="avx512_vnni", sizes={"size": (3, 8)})
    backend = CpuBackend()
    runner = backend.load(tmp_path, backend.lower(source, target, tmp_path), threads=1)
    for size in range(3, 9):
        inputs = random_inputs(source, 7, dynamic=size)
        [got], [want] = runner.run(inputs), run_onnx(source, inputs)
        assert got.shape == want.shape
        assert np.abs(got.astype(int) - want.astype(int)).max() <= 1
        assert (got == want).mean() > 0.98
    runner.close()


def test_a_tile_shares_what_it_unpacks() -> None:
    def tiles(case: str) -> list[tuple[int, int, str]]:
        [lowered], _ = emit(source_of(case, "uint8"), named_isas("avx512_vnni"))
        steps = [s for s in lowered.steps if isinstance(s, Conv)]
        return [(t.rows, t.columns, t.order) for t in map(best_tile, steps)]

    assert tiles("whole groups") == [(2, 2, DOWN)]
    assert tiles("a tail of strides") == [(1, 4, DOWN), (1, 1, FLAT)]
    assert tiles("one row") == [(1, 4, DOWN)]
    assert tiles("two by two") == [(1, 1, FLAT)]
