"""codebook-weights: tables, indices and scales, what they cost and keep, and refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

import optcompiler as oc
from optcompiler.errors import InputError
from optcompiler.program import Program, constant
from optcompiler_passes._codebooks import encoded, fitted, fitted_table, nearest_in, normal_table
from optcompiler_passes.codebook_weights import CodebookWeights
from optcompiler_passes.simplify import Simplify
from tests.support import (
    apply_all,
    filled_program,
    make_context,
    proposals,
    random_inputs,
    run_onnx,
)

HEAD = '<ir_version: 10, opset_import: ["": 21]> '
NET = """g (float[4,16,6,6] x) => (float[4,10] y)
<float[24,16,3,3] w1, float[24] b1, float[24,1,3,3] w2, float[24] b2, float[40,24] w3, float[40] b3,
 float[40,10] w4> {
  [conv] h1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
  [relu] r1 = Relu(h1)
  [depth] h2 = Conv<group=24>(r1, w2, b2)
  [pool] p = GlobalAveragePool(h2)
  [flat] f = Flatten(p)
  [gemm] h3 = Gemm<transB=1>(f, w3, b3)
  [matmul] y = MatMul(h3, w4)
}"""
PASS = CodebookWeights(least_weights=1)
FOUR, THREE = frozenset({"fp32", "codebook4"}), frozenset({"fp32", "codebook3"})


@pytest.fixture(scope="module")
def net() -> Program:
    return filled_program(HEAD + NET)


def context(program: Program, precisions: frozenset[str] = FOUR, **changes):
    return make_context(program, precisions=precisions, **changes)


def error(program: Program, pass_: CodebookWeights, precisions: frozenset[str]) -> float:
    after, _ = apply_all(pass_, program, context(program, precisions))
    inputs = random_inputs(program, 5)
    [got], [wanted] = run_onnx(after, inputs), run_onnx(program, inputs)
    return float(np.square(got - wanted).sum() / np.square(wanted).sum())


def reasons(program: Program, pass_: CodebookWeights = PASS, **changes) -> dict[str, str]:
    _, declines = proposals(pass_, program, context(program, **changes))
    return {d.site: d.reason for d in declines}


def test_every_kind_of_layer_is_stored_in_four_bits_and_runs_in_stock_onnx_runtime(net: Program):
    after, patches = apply_all(PASS, net, context(net))
    assert len(patches) == 4
    assert not {"w1", "w2", "w3", "w4"} & set(after.graph.initializers)
    assert constant(after.value("w1_indices")).shape == (24, 3, 48)
    assert constant(after.value("w2_indices")).shape == (24, 1, 9)
    assert constant(after.value("w4_indices")).shape == (1, 40, 10)
    assert after.weights()["w1_indices"].nbytes == 24 * 144 // 2
    assert constant(after.value("w1_table")).shape == (16,)
    assert after.weight_bytes < net.weight_bytes / 4
    assert 0 < error(net, PASS, FOUR) < 0.02


def test_a_fitted_table_of_eight_beats_equal_steps():
    program = filled_program(
        HEAD + "g (float[256,256] x) => (float[256,128] y)"
        " <float[256,128] w> { [one] y = MatMul(x, w) }"
    )
    fit, normal, steps = (
        error(program, replace(PASS, table=table), THREE)
        for table in ("fitted", "normal", "uniform")
    )
    assert error(program, PASS, FOUR) < 0.5 * fit
    assert fit < 0.9 * steps
    assert fit < 1.01 * normal


def test_inputs_that_matter_more_are_kept_more_exactly():
    rng = np.random.default_rng(0)
    blocks = rng.standard_normal((40, 64)).astype(np.float32)
    importance = np.ones_like(blocks)
    importance[:, :16] = 100

    def left(weights: np.ndarray) -> float:
        table, indices, scales = fitted(blocks, weights, 3)
        return float(np.square(blocks - table[indices] * scales[:, None])[:, :16].sum())

    assert left(importance) < 0.8 * left(np.ones_like(blocks))


def test_the_fitted_table_is_optimal():
    rng = np.random.default_rng(1)
    values = np.sort(rng.standard_normal(14))
    weight = rng.uniform(0.1, 3, 14)

    def cost(table: np.ndarray) -> float:
        return float((weight * np.square(values - table[nearest_in(table, values)])).sum())

    def of_cuts(cuts: tuple[int, ...]) -> float:
        pieces = zip((0, *cuts), (*cuts, 14), strict=True)
        total = 0.0
        for a, b in pieces:
            mean = np.average(values[a:b], weights=weight[a:b])
            total += float((weight[a:b] * np.square(values[a:b] - mean)).sum())
        return total

    best = min(of_cuts(cuts) for cuts in combinations(range(1, 14), 3))
    assert cost(fitted_table(values, weight, 2)) == pytest.approx(best)


def test_the_normal_table_of_four_bits_is_nf4():
    table = normal_table(4)
    given = [
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1.0,
    ]  # fmt: skip
    np.testing.assert_allclose(table, given, atol=1e-4)
    assert len(normal_table(3)) == 8


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_constant_weights_are_exact(value: float):
    blocks = np.full((3, 16), value, np.float32)
    table, indices, scales = fitted(blocks, np.ones_like(blocks), 3)
    np.testing.assert_allclose(table[indices] * scales[:, None], blocks, atol=1e-6)
    indices, scales = encoded(blocks, np.ones_like(blocks), normal_table(3))
    np.testing.assert_allclose(normal_table(3)[indices] * scales[:, None], blocks, rtol=1e-3)


def test_codebooks_are_not_folded_and_come_out_the_same_twice(net: Program):
    after, _ = apply_all(PASS, net, context(net))
    again, _ = apply_all(PASS, filled_program(HEAD + NET), context(net))
    assert after.content_hash() == again.content_hash()
    simplified, _ = apply_all(Simplify(), after, context(after))
    assert "w1_indices" in simplified.graph.initializers


def test_a_size_is_what_they_are_taken_for(net: Program):
    batches = [random_inputs(net, seed) for seed in range(4)]

    def outcomes(**limits: float) -> tuple[set[str], oc.Compiled]:
        compiled = oc.compile(
            net, target=oc.Target("onnxruntime", threads=1), precision="codebook4",
            calibration=batches, budget=oc.Budget(max_damage=1.0, **limits), passes=[PASS],
            timing=False,
        )  # fmt: skip
        rows = [r for r in compiled.ledger if r.pass_name == "codebook-weights"]
        return {r.site for r in rows if r.outcome == "taken"}, compiled

    taken, compiled = outcomes()
    assert not taken
    [reason] = {r.reason.split(":")[0] for r in compiled.ledger if r.site == "conv"}
    assert reason == "predicted no faster"
    assert outcomes(max_size_mb=0.013)[0] >= {"conv"}
    assert outcomes(max_size_mb=1.0)[0] == set()


def test_reasons_for_leaving_weights_alone(net: Program):
    assert "fewer than 1024" in reasons(net, CodebookWeights())["depth"]
    assert reasons(net, replace(PASS, skip=("con*",)))["conv"] == "skipped by 'con*'"
    assert "no calibration data" in reasons(net, calibration=())["program"]
    assert "among those allowed" in reasons(net, precisions=frozenset({"fp32"}))["program"]
    shared = filled_program(
        HEAD + "g (float[2,32] x) => (float[2,32] y) <float[32,32] w>"
        " {[one] h = MatMul(x, w) [two] y = MatMul(h, w)}"
    )
    assert "read elsewhere" in reasons(shared)["one"]
    after, _ = apply_all(PASS, net, context(net))
    assert "not a constant" in reasons(after)["conv"]
    with pytest.raises(InputError, match="table='nf4'"):
        CodebookWeights(table="nf4")
    with pytest.raises(InputError, match="block_size=8"):
        CodebookWeights(block_size=8)
