"""pack-weights: quantisers of constants fold, biases become int32, ONNX Runtime runs integers."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from optcompiler.errors import Declined
from optcompiler.program import Program, constant
from optcompiler_passes.insert_qdq import InsertQdq
from optcompiler_passes.pack_weights import PackWeights, pack
from tests.passes.test_insert_qdq import (
    ATTENTION,
    PLAIN,
    conv_relu,
    inputs_of,
    program,
    residual,
    tied,
    zeros,
)
from tests.support import apply_all, make_context, op_types, proposals, random_inputs, run_onnx


def packed(before: Program, capabilities=PLAIN) -> Program:
    context = make_context(before, capabilities=capabilities)
    quantized, _ = apply_all(InsertQdq(), before, context)
    return apply_all(PackWeights(), quantized, context)[0]


def test_weights_and_biases():
    before = conv_relu()
    quantized, _ = apply_all(InsertQdq(), before, make_context(before, capabilities=PLAIN))
    candidates, declines = proposals(PackWeights(), quantized)
    assert [(c.site, c.choice, c.exact) for c in candidates] == [("program", "pack", True)]
    assert candidates[0].note == "2 constants to integers, 1 biases to int32"
    assert not declines
    after, _ = apply_all(PackWeights(), quantized)
    assert after.value("w") is None
    weight, bias = after.value("w_quantized"), after.value("b_quantized")
    assert (weight.dtype, bias.dtype) == (ir.DataType.INT8, ir.DataType.INT32)
    assert inputs_of(after, "w_dequantize") == ["w_quantized", "w_scale", "w_zero_point"]
    assert inputs_of(after, "conv1") == ["x_dequantized", "w_dequantized", "b_dequantized"]
    unit = constant(after.value("x_scale")) * constant(after.value("w_scale"))
    np.testing.assert_allclose(constant(bias) * unit, constant(before.value("b")), atol=unit.max())


def test_the_bytes_are_those_of_the_operator():
    before = program(
        f"g (float[3] x) => (int8[2,3] y, float[3] z) <{zeros('w', 2, 3)}, "
        "float[2] s = {0.01, 0.02}, int8[2] o = {3, -4}>"
        "{y = QuantizeLinear<axis=0>(w, s, o) z = Exp(x)}",
        w=(2, 3),
    )
    expected = run_onnx(before)[0]
    after = before.clone()
    pack(after)
    np.testing.assert_array_equal(constant(after.value("y")), expected)


def test_a_tied_table_becomes_integers_for_the_product_alone():
    before = tied()
    after = packed(before)
    assert "Transpose" not in op_types(after)
    assert inputs_of(after, "embed") == ["table", "ids"]
    levels = constant(after.value("w_quantized"))
    assert (levels.dtype, levels.shape) == (np.int8, (3, 6))
    real = levels * constant(after.value("w_scale"))
    half = constant(after.value("w_scale")).max() / 2 + 1e-6
    largest = np.abs(constant(before.value("table"))).max()
    np.testing.assert_allclose(real, constant(before.value("table")).T, atol=half + 0.2 * largest)
    inputs = {"ids": np.array([[0, 5, 2, 3]])}
    got, want = run_onnx(after, inputs)[0], run_onnx(before, inputs)[0]
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_bias_that_does_not_fit_stays_float():
    before = conv_relu()
    quantized, _ = apply_all(InsertQdq(), before)
    quantized.set_weight(quantized.value("b"), np.array([1e9, 0, 0], np.float32))
    _, declines = proposals(PackWeights(), quantized)
    assert [(d.site, d.reason) for d in declines] == [
        (
            "conv1",
            "1 of 3 values of the bias 'b' do not fit 32 bits at the scale of the accumulator, "
            "so it stays float",
        )
    ]
    after, _ = apply_all(PackWeights(), quantized)
    assert inputs_of(after, "conv1")[2] == "b"


def test_gemm_that_scales_keeps_its_float_bias():
    before = program(
        f"g (float[1,3] x) => (float[1,2] y) <{zeros('w', 3, 2)}, {zeros('b', 2)}>"
        "{[fc] y = Gemm<alpha=0.5>(x, w, b)}",
        w=(3, 2),
        b=(2,),
    )
    quantized, _ = apply_all(InsertQdq(), before)
    _, declines = proposals(PackWeights(), quantized)
    assert [d.reason for d in declines] == [
        "the Gemm scales its operands, so the bias 'b' stays float"
    ]


def test_nothing_to_do():
    _, declines = proposals(PackWeights(), conv_relu())
    assert [d.site for d in declines] == ["program"]
    with pytest.raises(Declined):
        pack(conv_relu())


def runtime_ops(after: Program, path) -> list[str]:
    """Operators of the graph that ONNX Runtime optimises `after` to."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        after.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [n.op_type for n in onnx.load(path / "optimized.onnx").graph.node]


def test_onnx_runtime_runs_convolutions_and_the_residual_in_integers(tmp_path):
    ops = runtime_ops(packed(residual()), tmp_path)
    assert ops == [
        "QuantizeLinear", "QLinearConv", "QLinearConv", "QLinearAdd", "QLinearConv",
        "DequantizeLinear", "Exp",
    ]  # fmt: skip


def test_onnx_runtime_runs_biased_products_in_integers(tmp_path):
    before = program(ATTENTION, wq=(6, 6), wk=(6, 6), bias=(6,))
    after = packed(before)
    assert inputs_of(after, "qb") == ["q0", "bias_dequantized"]
    ops = runtime_ops(after, tmp_path)
    assert not {"MatMul", "Gemm", "FusedMatMul"} & set(ops)
    feed = random_inputs(before, 3)
    np.testing.assert_allclose(run_onnx(after, feed)[0], run_onnx(before, feed)[0], rtol=0.2)


def test_relu6_disappears_in_the_quantiser(tmp_path):
    before = program(
        f"""g (float[1,2,4,4] x) => (float[1,2,4,4] y)
        <{zeros("w", 2, 2, 1, 1)}, {zeros("v", 2, 1, 3, 3)},
         float low = {{0}}, float high = {{6}}> {{
          [conv] c = Conv(x, w)
          [clip] r = Clip(c, low, high)
          [depthwise] d = Conv<group=2, pads=[1,1,1,1]>(r, v)
          [exp] y = Exp(d)
        }}""",
        w=(2, 2, 1, 1),
        v=(2, 1, 3, 3),
    )
    assert runtime_ops(packed(before), tmp_path) == [
        "QuantizeLinear", "QLinearConv", "QLinearConv", "DequantizeLinear", "Exp",
    ]  # fmt: skip
    assert "Clip" in op_types(before)
