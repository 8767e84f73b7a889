"""Weights of few bits beside bytes (W4A8) on the cpu backend: every instruction set agrees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from optcompiler.program import Program
from optcompiler.target import Target
from optcompiler_cpu import weight_bytes
from optcompiler_cpu.backend import CpuBackend
from tests.backends.test_cpu_weights import (
    HERE,
    Case,
    compiled,
    inputs_of,
    joined,
    levels,
    quantised_weight,
    reference,
)


def product(
    m: int, k: int, n: int, dtype: str, block: int | None, *, zero: bool = False,
    zero_point: int = 121, signed: bool = False,
) -> Case:  # fmt: skip
    """`y = quantised(x) @ dequantised(w) + b`, quantised again where `n` is even."""
    made, attributes = quantised_weight(dtype, k, n, block, zero=zero)
    kind = np.int8 if signed else np.uint8
    last = "h = QuantizeLinear(r, e, f) y = DequantizeLinear(h, e, f)" if n % 2 == 0 else ""
    result = "r" if last else "y"
    nodes = f"""
        q = QuantizeLinear(x, c, o)
        g = DequantizeLinear(q, c, o)
        d = DequantizeLinear{attributes}({"w, s, z" if zero else "w, s"})
        p = MatMul(g, d)
        {result} = Add(p, b)
        {last}
    """
    more = {"e": np.float32(0.03), "f": np.uint8(128)} if last else {}
    bias = np.random.default_rng(2).standard_normal(n).astype(np.float32)
    return Case(
        f"float[{m},{k}] x", f"float[{m},{n}] y", nodes, **made, b=bias,
        c=np.float32(0.02), o=kind(zero_point - 128 if signed else zero_point),
        **{name: np.asarray(value) for name, value in more.items()},
    )  # fmt: skip


def convolution(size: int, channels: int, out: int, kernel: int, block: int) -> Case:
    rng = np.random.default_rng(size)
    return Case(
        f"float[1,{channels},{size},{size}] x", f"float[1,{out},{size},{size}] y",
        f"""q = QuantizeLinear(x, c, o)
            g = DequantizeLinear(q, c, o)
            d = DequantizeLinear<axis = 1, block_size = {block}>(w, s, z)
            y = Conv<pads = [{", ".join([str(kernel // 2)] * 4)}]>(g, d, b)""",
        w=levels(rng, "UINT4", (out, channels, kernel, kernel)),
        s=rng.uniform(0.001, 0.01, (out, -(-channels // block), kernel, kernel)).astype(np.float32),
        z=levels(rng, "UINT4", (out, -(-channels // block), kernel, kernel)),
        b=rng.standard_normal(out).astype(np.float32), c=np.asarray(np.float32(0.02)),
        o=np.asarray(np.uint8(117)),
    )  # fmt: skip


CASES = {
    "one row, blocks": product(1, 256, 130, "INT4", 32),
    "one row, blocks with zero points": product(1, 96, 70, "UINT4", 16, zero=True),
    "two rows, the last block short": product(2, 45, 33, "INT4", 16),
    "three rows, blocks of odd size": product(3, 37, 40, "UINT4", 7, zero=True),
    "many rows, blocks": product(19, 64, 131, "INT4", 32),
    "many rows, signed": product(9, 72, 66, "UINT4", 24, zero=True, signed=True),
    "no zero point": product(5, 70, 49, "UINT4", 20, zero_point=0),
    "channels": product(4, 129, 65, "INT4", None),
    "channels with zero points": product(1, 40, 32, "UINT4", None, zero=True),
    "channels, many rows": product(5, 40, 33, "INT4", None),
    "bytes in blocks": product(2, 66, 37, "INT8", 32),
    "bytes in blocks with zero points": product(6, 66, 38, "UINT8", 20, zero=True),
    "depth 1": product(3, 1, 20, "INT4", 1),
    "conv 1x1": convolution(5, 48, 20, 1, 16),
    "conv 3x3": convolution(4, 24, 20, 3, 8),
}  # fmt: skip


@pytest.fixture(scope="module")
def everywhere(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Program, dict[str, np.ndarray], dict[str, list[np.ndarray]]]:
    """The cases' results by instruction set, small weights kept as large ones are."""
    source = joined(CASES)
    inputs = inputs_of(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_bytes, "MANY_WEIGHTS", 1)
        results = {
            isa: compiled(source, tmp_path_factory.mktemp(isa), isa, inputs, threads=2)
            for isa in HERE
        }
    return source, inputs, results


def test_every_instruction_set_gives_the_same_numbers(
    everywhere: tuple[Program, dict[str, np.ndarray], dict[str, list[np.ndarray]]],
) -> None:
    _, _, results = everywhere
    for isa in HERE[1:]:
        for name, y, first in zip(CASES, results[isa], results[HERE[0]], strict=True):
            np.testing.assert_array_equal(y, first, err_msg=f"{name}, {isa} and {HERE[0]}")


def test_results_agree_with_the_executor(
    everywhere: tuple[Program, dict[str, np.ndarray], dict[str, list[np.ndarray]]],
) -> None:
    """A sum that is nearly between two levels may become the other one."""
    source, inputs, results = everywhere
    expected = reference(source, inputs)
    for (name, case), y, wanted in zip(CASES.items(), results[HERE[0]], expected, strict=True):
        difference = np.abs(y - wanted)
        if "e" in case.weights:
            assert (difference > 1e-5).mean() <= 0.02, name
            assert difference.max() <= 0.0301, name
        else:
            np.testing.assert_allclose(y, wanted, rtol=2e-5, atol=2e-5, err_msg=name)


def test_large_weights_of_a_row_stay_nibbles(tmp_path: Path) -> None:
    source = joined({"": product(1, 1024, 1026, "INT4", None)})
    CpuBackend().lower(source, Target("cpu", threads=1), tmp_path)
    assert (tmp_path / "net.weights").stat().st_size < 1024 * 1088 / 2 + 16384
