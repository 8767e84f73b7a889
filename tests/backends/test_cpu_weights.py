"""Weights of few bits on the cpu backend: kernels of every instruction set against the executor."""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from optcompiler.program import Program
from optcompiler.target import Target
from optcompiler_cpu.backend import CpuBackend
from optcompiler_cpu.isa import ISAS, supported
from tests.backends.test_cpu_bf16 import inputs_of, reference

SAME = {"amx_int8", "avx512_bf16"}
"""Instruction sets whose kernels here are those of avx512_vnni."""

HERE = [name for name, isa in ISAS.items() if supported(isa) and name not in SAME]
HEAD = '<ir_version: 10, opset_import: ["": 22]> g '
LIMITS = {"INT4": (-8, 8), "UINT4": (0, 16), "INT8": (-128, 128), "UINT8": (0, 256)}


def program(body: str, **weights: np.ndarray) -> Program:
    """A program in ONNX text, its weights by name."""
    model = onnx.parser.parse_model(HEAD + body)
    for name, array in weights.items():
        model.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    return Program.from_onnx(model)


def levels(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    kind = ir.DataType[dtype].numpy()
    return rng.integers(*LIMITS[dtype], shape).astype(kind)


def quantised_weight(
    dtype: str, k: int, n: int, block: int | None, *, zero: bool, transposed: bool = False
) -> tuple[dict[str, np.ndarray], str]:
    """Levels, scales, maybe zero points of a [K, N] weight or its transpose; and attributes."""
    rng = np.random.default_rng(k * 1000 + n)
    count = (n,) if block is None else (-(-k // block), n) if block else ()
    made = {
        "w": levels(rng, dtype, (k, n)),
        "s": (rng.uniform(0.5, 1.5, count) / 8 / np.sqrt(k)).astype(np.float32),
    }
    if zero:
        made["z"] = levels(rng, dtype, count)
    axis = 0 if block else 1
    if transposed:
        made = {name: np.ascontiguousarray(array.T) for name, array in made.items()}
        axis = 1 - axis
    return made, f"<axis = {axis}{f', block_size = {block}' if block else ''}>"


class Case:
    """A piece of a graph: its inputs and outputs, nodes in ONNX text, and weights by name."""

    def __init__(self, inputs: str, outputs: str, nodes: str, **weights: np.ndarray) -> None:
        self.inputs, self.outputs, self.nodes, self.weights = inputs, outputs, nodes, weights

    def text(self, text: str, suffix: str) -> str:
        """The text with a suffix after every name."""
        every = f"{self.inputs} {self.outputs} {self.nodes}"
        names = set(re.findall(r"\b[a-z]\b", every))
        return re.sub(rf"\b({'|'.join(sorted(names))})\b", rf"\g<1>{suffix}", text)


def joined(cases: dict[str, Case]) -> Program:
    """All pieces as one program: a compile each would take long."""
    parts = list(enumerate(cases.values()))
    inputs, outputs, nodes = (
        [case.text(getattr(case, part), f"_{i}") for i, case in parts]
        for part in ("inputs", "outputs", "nodes")
    )
    body = f"({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {' '.join(nodes)} }}"
    weights = {f"{name}_{i}": w for i, case in parts for name, w in case.weights.items()}
    return program(body, **weights)


def product(
    m: int, k: int, n: int, dtype: str, block: int | None, *, zero: bool = False,
    transposed: bool = False,
) -> Case:  # fmt: skip
    """`y = x @ dequantised(w) + b`; `block` None is per channel, 0 per tensor."""
    made, attributes = quantised_weight(dtype, k, n, block, zero=zero, transposed=transposed)
    bias = np.random.default_rng(2).standard_normal(n).astype(np.float32)
    nodes = f"""
        d = DequantizeLinear{attributes}({"w, s, z" if zero else "w, s"})
        y = Gemm<transB = {int(transposed)}>(x, d, b)
    """
    return Case(f"float[{m},{k}] x", f"float[{m},{n}] y", nodes, **made, b=bias)


def halves(m: int, k: int, n: int, kind: type) -> Case:
    """A product with a weight of half floats that is cast, and what follows it in the step."""
    rng = np.random.default_rng(k + n)
    return Case(
        f"float[{m},{k}] x", f"float[{m},{n}] y",
        "t = Cast<to = 1>(w) p = MatMul(x, t) q = Add(p, b) y = Relu(q)",
        w=(rng.standard_normal((k, n)) / np.sqrt(k)).astype(kind),
        b=rng.standard_normal(n).astype(np.float32),
    )  # fmt: skip


def convolution(size: int, channels: int, out: int, kernel: int, block: int | None) -> Case:
    rng = np.random.default_rng(size)
    count = (out,) if block is None else (out, -(-channels // block), kernel, kernel)
    axis = "<axis = 0>" if block is None else f"<axis = 1, block_size = {block}>"
    return Case(
        f"float[1,{channels},{size},{size}] x", f"float[1,{out},{size},{size}] y",
        f"""d = DequantizeLinear{axis}(w, s)
            y = Conv<pads = [{", ".join([str(kernel // 2)] * 4)}]>(x, d, b)""",
        w=levels(rng, "INT4" if block else "INT8", (out, channels, kernel, kernel)),
        s=rng.uniform(0.001, 0.01, count).astype(np.float32),
        b=rng.standard_normal(out).astype(np.float32),
    )  # fmt: skip


def compiled(
    source: Program, directory: Path, isa: str, inputs: dict[str, np.ndarray], threads: int = 1
) -> list[np.ndarray]:
    backend = CpuBackend()
    info = backend.lower(source, Target("cpu", threads=threads, isa=isa), directory)
    runner = backend.load(directory, info, threads=threads)
    try:
        return [np.asarray(o) for o in runner.run(inputs)]
    finally:
        runner.close()


CASES = {
    "one row, blocks": product(1, 256, 130, "INT4", 32),
    "one row, blocks with zero points": product(1, 96, 70, "UINT4", 16, zero=True),
    "two rows, the last block short": product(2, 45, 33, "INT4", 16),
    "three rows, blocks of odd size": product(3, 37, 40, "UINT4", 7, zero=True),
    "four rows, channels": product(4, 129, 65, "INT4", None),
    "seventeen rows, blocks": product(17, 64, 130, "INT4", 32),
    "many rows, blocks": product(29, 64, 130, "INT4", 32),
    "many rows, short blocks with zero points": product(25, 45, 33, "UINT4", 10, zero=True),
    "many rows, one scale": product(27, 51, 20, "INT4", 0),
    "transposed": product(1, 80, 48, "INT4", 32, transposed=True),
    "transposed, many rows": product(26, 80, 48, "UINT4", 16, zero=True, transposed=True),
    "bytes, channels": product(1, 67, 50, "INT8", None),
    "bytes, many rows": product(28, 67, 50, "UINT8", None, zero=True),
    "bytes, blocks": product(2, 66, 37, "INT8", 32),
    "bytes, blocks, many rows": product(25, 66, 37, "UINT8", 20, zero=True),
    "one column": product(5, 33, 1, "INT4", 16),
    "depth 1": product(3, 1, 20, "INT8", None),
    "half floats": halves(1, 71, 45, np.float16),
    "half floats, many rows": halves(30, 71, 45, np.float16),
    "bfloat16": halves(2, 70, 33, ml_dtypes.bfloat16),
    "bfloat16, many rows": halves(26, 70, 33, ml_dtypes.bfloat16),
    "conv 1x1, blocks": convolution(5, 48, 20, 1, 16),
    "conv 1x1, one pixel": convolution(1, 40, 24, 1, 16),
    "conv 3x3, blocks": convolution(4, 24, 20, 3, 8),
    "conv 3x3, channels": convolution(4, 7, 20, 3, None),
    "a batch of sequences": Case(
        "float[2,3,40] x", "float[2,3,24] y",
        "d = DequantizeLinear<axis = 1>(w, s) t = Transpose<perm = [1, 0]>(d) y = MatMul(x, t)",
        w=levels(np.random.default_rng(0), "INT4", (24, 40)),
        s=np.full(40, 0.01, np.float32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("isa", HERE)
def test_weights_beside_floats_agree_with_the_executor(isa: str, tmp_path: Path) -> None:
    source = joined(CASES)
    inputs = inputs_of(source)
    found = compiled(source, tmp_path, isa, inputs, threads=2)
    for name, y, expected in zip(CASES, found, reference(source, inputs), strict=True):
        np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("case", "bits"),
    [
        (product(1, 512, 256, "INT4", 32), 4 + 4 * 8 / 32),
        (product(40, 512, 256, "UINT4", None, zero=True), 4),
        (product(1, 512, 256, "INT8", None), 8),
        (halves(1, 512, 256, np.float16), 16),
        (halves(40, 512, 256, ml_dtypes.bfloat16), 16),
        (convolution(4, 512, 256, 1, 64), 4 + 4 * 8 / 64),
    ],
)
def test_the_weights_file_holds_them_as_they_are(case: Case, bits: float, tmp_path: Path) -> None:
    """Scales of channels, bias and padding take 4 kilobytes at most."""
    source = joined({"": case})
    CpuBackend().lower(source, Target("cpu", threads=1), tmp_path)
    packed_bytes = 512 * 256 * bits / 8
    assert packed_bytes <= (tmp_path / "net.weights").stat().st_size <= packed_bytes + 4096


def test_scales_that_half_floats_hold_take_two_bytes(tmp_path: Path) -> None:
    case = product(1, 512, 256, "INT4", 32)
    case.weights["s"] = case.weights["s"].astype(np.float16).astype(np.float32)
    source = joined({"": case})
    inputs = inputs_of(source)
    [found] = compiled(source, tmp_path, "native", inputs)
    np.testing.assert_allclose(found, reference(source, inputs)[0], rtol=2e-5, atol=2e-5)
    assert (tmp_path / "net.weights").stat().st_size <= 512 * 256 * 4.5 / 8 + 4096


def test_kernels_are_priced_with_the_bytes_they_read() -> None:
    target = Target("cpu", threads=1)
    [four] = CpuBackend().kernels(joined({"": product(1, 512, 256, "INT4", 32)}), target)
    [eight] = CpuBackend().kernels(joined({"": product(1, 512, 256, "INT8", None)}), target)
    assert four.dtype == eight.dtype == "fp32"
    assert four.weight_bytes == 512 * 256 // 2 + 512 // 32 * 256 * 4
    assert eight.weight_bytes == 512 * 256


@pytest.mark.parametrize("block", [None, 16])
def test_transformed_kernels_get_floats(block: int | None, tmp_path: Path) -> None:
    """Winograd's transform of a 3x3 kernel is made ahead of time, from floats."""
    source = joined({"": convolution(24, 64, 64, 3, block)})
    inputs = inputs_of(source)
    [found] = compiled(source, tmp_path, "native", inputs)
    np.testing.assert_allclose(found, reference(source, inputs)[0], rtol=1e-3, atol=1e-3)
    assert "winograd" in "".join(p.read_text() for p in (tmp_path / "src").glob("kernels_*.c"))
