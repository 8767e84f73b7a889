"""Backend cpu in 8 bits: numbers against ONNX Runtime, and the same on every instruction set."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from optcompiler.target import Target
from optcompiler_cpu.backend import CpuBackend
from tests.backends.test_cpu import HERE, compiled, program
from tests.support import assert_close, filled_program, random_inputs, run_onnx


def scale(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(0.01, 0.03, shape).astype(np.float32)


def integers(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).integers(-127, 128, shape).astype(np.int8)


def zeros(dtype: type, *shape: int) -> np.ndarray:
    return np.zeros(shape, dtype)


NUMBERS = {
    "sx": np.array(0.03, np.float32), "zx": np.array(120, np.uint8),
    "sy": np.array(0.11, np.float32), "zy": np.array(7, np.uint8),
    "sr": np.array(0.2, np.float32), "zr": np.array(0, np.uint8),
}  # fmt: skip

INTEGERS = {
    "convolutions": (
        """(float[1, 3, 11, 9] x) => (float[1, 20, 1, 1] y, uint8[1, 20, 6, 5] z) {
            q = QuantizeLinear(x, sx, zx)
            d = DequantizeLinear(q, sx, zx)
            w0d = DequantizeLinear<axis = 0>(w0, s0, z20)
            b0d = DequantizeLinear<axis = 0>(b0, s0b)
            c = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(d, w0d, b0d)
            r = Relu(c)
            rq = QuantizeLinear(r, sr, zr)
            rd = DequantizeLinear(rq, sr, zr)
            w1d = DequantizeLinear<axis = 0>(w1, s1, z20)
            e = Conv<pads = [1, 1, 1, 1], group = 20>(rd, w1d, bf)
            eq = QuantizeLinear(e, sy, zy)
            ed = DequantizeLinear(eq, sy, zy)
            w2q = QuantizeLinear<axis = 0>(w2, s0, z20)
            w2d = DequantizeLinear<axis = 0>(w2q, s0, z20)
            f = Conv(ed, w2d)
            fq = QuantizeLinear(f, sy, zy)
            fd = DequantizeLinear(fq, sy, zy)
            a = Add(fd, rd)
            aq = QuantizeLinear(a, sr, zr)
            ad = DequantizeLinear(aq, sr, zr)
            m = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [1, 1]>(ad)
            z = QuantizeLinear(m, sr, zr)
            md = DequantizeLinear(z, sr, zr)
            g = GlobalAveragePool(md)
            gq = QuantizeLinear(g, sr, zr)
            y = DequantizeLinear(gq, sr, zr)
        }""",
        {
            "w0": integers(20, 3, 3, 3), "s0": scale(20), "b0": np.arange(20, dtype=np.int32) * 50,
            "s0b": scale(20) * np.float32(0.03), "z20": zeros(np.int8, 20),
            "w1": integers(20, 1, 3, 3), "s1": scale(20), "bf": (20,), "w2": (20, 20, 1, 1),
            **NUMBERS,
        },
    ),
    "products": (
        """(float[2, 5, 11] x) => (uint8[2, 5, 35] y, float[10, 6] z, float[2, 5, 11] k) {
            q = QuantizeLinear(x, sx, zx)
            d = DequantizeLinear(q, sx, zx)
            w0d = DequantizeLinear(w0, sy, zw)
            m = MatMul(d, w0d)
            mb = Add(m, b0)
            mg = Gelu(mb)
            y = QuantizeLinear(mg, sr, zx)
            md = DequantizeLinear(y, sr, zx)
            f = Reshape(md, flat)
            w1d = DequantizeLinear<axis = 0>(w1, s1, z6)
            b1d = DequantizeLinear<axis = 0>(b1, s1b)
            z = Gemm<transB = 1>(f, w1d, b1d)
            u = Mul(d, d)
            uq = QuantizeLinear(u, sr, zr)
            ud = DequantizeLinear(uq, sr, zr)
            k = LayerNormalization(ud, one)
        }""",
        {
            "w0": integers(11, 35), "zw": np.array(0, np.int8), "b0": (35,),
            "w1": integers(6, 35), "s1": scale(6), "z6": zeros(np.int8, 6),
            "b1": np.arange(6, dtype=np.int32), "s1b": scale(6) * np.float32(0.2),
            "flat": np.array([10, 35]), "one": (11,), **NUMBERS,
        },
    ),
    "signed": (
        """(int8[3, 10] x, float[1, 4, 5, 5] i) => (int8[3, 7] y, int8[1, 4, 5, 5] j) {
            d = DequantizeLinear(x, sx, zs)
            w0d = DequantizeLinear<axis = 1>(w0, s0, z7)
            m = MatMul(d, w0d)
            y = QuantizeLinear(m, sy, zs)
            iq = QuantizeLinear(i, sx, zs)
            id = DequantizeLinear(iq, sx, zs)
            w1d = DequantizeLinear(w1, sx, zi)
            c = Conv<pads = [1, 1, 1, 1]>(id, w1d)
            j = QuantizeLinear(c, sy, zs)
        }""",
        {
            "w0": integers(10, 7), "s0": scale(7), "z7": zeros(np.int8, 7),
            "zs": np.array(-3, np.int8), "zi": np.array(0, np.int8), "w1": integers(4, 4, 3, 3),
            "sx": NUMBERS["sx"], "sy": NUMBERS["sy"],
        },
    ),
    "decoder": (
        """(float[1, 9, 22] r) => (float[1, 9, 22] y) {
            rows = Reshape(r, flat)
            q = QuantizeLinear(rows, sx, zx)
            d = DequantizeLinear(q, sx, zx)
            w0d = DequantizeLinear<axis = 1>(w0, s0, z40)
            m = Gemm(d, w0d, b0)
            x = Reshape(m, deep)
            half = Mul(x, half_)
            cube = Pow(x, three)
            small = Mul(c, cube)
            inner = Add(small, x)
            scaled = Mul(root, inner)
            bell = Tanh(scaled)
            up = Add(one, bell)
            g = Mul(up, half)
            gq = QuantizeLinear(g, sy, zy)
            gd = DequantizeLinear(gq, sy, zy)
            gf = Reshape(gd, wide)
            w1d = DequantizeLinear(w1, sx, zi)
            n = Gemm(gf, w1d, b1)
            nd = Reshape(n, again)
            y = Add(r, nd)
        }""",
        {
            "w0": integers(22, 40), "s0": scale(40), "z40": zeros(np.int8, 40), "b0": (40,),
            "w1": integers(40, 22), "b1": (22,), "zi": np.array(0, np.int8),
            "flat": np.array([9, 22]), "deep": np.array([1, 9, 40]), "wide": np.array([9, 40]),
            "again": np.array([1, 9, 22]), "half_": np.array(0.5, np.float32),
            "three": np.array(3, np.float32), "c": np.array(0.044715, np.float32),
            "root": np.array(math.sqrt(2 / math.pi), np.float32), "one": np.array(1, np.float32),
            **NUMBERS,
        },
    ),
    "attention": (
        """(float[2, 5, 22] x, float[2, 67, 22] k) => (float[2, 2, 5, 67] s, uint8[2, 2, 5, 11] y) {
            xq = QuantizeLinear(x, sx, zx)
            xd = DequantizeLinear(xq, sx, zx)
            x4 = Reshape(xd, heads)
            xt = Transpose<perm = [0, 2, 1, 3]>(x4)
            kq = QuantizeLinear(k, sx, zm)
            kd = DequantizeLinear(kq, sx, zm)
            k4 = Reshape(kd, heads)
            kt = Transpose<perm = [0, 2, 3, 1]>(k4)
            s = MatMul(xt, kt)
            p = Softmax(s)
            pq = QuantizeLinear(p, sp, zr)
            pd = DequantizeLinear(pq, sp, zr)
            vq = QuantizeLinear(k, sx, zi)
            vd = DequantizeLinear(vq, sx, zi)
            v4 = Reshape(vd, heads)
            vt = Transpose<perm = [0, 2, 1, 3]>(v4)
            o = MatMul(pd, vt)
            y = QuantizeLinear(o, sx, zx)
        }""",
        {
            "heads": np.array([2, -1, 2, 11]), "zm": np.array(128, np.uint8),
            "zi": np.array(0, np.int8), "sp": np.array(1 / 255, np.float32), "sx": NUMBERS["sx"],
            "zx": NUMBERS["zx"], "zr": NUMBERS["zr"],
        },
    ),
}  # fmt: skip


def steps_apart(got: np.ndarray, want: np.ndarray, step: float) -> float:
    return float(np.max(np.abs(got.astype(np.float64) - want.astype(np.float64)))) / step


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_programs_agree_and_are_equal_on_every_isa(name: str, tmp_path: Path) -> None:
    body, weights = INTEGERS[name]
    source = program(body, **weights)
    inputs = random_inputs(source, 5)
    want = run_onnx(source, inputs)
    results = [compiled(source, tmp_path / isa, isa, inputs) for isa in HERE]
    for got, expected in zip(results[0], want, strict=True):
        if np.issubdtype(expected.dtype, np.floating):
            apart = steps_apart(got, expected, max(float(np.abs(expected).max()) / 255, 1e-6))
            assert apart <= 1.01
        else:
            difference = np.abs(got.astype(int) - expected.astype(int))
            assert difference.max() <= 1
            assert (difference == 0).mean() > 0.95
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            if a.dtype != np.float32 and name != "products":
                np.testing.assert_array_equal(a, b)


def test_integer_contractions_are_integer_kernels() -> None:
    body, weights = INTEGERS["convolutions"]
    kernels = CpuBackend().kernels(program(body, **weights), Target("cpu", threads=1))
    types = [k.dtype for k in kernels if k.kind in {"conv", "depthwise"}]
    assert types == ["int8"] * 3
    assert all(k.macs > 0 for k in kernels if k.kind in {"conv", "depthwise"})


def test_products_of_two_results_are_integer_kernels() -> None:
    body, weights = INTEGERS["attention"]
    target = Target("cpu", threads=1)
    kernels = CpuBackend().kernels(program(body, **weights), target)
    assert [(k.dtype, k.shape) for k in kernels if k.kind == "gemm"] == [
        ("int8", (4, 5, 67, 11)), ("int8", (4, 5, 11, 67)),
    ]  # fmt: skip
    skewed = {**weights, "zm": np.array(127, np.uint8)}
    kernels = CpuBackend().kernels(program(body, **skewed), target)
    assert [k.dtype for k in kernels if k.kind == "gemm"] == ["fp32", "int8"]


@pytest.mark.parametrize(
    "body",
    [
        "n = LayerNormalization <axis = -1> (x, g)\n c = Cast <to = 1> (m)\n y = Mul (n, c)",
        "c = Cast <to = 1> (m)\n a = Add (x, c)\n y = Softmax <axis = -1> (a)",
        "n = MatMul (x, w)\n c = Cast <to = 1> (m)\n y = Mul (n, c)",
    ],
)
def test_integers_beside_vector_kernels(body: str, tmp_path: Path) -> None:
    net = filled_program(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[2,6,24] x, int64[2,6,1] m) => (float[2,6,24] y) <float[24] g, float[24,24] w>
        {{ {body} }}"""
    )
    net.sweep()
    inputs = random_inputs(net)
    assert_close(compiled(net, tmp_path, "native", inputs), run_onnx(net, inputs), 1e-5)


def test_a_gelu_between_products_takes_no_step() -> None:
    body, weights = INTEGERS["decoder"]
    found = CpuBackend().kernels(program(body, **weights), Target("cpu", threads=1))
    assert [(k.kind, k.dtype) for k in found] == [
        ("pointwise", "int8"), ("gemm", "int8"), ("gemm", "int8"),
    ]  # fmt: skip


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("form", ["none", "tanh"])
def test_a_gelu_kept_in_eight_bits_is_near(form: str, isa: str, tmp_path: Path) -> None:
    """Off by a thirtieth of a step at most, so it rounds otherwise only close to the middle of
    two integers; far from zero it is exact."""
    size, step = 6000, 0.004
    source = program(
        f"""(float[{size}] x) => (uint8[{size}] y) {{
            g = Gelu<approximate = "{form}">(x) y = QuantizeLinear(g, step, zero) }}""",
        step=np.array(step, np.float32), zero=np.array(50, np.uint8),
    )  # fmt: skip
    special = np.array([-1e9, 1e9, -40, np.inf], np.float32)
    x = np.concatenate([np.linspace(-6, 0.9, size - 4, dtype=np.float32), special])
    wide = x.astype(np.float64)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    bell = np.tanh(inner) if form == "tanh" else np.vectorize(math.erf)(wide / math.sqrt(2))
    exact = wide / 2 * (1 + bell) / step + 50
    got = compiled(source, tmp_path, isa, {"x": x})[0].astype(np.float64)
    assert np.abs(got - exact)[:-4].max() < 0.5 + 1 / 30
    np.testing.assert_array_equal(got[-4:], [50, 255, 50, 255])


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("planes", [2, 3, 4])
def test_planes_quantised_to_pixels(planes: int, isa: str, tmp_path: Path) -> None:
    source = program(
        f"""(float[2, {planes}, 9, 37] x)
            => (uint8[2, 9, 37, {planes}] y, int8[2, 333, {planes}] z) {{
            q = QuantizeLinear(x, s, u)
            y = Transpose<perm = [0, 2, 3, 1]>(q)
            i = QuantizeLinear(x, s, t)
            j = Reshape(i, shape)
            z = Transpose<perm = [0, 2, 1]>(j)
        }}""",
        s=np.array(0.02, np.float32), u=np.array(128, np.uint8), t=np.array(-7, np.int8),
        shape=np.array([2, planes, 333]),
    )  # fmt: skip
    inputs = random_inputs(source, 3)
    for got, want in zip(
        compiled(source, tmp_path, isa, inputs, threads=2), run_onnx(source, inputs), strict=True
    ):
        difference = np.abs(got.astype(int) - want.astype(int))
        assert difference.max() <= 1
        assert (difference == 0).mean() > 0.99


@pytest.mark.parametrize("kind", ["matmul", "gemm", "conv"])
@pytest.mark.parametrize(
    ("stored", "low", "high", "zero", "dtype"),
    [
        (np.uint8, 0, 256, 0, "fp32"),
        (np.uint8, 0, 256, 128, "int8"),
        (np.uint8, 0, 120, 0, "int8"),
        (np.int8, -100, 100, 3, "int8"),
        (np.int8, -128, 128, 3, "fp32"),
    ],
)
def test_weights_of_any_zero_point(
    kind: str, stored: type, low: int, high: int, zero: int, dtype: str, tmp_path: Path
) -> None:
    shape = {"matmul": (8, 5), "gemm": (5, 8), "conv": (5, 8, 1, 1)}[kind]
    node = {"matmul": "MatMul", "gemm": "Gemm<transB = 1>", "conv": "Conv"}[kind]
    space = "1, 8, 4, 4" if kind == "conv" else "6, 8"
    levels = np.random.default_rng(2).integers(low, high, shape).astype(stored)
    levels.reshape(-1)[:2] = low, high - 1
    source = program(
        f"""(float[{space}] x) => (float[{space.replace("8", "5")}] y) {{
            q = QuantizeLinear(x, sx, zx)
            d = DequantizeLinear(q, sx, zx)
            wd = DequantizeLinear(w, sx, zw)
            y = {node}(d, wd)
        }}""",
        w=levels, zw=np.array(zero, stored), sx=NUMBERS["sx"], zx=NUMBERS["zx"],
    )  # fmt: skip
    inputs = random_inputs(source, 4)
    (got,), (want,) = compiled(source, tmp_path, HERE[0], inputs), run_onnx(source, inputs)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    kernels = CpuBackend().kernels(source, Target("cpu", threads=1))
    assert {k.dtype for k in kernels if k.macs} == {dtype}


@pytest.mark.parametrize("output", ["uint8", "int8"])
def test_rows_of_bytes_of_any_width(output: str, tmp_path: Path) -> None:
    """Of one vector and of several, whole or not, with a residual and without."""
    widths = (5, 16, 24, 32, 40, 48, 56, 64, 88)
    weights: dict[str, np.ndarray] = {
        "sx": NUMBERS["sx"], "zx": NUMBERS["zx"], "sy": np.array(0.2, np.float32),
        "zy": np.array(0 if output == "uint8" else 3, output),
    }  # fmt: skip
    inputs, outputs, lines = ["float[3, 13, 20] x"], [], []
    for n in widths:
        weights |= {f"w{n}": integers(20, n), f"s{n}": scale(n), f"z{n}": np.zeros(n, np.int8)}
        inputs.append(f"float[3, 13, {n}] r{n}")
        outputs += [f"{output}[3, 13, {n}] y{n}", f"{output}[3, 13, {n}] v{n}"]
        lines += [
            f"d{n} = DequantizeLinear<axis = 1>(w{n}, s{n}, z{n})",
            f"m{n} = MatMul(d, d{n})",
            f"y{n} = QuantizeLinear(m{n}, sy, zy)",
            f"q{n} = QuantizeLinear(r{n}, sx, zx)",
            f"e{n} = DequantizeLinear(q{n}, sx, zx)",
            f"p{n} = MatMul(d, d{n})",
            f"a{n} = Add(p{n}, e{n})",
            f"v{n} = QuantizeLinear(a{n}, sy, zy)",
        ]
    source = program(
        f"""({", ".join(inputs)}) => ({", ".join(outputs)}) {{
            q = QuantizeLinear(x, sx, zx)
            d = DequantizeLinear(q, sx, zx)
            {chr(10).join(lines)}
        }}""",
        **weights,
    )
    given = random_inputs(source, 5)
    want = run_onnx(source, given)
    for isa in HERE:
        for got, expected in zip(
            compiled(source, tmp_path / isa, isa, given, threads=2), want, strict=True
        ):
            difference = np.abs(got.astype(int) - expected.astype(int))
            assert difference.max() <= 1
            assert (difference == 0).mean() > 0.98
