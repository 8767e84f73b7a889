"""Backend cpu: attention as one step gives the numbers of its three steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from optcompiler.program import Program
from optcompiler.target import Target
from optcompiler_cpu import attention
from optcompiler_cpu.backend import CpuBackend
from tests.backends.test_cpu import HERE, WHOLE, compiled, program
from tests.support import assert_close, random_inputs, run_onnx

FLOAT = (
    """{
        qt = Transpose<perm = [0, 2, 1, 3]>(q)
        kt = Transpose<perm = [0, 2, 3, 1]>(k)
        vt = Transpose<perm = [0, 2, 1, 3]>(v)
        s = MatMul(qt, kt)
        scaled = Mul(s, scale)
        masked = Add(scaled, mask)
        p = Softmax<axis = -1>(masked)
        o = MatMul(p, vt)
        y = Transpose<perm = [0, 2, 1, 3]>(o)
    }"""
)  # fmt: skip

INTEGER = (
    """{
        qq = QuantizeLinear(q, sx, zx)
        qd = DequantizeLinear(qq, sx, zx)
        kq = QuantizeLinear(k, sx, zm)
        kd = DequantizeLinear(kq, sx, zm)
        vq = QuantizeLinear(v, sx, zi)
        vd = DequantizeLinear(vq, sx, zi)
        qt = Transpose<perm = [0, 2, 1, 3]>(qd)
        kt = Transpose<perm = [0, 2, 3, 1]>(kd)
        vt = Transpose<perm = [0, 2, 1, 3]>(vd)
        s = MatMul(qt, kt)
        scaled = Mul(s, scale)
        masked = Add(scaled, mask)
        p = Softmax<axis = -1>(masked)
        pq = QuantizeLinear(p, sp, zr)
        pd = DequantizeLinear(pq, sp, zr)
        o = MatMul(pd, vt)
        y = Transpose<perm = [0, 2, 1, 3]>(o)
    }"""
)  # fmt: skip

NARROW = (
    """{
        qh = Cast<to = 16>(q)
        kh = Cast<to = 16>(k)
        vh = Cast<to = 16>(v)
        qt = Transpose<perm = [0, 2, 1, 3]>(qh)
        kt = Transpose<perm = [0, 2, 3, 1]>(kh)
        vt = Transpose<perm = [0, 2, 1, 3]>(vh)
        s = MatMul(qt, kt)
        sf = Cast<to = 1>(s)
        scaled = Mul(sf, scale)
        masked = Add(scaled, mask)
        p = Softmax<axis = -1>(masked)
        ph = Cast<to = 16>(p)
        o = MatMul(ph, vt)
        of = Cast<to = 1>(o)
        y = Transpose<perm = [0, 2, 1, 3]>(of)
    }"""
)  # fmt: skip

BODIES = {"fp32": FLOAT, "int8": INTEGER, "bf16": NARROW}

SIZES = {"few rows": (2, 5, 67, 2, 11), "slices and two rows": (1, 50, 100, 3, 16),
         "two slices": (1, 96, 33, 2, 12), "one row": (2, 1, 40, 2, 8)}  # fmt: skip
"""Batch, rows, columns, heads, and the depth of a head."""


def attending(kind: str, size: str) -> Program:
    batch, rows, columns, heads, depth = SIZES[size]
    ports = (
        f"(float[{batch}, {rows}, {heads}, {depth}] q, float[{batch}, {columns}, {heads}, {depth}] "
        f"k, float[{batch}, {columns}, {heads}, {depth}] v, float[{batch}, 1, 1, {columns}] mask) "
        f"=> (float[{batch}, {rows}, {heads}, {depth}] y) "
    )
    weights: dict[str, WHOLE] = {"scale": np.array(0.3, np.float32)}
    if kind == "int8":
        weights |= {
            "sx": np.array(0.03, np.float32), "sp": np.array(1 / 255, np.float32),
            "zx": np.array(117, np.uint8), "zm": np.array(128, np.uint8),
            "zi": np.array(0, np.int8), "zr": np.array(0, np.uint8),
        }  # fmt: skip
    return program(ports + BODIES[kind], **weights)


def apart(source: Program, directory: Path, isa: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """What the three steps give."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "PANEL_BYTES", -1)
        kinds = [k.kind for k in CpuBackend().kernels(source, Target("cpu", isa=isa))]
        assert kinds.count("gemm") == 2
        return compiled(source, directory, isa, inputs)[0]


CASES = [*(("fp32", size) for size in SIZES), *(
    (kind, size) for kind in ("int8", "bf16") for size in ("few rows", "slices and two rows")
)]  # fmt: skip


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("kind", "size"), CASES)
def test_one_step_is_the_three(kind: str, size: str, isa: str, tmp_path: Path) -> None:
    source = attending(kind, size)
    inputs = random_inputs(source)
    kernels = CpuBackend().kernels(source, Target("cpu", isa=isa))
    assert [k.kind for k in kernels if k.kind in {"gemm", "softmax"}] == ["gemm"]
    want = apart(source, tmp_path / "apart", isa, inputs)
    info = CpuBackend().lower(source, Target("cpu", isa=isa), tmp_path)
    for threads in (1, 2, 3):
        runner = CpuBackend().load(tmp_path, info, threads=threads)
        np.testing.assert_array_equal(runner.run(inputs)[0], want)
        runner.close()
    if kind == "fp32":
        assert_close([want], run_onnx(source, inputs))


def test_it_counts_what_the_three_count() -> None:
    source = attending("fp32", "slices and two rows")
    kernel, *_ = CpuBackend().kernels(source, Target("cpu"))
    assert kernel.macs == 2 * 3 * 50 * 100 * 16
    assert kernel.shape == (3, 50, 100, 16, 16, 100)
    assert kernel.bytes_moved == 4 * (2 * 50 * 48 + 2 * 100 * 48 + 100)


@pytest.mark.parametrize("also", ["s", "p"])
def test_what_others_read_stays_in_memory(also: str, tmp_path: Path) -> None:
    source = program(
        f"""(float[2, 20, 8] q, float[2, 8, 30] k, float[2, 30, 8] v)
            => (float[2, 20, 8] y, float[2, 20, 30] {also}) {{
            s = MatMul(q, k)
            p = Softmax<axis = -1>(s)
            y = MatMul(p, v)
        }}"""
    )
    kinds = [k.kind for k in CpuBackend().kernels(source, Target("cpu"))]
    assert kinds == ["gemm", "softmax", "gemm"]
    inputs = random_inputs(source)
    assert_close(compiled(source, tmp_path, HERE[0], inputs), run_onnx(source, inputs))
