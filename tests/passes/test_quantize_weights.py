"""quantize-weights: which weights get blocks of 4 bits, how scales are found, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optcompiler.damage import run_batches
from optcompiler.errors import InputError
from optcompiler.ops import builtin_table
from optcompiler.program import Program, constant
from optcompiler.quantization import QuantizationScheme, quantize_array, weight_scales
from optcompiler.target import Target
from optcompiler_cpu.backend import CpuBackend
from optcompiler_onnxruntime.backend import OnnxRuntimeBackend
from optcompiler_passes._blocks import block_parameters, block_scales
from optcompiler_passes.insert_qdq import InsertQdq
from optcompiler_passes.pack_weights import PackWeights
from optcompiler_passes.quantize_weights import QuantizeWeights
from tests.support import INT8, apply_all, filled_program, make_context, proposals, random_inputs

FOUR = replace(
    INT8,
    precisions=frozenset({"fp32", "int4"}),
    stored_weight_ops=frozenset({"MatMul", "Gemm"}),
)
HEAD = '<ir_version: 10, opset_import: ["": 20]> '
TEXT = """g (float[3,96] x) => (float[3,40] y)
<float[96,64] w, float[40,64] v, float[40] b> {
  [first] h = MatMul(x, w)
  [relu] r = Relu(h)
  [second] y = Gemm<transB = 1>(r, v, b)
}"""
PASS = QuantizeWeights(least_weights=1)
SHIFTED = QuantizeWeights(least_weights=1, symmetric=False)


def context(source: Program, **changes):
    return make_context(source, **{"capabilities": FOUR, "precisions": FOUR.precisions, **changes})


def reasons(source: Program, pass_: QuantizeWeights = PASS, **changes) -> dict[str, str]:
    _, declines = proposals(pass_, source, context(source, **changes))
    return {d.site: d.reason for d in declines}


def blocks_of(source: Program, name: str) -> tuple[str, int, int, tuple[int, ...]]:
    """Of the weight that a node reads: the operator that makes it, axis, block and scale shape."""
    node = source.node(name)
    assert node is not None
    made = node.inputs[1].producer()
    scale = constant(made.inputs[1])
    attributes = made.attributes
    return (
        made.op_type, attributes.get_int("axis", 1), attributes.get_int("block_size", 0),
        scale.shape,
    )  # fmt: skip


def test_weights_get_blocks_along_what_is_summed_over():
    before = filled_program(HEAD + TEXT)
    after, _ = apply_all(PASS, before, context(before))
    after.verify(like=before)
    assert blocks_of(after, "first") == ("DequantizeLinear", 0, 32, (3, 64))
    assert blocks_of(after, "second") == ("DequantizeLinear", 1, 32, (40, 2))
    assert after.opset == 21
    assert set(before.graph.initializers) <= set(after.graph.initializers)


@pytest.mark.parametrize(
    ("pass_", "precision", "dtype"),
    [(PASS, "int4", "INT4"), (SHIFTED, "int4", "UINT4"), (PASS, "w8", "INT8")],
)
def test_packed_programs_run_on_either_backend(
    pass_: QuantizeWeights, precision: str, dtype: str, tmp_path: Path
):
    before = filled_program(HEAD + TEXT)
    after, _ = apply_all(pass_, before, context(before, precisions=frozenset({precision})))
    packed, _ = apply_all(PackWeights(), after, context(after))
    assert not {"w", "v"} & set(packed.graph.initializers)
    inputs = random_inputs(packed, 3)
    results = []
    for backend in (CpuBackend(), OnnxRuntimeBackend()):
        target = Target(backend.name, threads=1)
        directory = tmp_path / backend.name
        directory.mkdir()
        info = backend.lower(packed, target, directory)
        runner = backend.load(directory, info, threads=1)
        results.append(runner.run(inputs)[0])
        runner.close()
        [first, *_] = [k for k in backend.kernels(packed, target) if k.kind == "gemm"]
        assert first.weight_bytes < 96 * 64 * 1.1
    made = packed.node("first").inputs[1].producer()  # type: ignore[union-attr]
    assert made.inputs[0].dtype.name == dtype
    ours, theirs = results
    [[wanted]] = run_batches(packed, [inputs], builtin_table())
    np.testing.assert_allclose(ours, wanted.numpy(), rtol=1e-4, atol=1e-4)
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(ours)


def test_scales_are_no_worse_than_a_search_and_take_two_bytes():
    weight = np.random.default_rng(0).standard_normal((70, 50)).astype(np.float32)
    scales = block_scales(weight, 0, 32)
    assert scales.shape == (3, 50)
    np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))

    def error(scale: np.ndarray, block: int) -> float:
        levels = quantize_array(weight, scale, None, "INT4", axis=0 if block else 1, block=block)
        wide = np.repeat(scale, block, 0)[:70] if block else scale
        return float(np.square(weight - levels * wide).sum())

    by_block = np.stack([weight_scales(weight[i : i + 32], "INT4", axis=1) for i in (0, 32, 64)])
    assert error(scales, 32) < error(by_block, 32) < error(weight_scales(weight, "INT4", 1), 0)


@pytest.mark.parametrize("axis", [0, 1])
def test_zero_points_serve_blocks_that_lie_to_one_side(axis: int):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((70, 50)).astype(np.float32)
    weight[:, :10] = np.abs(weight[:, :10]) + 0.5
    weight[:32, 20] = 0.0
    errors = []
    for dtype in ("INT4", "UINT4"):
        scheme = QuantizationScheme(dtype, axis, 32, symmetric=dtype == "INT4")
        scales, zeros = block_parameters(weight, scheme)
        assert scales.shape == zeros.shape == ((3, 50) if axis == 0 else (70, 2))
        np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))
        levels = quantize_array(weight, scales, zeros, dtype, axis, 32)

        def wide(array: np.ndarray) -> np.ndarray:
            return np.repeat(array, 32, axis)[:70, :50]

        error = np.square(weight - (levels - wide(zeros)) * wide(scales))
        starts = np.arange(0, weight.shape[axis], 32)
        errors.append(np.add.reduceat(error, starts, axis))
    symmetric, shifted = errors
    assert (shifted <= symmetric * (1 + 1e-5)).all()
    assert shifted.sum() < 0.8 * symmetric.sum()


def test_bytes_have_a_scale_for_each_column():
    before = filled_program(HEAD + TEXT)
    before.model.opset_imports[""] = 18
    both = context(before, precisions=frozenset({"fp32", "int4", "w8"}))
    candidates, _ = proposals(PASS, before, both)
    assert [(c.site, c.choice) for c in candidates] == [("first", "w8"), ("second", "w8")]
    assert candidates[0].details["scheme"] == "int8 per channel"
    weight = candidates[0].details["weight"]
    assert (weight["type"], weight["scales"]["count"]) == ("INT8", 64)
    after, _ = apply_all(PASS, before, both)
    assert blocks_of(after, "first") == ("DequantizeLinear", 1, 0, (64,))
    assert blocks_of(after, "second") == ("DequantizeLinear", 0, 0, (40,))
    assert after.opset == 18
    newer = filled_program(HEAD + TEXT)
    candidates, _ = proposals(PASS, newer, both)
    assert [c.choice for c in candidates] == ["int4", "w8", "int4", "w8"]


def test_reasons_for_leaving_weights_alone():
    before = filled_program(HEAD + TEXT)
    assert "fewer than 65536" in reasons(before, QuantizeWeights())["first"]
    assert reasons(before, replace(PASS, skip=("fir*",)))["first"] == "skipped by 'fir*'"
    assert "no calibration data" in reasons(before, calibration=())["program"]
    assert "int4 is not among" in reasons(before, precisions=frozenset({"fp32"}))["program"]
    assert "as they are stored" in reasons(before, capabilities=INT8)["program"]
    with pytest.raises(InputError, match="block_size=24"):
        reasons(before, QuantizeWeights(block_size=24))
    after, _ = apply_all(PASS, before, context(before))
    assert reasons(after)["first"] == "already quantised"


LARGE = """g (float[3,256] x) => (float[3,448] y)
<float[256,256] w, float[256,32] v> {
  [first] h = MatMul(x, w)
  [second] k = MatMul(h, v)
  [out] y = Concat<axis = 1>(h, k, k, k, k, k, k)
}"""


def test_large_matrices_may_have_four_bits_beside_bytes(tmp_path: Path):
    """`insert-qdq` offers "w4a8" where it is allowed; the cpu backend sums integers then."""
    both = replace(FOUR, precisions=frozenset({"fp32", "int8", "w4a8"}))
    before = filled_program(HEAD + LARGE)
    candidates, _ = proposals(
        InsertQdq(), before, context(before, capabilities=both, precisions=both.precisions)
    )
    assert [(c.site, c.choice) for c in candidates] == [
        ("first", "int8"), ("first", "w4a8"), ("second", "int8"),
    ]  # fmt: skip
    only = context(before, capabilities=both, precisions=frozenset({"fp32", "w4a8"}))
    candidates, _ = proposals(InsertQdq(), before, only)
    assert [(c.site, c.choice) for c in candidates] == [("first", "w4a8"), ("second", "w4a8")]
    after, _ = apply_all(InsertQdq(), before, only)
    assert blocks_of(after, "first") == ("DequantizeLinear", 0, 32, (8, 256))
    assert blocks_of(after, "second") == ("DequantizeLinear", 1, 0, (32,))
    packed, _ = apply_all(PackWeights(), after, context(after))
    backend, target = CpuBackend(), Target("cpu", threads=1)
    [first, second] = [k for k in backend.kernels(packed, target) if k.kind == "gemm"]
    assert (first.dtype, second.dtype) == ("int8", "int8")
    assert first.weight_bytes < 256 * 256 * 5.1 / 8
    info = backend.lower(packed, target, tmp_path)
    runner = backend.load(tmp_path, info, threads=1)
    inputs = random_inputs(packed, 3)
    [found], [[wanted]] = runner.run(inputs), run_batches(packed, [inputs], builtin_table())
    runner.close()
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-4)
