"""Programs of half floats on the cpu backend: computed in float, stored as half."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from optcompiler.target import Target
from optcompiler_cpu.backend import CpuBackend
from tests.backends.test_cpu_weights import HERE, Case, compiled, joined, reference


def casts() -> Case:
    return Case(
        "float16[65536] h, float[131072] x", "float[65536] y, float16[131072] z",
        "y = Cast<to = 1>(h) z = Cast<to = 10>(x)",
    )  # fmt: skip


@pytest.mark.parametrize("isa", HERE)
def test_every_half_is_widened_and_every_tie_rounded(isa: str, tmp_path: Path) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    with np.errstate(all="ignore"):
        up = np.nextafter(every, np.float16(np.inf)).astype(np.float32)
        ties = np.where(np.isfinite(up), (every.astype(np.float32) + up) / 2, 65520)
        near = np.nextafter(ties, np.float32(0) * ties)
        floats = np.concatenate([ties, near]).astype(np.float32)
        expected = [every.astype(np.float32), floats.astype(np.float16)]
    y, z = compiled(joined({"": casts()}), tmp_path, isa, {"h_0": every, "x_0": floats})
    np.testing.assert_array_equal(y, expected[0])
    np.testing.assert_array_equal(z, expected[1])


def half(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(np.float16)


RNG = np.random.default_rng(3)
CASES = {
    "product": Case(
        "float16[3,37] x", "float16[3,45] y", "p = MatMul(x, w) q = Add(p, b) y = Gelu(q)",
        w=half(RNG, 37, 45, scale=0.2), b=half(RNG, 45),
    ),
    "product of many rows": Case(
        "float16[2,20,33] x", "float16[2,20,18] y", "y = MatMul(x, w)",
        w=half(RNG, 33, 18, scale=0.2),
    ),
    "computed operands": Case(
        "float16[2,9,21] x, float16[2,13,21] v", "float16[2,9,21] y",
        "t = Transpose<perm = [0, 2, 1]>(v) p = MatMul(x, t) s = Softmax(p) y = MatMul(s, v)",
    ),
    "convolutions": Case(
        "float16[1,5,9,11] x", "float16[1,8,4,5] y",
        """c = Conv<pads = [1, 1, 1, 1]>(x, w, b) r = Relu(c) d = Conv<group = 8>(r, v)
           y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(d)""",
        w=half(RNG, 8, 5, 3, 3, scale=0.2), b=half(RNG, 8), v=half(RNG, 8, 1, 1, 1),
    ),
    "normalisation": Case(
        "float16[3,50] x", "float16[3,50] y", "y = LayerNormalization(x, s, b)",
        s=half(RNG, 50), b=half(RNG, 50),
    ),
    "rows of a table": Case(
        "int64[7] i", "float16[7,20] y", "g = Gather(t, i) y = Mul(g, s)",
        t=half(RNG, 30, 20), s=np.asarray(np.float16(0.3)),
    ),
    "sums and means": Case(
        "float16[3,4,33] x", "float16[3,33] y, float16[3,4] z",
        "m = Sigmoid(x) y = ReduceMean<keepdims = 0>(m, a) z = ReduceMax<keepdims = 0>(m, b)",
        a=np.array([1]), b=np.array([2]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("isa", HERE)
def test_operators_round_to_half(isa: str, tmp_path: Path) -> None:
    """Sums are of floats and rounded once, where the executor may round in between."""
    source = joined(CASES)
    rng = np.random.default_rng(1)
    inputs = {
        p.name: rng.integers(-30, 30, [int(d) for d in p.shape])
        if p.dtype == "INT64"
        else half(rng, *map(int, p.shape))
        for p in source.inputs
    }
    found = compiled(source, tmp_path, isa, inputs, threads=2)
    names = [name for name, case in CASES.items() for _ in case.outputs.split("float16")[1:]]
    for name, y, expected in zip(names, found, reference(source, inputs), strict=True):
        assert y.dtype == np.float16, name
        np.testing.assert_allclose(y, expected, rtol=2**-9, atol=2**-9, err_msg=name)


def test_weights_of_half_products_stay_half(tmp_path: Path) -> None:
    case = Case(
        "float16[3,256] x", "float16[3,64] y", "p = MatMul(x, w) q = Relu(p) y = MatMul(q, v)",
        w=half(RNG, 256, 320), v=half(RNG, 320, 64),
    )  # fmt: skip
    CpuBackend().lower(joined({"": case}), Target("cpu", threads=1), tmp_path)
    halves = (256 * 320 + 320 * 64) * 2
    assert halves <= (tmp_path / "net.weights").stat().st_size < halves + 4096
