"""AMX tiles: heights, rows that lie apart, sizes that fill no register."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from optcompiler_cpu.amx import amx_rows, halves
from optcompiler_cpu.isa import ISAS, supported
from tests.backends.test_cpu import compiled, program

HERE = supported(ISAS["amx_int8"])


@pytest.mark.parametrize("rows", range(1, 33))
def test_halves_fit_registers(rows: int) -> None:
    first, second = halves(rows)
    assert first + second == rows
    assert 0 <= second <= first <= 16


@pytest.mark.parametrize(
    ("rows", "line", "height"),
    [(64, 64, 32), (3136, 56, 28), (196, 14, 28), (49, 49, 25), (5, 5, 5), (3136, 3136, 32)],
)
def test_heights_fit_the_lines_of_a_picture(rows: int, line: int, height: int) -> None:
    assert amx_rows(rows, line, 32) == height


CONVOLUTION = """
    (float[{n}, {c}, {h}, {w}] x) => (float[{n}, {oc}, {oh}, {ow}] y)
    <float s = {{0.05}}, uint8 z = {{117}}, float[{oc}] ws, int8[{oc}] wz,
     float[{oc},{ic},{k},{k}] w, float[{oc}] b> {{
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        qw = QuantizeLinear<axis = 0>(w, ws, wz)
        dw = DequantizeLinear<axis = 0>(qw, ws, wz)
        y = Conv<pads = [{p}, {p}, {p}, {p}], strides = [{t}, {t}], group = {g}>(d, dw, b)
    }}"""


@pytest.mark.skipif(not HERE, reason="this machine has no AMX")
@pytest.mark.parametrize(
    ("n", "c", "h", "w", "oc", "k", "p", "t", "g"),
    [
        (1, 64, 14, 14, 64, 3, 1, 1, 1),
        (2, 20, 9, 11, 37, 3, 1, 2, 1),
        (1, 96, 7, 7, 24, 1, 0, 1, 1),
        (1, 3, 33, 17, 16, 7, 3, 2, 1),
        (1, 48, 10, 10, 32, 3, 0, 1, 2),
        (3, 160, 4, 5, 65, 1, 0, 2, 1),
    ],
)
def test_convolutions_are_those_of_vnni(
    tmp_path: Path, n: int, c: int, h: int, w: int, oc: int, k: int, p: int, t: int, g: int
) -> None:
    oh, ow = ((size + 2 * p - k) // t + 1 for size in (h, w))
    rng = np.random.default_rng(0)
    net = program(
        CONVOLUTION.format(n=n, c=c, h=h, w=w, oc=oc, oh=oh, ow=ow, ic=c // g, k=k, p=p, t=t, g=g),
        ws=rng.uniform(0.005, 0.02, oc).astype(np.float32), wz=np.zeros(oc, np.int8),
        w=(oc, c // g, k, k), b=(oc,),
    )  # fmt: skip
    x = {"x": rng.normal(0, 3, (n, c, h, w)).astype(np.float32)}
    [amx] = compiled(net, tmp_path / "amx", "amx_int8", x)
    [vnni] = compiled(net, tmp_path / "vnni", "avx512_vnni", x)
    np.testing.assert_array_equal(amx, vnni)
    assert "tile_amx_" in (tmp_path / "amx" / "src" / "kernels.h").read_text()


@pytest.mark.skipif(not HERE, reason="this machine has no AMX")
@pytest.mark.parametrize(("m", "k", "n"), [(8, 64, 32), (33, 100, 40), (64, 384, 17), (7, 65, 33)])
def test_products_are_those_of_vnni(tmp_path: Path, m: int, k: int, n: int) -> None:
    rng = np.random.default_rng(1)
    net = program(
        f"""(float[{m}, {k}] x) => (float[{m}, {n}] y)
        <float s = {{0.03}}, uint8 z = {{128}}, float[{n}] ws, int8[{n}] wz, float[{k},{n}] w> {{
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            qw = QuantizeLinear<axis = 1>(w, ws, wz)
            dw = DequantizeLinear<axis = 1>(qw, ws, wz)
            y = MatMul(d, dw)
        }}""",
        ws=rng.uniform(0.005, 0.02, n).astype(np.float32), wz=np.zeros(n, np.int8), w=(k, n),
    )  # fmt: skip
    x = {"x": rng.normal(0, 2, (m, k)).astype(np.float32)}
    [amx] = compiled(net, tmp_path / "amx", "amx_int8", x, threads=2)
    [vnni] = compiled(net, tmp_path / "vnni", "avx512_vnni", x)
    np.testing.assert_array_equal(amx, vnni)
    assert ("tile_amx_" in (tmp_path / "amx" / "src" / "kernels.h").read_text()) == (m >= 8)
