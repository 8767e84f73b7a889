"""insert-qdq: which nodes become sites, where pairs go, and the reasons for leaving nodes alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optcompiler.damage import run_batches
from optcompiler.errors import Declined, InputError
from optcompiler.observers import MinMaxObserver
from optcompiler.ops import builtin_table
from optcompiler.program import Program, constant
from optcompiler.rewriting import apply_candidate
from optcompiler.target import Target
from optcompiler_cpu.backend import CpuBackend
from optcompiler_passes.insert_qdq import InsertQdq
from optcompiler_passes.pack_weights import PackWeights
from tests.support import (
    INT8,
    apply_all,
    assert_close,
    make_context,
    op_types,
    proposals,
    random_inputs,
    run_onnx,
)

FUSING = INT8
PLAIN = replace(INT8, fusions=frozenset(), float_outputs=frozenset({"MatMul", "Gemm"}))


def program(body: str, **weights: tuple[int, ...]) -> Program:
    """The program `body`, with seeded normal float initializers of the given shapes."""
    rng = np.random.default_rng(0)
    result = Program.from_text('<ir_version: 10, opset_import: ["": 21]>\n' + body)
    for name, shape in weights.items():
        values = [v for v in result.graph.initializers.values() if v.name == name]
        result.set_weight(values[0], rng.standard_normal(shape).astype(np.float32))
    result.infer_shapes()
    return result


def zeros(name: str, *shape: int) -> str:
    count = int(np.prod(shape))
    return f"float[{','.join(map(str, shape))}] {name} = {{{','.join('0' * count)}}}"


def inputs_of(result: Program, node: str) -> list[str]:
    found = result.node(node)
    assert found is not None
    return [str(v.name) for v in found.inputs if v is not None]


def reasons(body: Program, **changes) -> dict[str, str]:
    context = make_context(body, **changes)
    return {d.site: d.reason for d in proposals(InsertQdq(), body, context)[1]}


CONV_RELU = f"""g (float[1,2,5,5] x) => (float[1,2,5,5] y)
<{zeros("w", 3, 2, 3, 3)}, {zeros("b", 3)}, {zeros("v", 2, 3, 1, 1)}> {{
  [conv1] c = Conv<pads=[1,1,1,1]>(x, w, b)
  [relu] r = Relu(c)
  [conv2] d = Conv(r, v)
  [exp] y = Exp(d)
}}"""


def conv_relu() -> Program:
    return program(CONV_RELU, w=(3, 2, 3, 3), b=(3,), v=(2, 3, 1, 1))


def test_conv_relu_is_quantised_around_the_relu():
    before = conv_relu()
    context = make_context(before, capabilities=PLAIN)
    candidates, declines = proposals(InsertQdq(), before, context)
    assert [(c.site, c.choice, c.exact) for c in candidates] == [
        ("conv1", "int8", False),
        ("conv2", "int8", False),
    ]
    assert candidates[0].nodes == ("conv1", "relu")
    assert not declines
    after, _ = apply_all(InsertQdq(), before, context)
    assert inputs_of(after, "conv1") == ["x_dequantized", "w_dequantized", "b"]
    assert inputs_of(after, "relu") == ["c"]
    assert inputs_of(after, "conv2") == ["r_dequantized", "v_dequantized"]
    assert inputs_of(after, "exp") == ["d_dequantized"]
    assert op_types(after).count("QuantizeLinear") == 5
    scale, zero_point = after.value("w_scale"), after.value("w_zero_point")
    assert constant(scale).shape == (3,)
    assert zero_point.dtype == ir.DataType.INT8
    assert not constant(zero_point).any()
    assert after.node("w_quantize").attributes.get_int("axis") == 0
    assert after.value("w").dtype == ir.DataType.FLOAT
    assert after.value("r_zero_point").dtype == ir.DataType.UINT8
    assert constant(after.value("r_zero_point")) == 0


def test_accuracy_is_that_of_eight_bits():
    before = conv_relu()
    after, _ = apply_all(InsertQdq(), before)
    feed = random_inputs(before, 1)
    [got], [expected] = run_onnx(after, feed), run_onnx(before, feed)
    error = np.log(got) - np.log(expected)
    assert 0 < np.linalg.norm(error) < 0.02 * np.linalg.norm(np.log(expected))


def test_a_fusing_target_leaves_outputs_to_their_readers():
    after, _ = apply_all(InsertQdq(), conv_relu())
    assert inputs_of(after, "exp") == ["d"]
    assert inputs_of(after, "conv2") == ["r_dequantized", "v_dequantized"]


def test_order_of_application_does_not_matter():
    before = conv_relu()
    candidates, _ = proposals(InsertQdq(), before, make_context(before, capabilities=PLAIN))
    hashes = set()
    for order in (candidates, candidates[::-1], [*candidates, *candidates]):
        after = before
        for candidate in order:
            after = apply_candidate("insert-qdq", candidate, after).after
        after.verify(like=before)
        names = sorted(n.name for n in after.graph)
        hashes.add((tuple(names), run_onnx(after)[0].tobytes()))
    assert len(hashes) == 1


def test_second_run_finds_everything_quantised():
    after, _ = apply_all(InsertQdq(), conv_relu())
    candidates, declines = proposals(InsertQdq(), after)
    assert not candidates
    assert {d.reason for d in declines} == {"already quantised"}


RESIDUAL = f"""g (float[1,2,4,4] x) => (float[1,2,4,4] y)
<{zeros("w", 2, 2, 1, 1)}, {zeros("v", 2, 2, 1, 1)}, {zeros("u", 2, 2, 1, 1)}> {{
  [stem] s = Conv(x, w)
  [srelu] r = Relu(s)
  [conv] c = Conv(r, v)
  [add] a = Add(c, r)
  [relu] t = Relu(a)
  [last] l = Conv(t, u)
  [exp] y = Exp(l)
}}"""


def residual() -> Program:
    return program(RESIDUAL, w=(2, 2, 1, 1), v=(2, 2, 1, 1), u=(2, 2, 1, 1))


def test_residual_add_of_a_plain_target_reads_and_writes_integers():
    before = residual()
    after, _ = apply_all(InsertQdq(), before, make_context(before, capabilities=PLAIN))
    assert inputs_of(after, "add") == ["c_dequantized", "r_dequantized"]
    assert inputs_of(after, "relu") == ["a"]
    assert inputs_of(after, "last") == ["t_dequantized", "u_dequantized"]


def test_residual_add_of_a_fusing_target_keeps_the_sum_in_the_kernel():
    after, _ = apply_all(InsertQdq(), residual())
    assert inputs_of(after, "add") == ["c", "r_dequantized"]
    assert inputs_of(after, "relu") == ["a"]
    assert inputs_of(after, "last") == ["t_dequantized", "u_dequantized"]


def test_pooling_and_reshapes_carry_the_scale_of_what_they_move():
    body = f"""g (float[1,2,4,4] x) => (float[1,3] y)
    <{zeros("w", 2, 2, 1, 1)}, {zeros("v", 8, 3)}, int64[2] shape = {{1, 8}}> {{
      [conv] c = Conv(x, w)
      [relu] r = Relu(c)
      [pool] p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
      [flat] f = Reshape(p, shape)
      [fc] y = Gemm(f, v)
    }}"""
    after, _ = apply_all(InsertQdq(), program(body, w=(2, 2, 1, 1), v=(8, 3)))
    assert inputs_of(after, "pool") == ["r_dequantized"]
    assert inputs_of(after, "flat") == ["p_dequantized", "shape"]
    assert inputs_of(after, "fc") == ["f_dequantized", "v_dequantized"]
    for name in ("r_quantize", "p_quantize", "f_quantize", "f_dequantize"):
        assert inputs_of(after, name)[1:] == ["r_scale", "r_zero_point"]
    assert after.node("v_quantize").attributes.get_int("axis") == 1


ATTENTION = f"""g (float[1,4,6] x) => (float[1,4,6] y)
<{zeros("wq", 6, 6)}, {zeros("wk", 6, 6)}, {zeros("bias", 6)}> {{
  [q] q0 = MatMul(x, wq)
  [qb] q1 = Add(q0, bias)
  [k] k0 = MatMul(x, wk)
  [kt] k1 = Transpose<perm=[0,2,1]>(k0)
  [qk] s = MatMul(q1, k1)
  [softmax] p = Softmax(s)
  [pv] o = MatMul(p, q1)
  [res] t = Add(o, x)
  [exp] y = Exp(t)
}}"""


@pytest.mark.parametrize("capabilities", [PLAIN, FUSING])
def test_attention(capabilities):
    before = program(ATTENTION, wq=(6, 6), wk=(6, 6), bias=(6,))
    context = make_context(before, capabilities=capabilities)
    candidates, declines = proposals(InsertQdq(), before, context)
    assert [c.site for c in candidates] == ["q", "k", "qk", "pv"]
    assert {d.site: d.reason for d in declines} == {"res": "no integer kernel reads its result 't'"}
    after, _ = apply_all(InsertQdq(), before, context)
    assert inputs_of(after, "q") == ["x_dequantized", "wq_dequantized"]
    assert inputs_of(after, "k") == ["x_dequantized", "wk_dequantized"]
    assert inputs_of(after, "qb") == ["q0", "bias"]
    assert inputs_of(after, "kt") == ["k0_dequantized"]
    assert inputs_of(after, "qk") == ["q1_dequantized", "k1_dequantized"]
    assert inputs_of(after, "softmax") == ["s"]
    assert inputs_of(after, "pv") == ["p_dequantized", "q1_dequantized"]
    assert inputs_of(after, "res") == ["o", "x"]


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_multiplied_by_is_symmetric_where_kernels_want_it(symmetric):
    capabilities = replace(INT8, symmetric_multipliers=symmetric)
    before = program(ATTENTION, wq=(6, 6), wk=(6, 6), bias=(6,))
    after, _ = apply_all(InsertQdq(), before, make_context(before, capabilities=capabilities))
    weights = after.weights()
    middle = {n: int(weights[f"{n}_zero_point"].numpy()) == 128 for n in ("x", "p", "q1", "k0")}
    assert middle == {"x": False, "p": False, "q1": symmetric, "k0": symmetric}


def test_a_shared_weight_has_one_pair():
    body = f"""g (float[1,3] x) => (float[1,3] y) <{zeros("w", 3, 3)}> {{
      [a] h = MatMul(x, w)
      [b] y = MatMul(h, w)
    }}"""
    after, _ = apply_all(InsertQdq(), program(body, w=(3, 3)))
    assert op_types(after).count("QuantizeLinear") == 3
    assert inputs_of(after, "a")[1] == inputs_of(after, "b")[1] == "w_dequantized"


TIED = f"""g (int64[1,4] ids) => (float[1,4,6] y) <{zeros("table", 6, 3)}> {{
  [embed] x = Gather(table, ids)
  [turn] w = Transpose<perm=[1,0]>(table)
  [exp] h = Exp(x)
  [head] y = MatMul(h, w)
}}"""


def tied(body: str = TIED) -> Program:
    return program(body, table=(6, 3))


def test_a_table_that_is_also_a_transposed_weight_stays_float_for_others():
    before = tied()
    candidates, declines = proposals(InsertQdq(), before)
    assert [c.site for c in candidates] == ["head"]
    assert not declines
    assert candidates[0].note == (
        "'embed' reads its weight 'table' too, which stays in float (72 bytes) beside the integers "
        "(18 bytes)"
    )
    after, _ = apply_all(InsertQdq(), before)
    assert inputs_of(after, "embed") == ["table", "ids"]
    assert inputs_of(after, "head") == ["h_dequantized", "w_dequantized"]
    assert inputs_of(after, "w_quantize") == ["w", "w_scale", "w_zero_point"]
    assert after.node("w_quantize").attributes.get_int("axis") == 1
    assert after.value("w_zero_point").dtype == ir.DataType.INT8
    assert constant(after.value("w_scale")).shape == (6,)


def test_one_table_read_both_ways_has_scales_of_each():
    body = f"""g (float[4,6] x) => (float[4,6] y) <{zeros("table", 6, 3)}> {{
      [down] h = MatMul(x, table)
      [turn] w = Transpose(table)
      [up] y = MatMul(h, w)
    }}"""
    candidates, _ = proposals(InsertQdq(), tied(body))
    assert [c.note for c in candidates] == ["", ""]
    after, _ = apply_all(InsertQdq(), tied(body))
    scales = [constant(after.value(n)).shape for n in ("table_scale", "w_scale")]
    assert scales == [(3,), (6,)]


def test_what_a_reshaped_table_holds_is_a_weight():
    body = TIED.replace("Transpose<perm=[1,0]>(table)", "Reshape(table, shape)").replace(
        "> {", ", int64[2] shape = {3, 6}> {", 1
    )
    assert [c.site for c in proposals(InsertQdq(), tied(body))[0]] == ["head"]


def test_a_transposed_weight_that_is_not_finite_declines():
    before = tied()
    weight = np.array(constant(before.value("table")))
    weight[4, 1] = np.nan
    before.set_weight(before.value("table"), weight)
    assert reasons(before)["head"] == "1 of 6 output channels hold NaN weights"


def test_transposed_gemm_has_its_channels_first():
    body = f"""g (float[1,3] x) => (float[1,2] y) <{zeros("w", 2, 3)}, {zeros("b", 2)}> {{
      [fc] y = Gemm<transB=1>(x, w, b)
    }}"""
    after, _ = apply_all(InsertQdq(), program(body, w=(2, 3), b=(2,)))
    assert after.node("w_quantize").attributes.get_int("axis") == 0
    assert constant(after.value("w_scale")).shape == (2,)


def test_per_tensor_weights_where_the_target_wants_them():
    before = conv_relu()
    capabilities = replace(INT8, per_channel=False, activation_dtype="INT8")
    after, _ = apply_all(InsertQdq(), before, make_context(before, capabilities=capabilities))
    assert constant(after.value("w_scale")).shape == ()
    assert constant(after.value("r_zero_point")) == -128


def test_scale_of_a_dead_channel_leaves_room_for_its_bias():
    before = conv_relu()
    weight = np.array(constant(before.value("w")))
    weight[1] *= 1e-12
    before.set_weight(before.value("w"), weight)
    after, _ = apply_all(InsertQdq(), before)
    unit = constant(after.value("x_scale")) * constant(after.value("w_scale"))
    assert (np.abs(constant(after.value("b"))) / unit).max() < 2**31


def test_scale_of_a_dead_column_leaves_room_for_the_bias_added_to_it():
    before = program(ATTENTION, wq=(6, 6), wk=(6, 6), bias=(6,))
    weight = np.array(constant(before.value("wq")))
    weight[:, 2] *= 1e-12
    before.set_weight(before.value("wq"), weight)
    after, _ = apply_all(InsertQdq(), before)
    unit = constant(after.value("x_scale")) * constant(after.value("wq_scale"))
    assert (np.abs(constant(after.value("bias"))) / unit).max() < 2**31


def test_reasons():
    before = conv_relu()
    assert reasons(before, calibration=()) == {
        "program": "no calibration data to take ranges from; pass calibration=batches"
    }
    assert reasons(before, precisions=frozenset({"fp32"})) == {
        "program": "precision int8 is not among those allowed: fp32"
    }
    assert reasons(before, capabilities=replace(INT8, integer_ops=frozenset())) == {
        "program": "target onnxruntime has no integer kernels"
    }
    assert reasons(before, calibration=[{"x": np.full((1, 2, 5, 5), np.nan, np.float32)}]) == {
        "conv1": "50 values of 'x' were NaN or infinite in calibration",
        "conv2": "75 values of 'r' were NaN or infinite in calibration",
    }


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "g (float[1,2,3,3] x, float[2,2,1,1] w) => (float[1,2,3,3] y) {[n] y = Conv(x, w)}",
            "its weight 'w' is not a constant",
        ),
        (
            f"g (float[1,2,3] x) => (float[1,2,2] y) <{zeros('w', 1, 3, 2)}>"
            "{[n] y = MatMul(x, w)}",
            "its weight 'w' has 3 dimensions, not 2",
        ),
        (
            "g (double[2,2] x, double[2,2] w) => (double[2,2] y) {[n] y = MatMul(x, w)}",
            "'x' is double, not float",
        ),
        (
            f"g (float[2,2] x) => (float[2,2] y) <{zeros('w', 2, 2)}> {{[n] y = MatMul(w, x)}}",
            "its operand 'w' is a constant where data is expected",
        ),
        (
            "g (float[2,2] x, float[2,2] z) => (float[2,2] y) {a = Add(x, z) y = Exp(a)}",
            "no integer kernel reads its result 'a'",
        ),
        (
            "g (float[2,2] x, float[2,2] z) => (float[2,2] y) {[n] y = Add(x, z)}",
            "its result 'y' is an output of the program and stays float",
        ),
        (
            "g (float[2,2] x, float[2,2] z, float[2,2] w) => (float[2,2] y)"
            "{a = Add(x, z) [mm] y = MatMul(a, w)}",
            "none of its operands comes from an integer kernel",
        ),
    ],
)
def test_reason_of_a_node(body, reason):
    found = reasons(program(body))
    assert list(found.values()) == [reason]


def test_plain_target_needs_its_convolutions_to_write_integers():
    body = f"g (float[1,2,3,3] x) => (float[1,2,3,3] y) <{zeros('w', 2, 2, 1, 1)}>"
    body += "{[n] y = Conv(x, w)}"
    found = reasons(program(body), capabilities=PLAIN)
    assert found["n"].startswith("its result 'y' is an output of the program, and the target's")


def test_nan_weights():
    before = conv_relu()
    weight = np.array(constant(before.value("w")))
    weight[1, 0, 0, 0] = np.nan
    before.set_weight(before.value("w"), weight)
    context = make_context(before, calibration=[random_inputs(before)])
    _, declines = proposals(InsertQdq(), before, context)
    assert {d.site: d.reason for d in declines}["conv1"] == (
        "1 of 3 output channels hold NaN weights"
    )


def test_skip_by_glob():
    before = conv_relu()
    candidates, declines = proposals(InsertQdq(skip=("conv1*",)), before)
    assert [c.site for c in candidates] == ["conv2"]
    assert [(d.site, d.reason) for d in declines] == [("conv1", "skipped by 'conv1*'")]


def test_a_site_that_is_gone_declines():
    before = conv_relu()
    candidates, _ = proposals(InsertQdq(), before)
    with pytest.raises(Declined, match="conv1"):
        candidates[0].rewrite(program("g (float[1] x) => (float[1] y) {y = Exp(x)}"))


def test_observers_come_from_the_context():
    class Half(MinMaxObserver):
        name = "half"

        def range(self, bits, symmetric):
            low, high = super().range(bits, symmetric)
            return low / 2, high / 2

    before = conv_relu()
    full = proposals(InsertQdq(observer="minmax"), before)[0]
    context = make_context(before, observers={"half": Half})
    half = proposals(InsertQdq(observer="half"), before, context)[0]
    for a, b in zip(full, half, strict=True):
        for name, told in a.details["activations"].items():
            assert b.details["activations"][name]["scale"] == pytest.approx(told["scale"] / 2)
    with pytest.raises(InputError, match="half"):
        proposals(InsertQdq(observer="half"), before)


def test_floats_of_eight_bits():
    before = conv_relu()
    floats = replace(INT8, precisions=frozenset({"fp32"}), emulated=frozenset({"fp8"}))
    context = make_context(before, capabilities=floats, precisions=frozenset({"fp32", "fp8"}))
    candidates, _ = proposals(InsertQdq(), before, context)
    assert [(c.site, c.choice) for c in candidates] == [("conv1", "fp8"), ("conv2", "fp8")]
    after, _ = apply_all(InsertQdq(), before, context)
    packed, _ = apply_all(PackWeights(), after, make_context(after))
    conv = packed.node("conv1")
    assert conv is not None
    for operand in conv.inputs[:2]:
        levels, scale, zero = operand.producer().inputs
        assert levels.dtype == zero.dtype == ir.DataType.FLOAT8E4M3FN
    assert constant(conv.inputs[2]).dtype == np.float32
    weight = np.abs(constant(before.node("conv1").inputs[1])).reshape(3, -1).max(axis=1)
    np.testing.assert_allclose(constant(scale), weight / 448, rtol=1e-6)
    inputs = random_inputs(before, 5)
    [exact], [got] = run_onnx(before, inputs), run_onnx(packed, inputs)
    assert_close([got], [run_batches(packed, [inputs], builtin_table())[0][0].numpy()], 1e-5)
    error = np.linalg.norm(np.log(got) - np.log(exact)) / np.linalg.norm(np.log(exact))
    assert 1e-3 < error < 0.15


@pytest.mark.parametrize("order", [("int8", "fp8"), ("fp8", "int8")])
def test_of_types_of_one_width_a_value_has_integers(order: tuple[str, str]):
    before = program(
        f"""g (float[1,2,5,5] x) => (float[1,3,5,5] y, float[1,3,5,5] z)
        <{zeros("w", 3, 2, 1, 1)}, {zeros("v", 3, 2, 1, 1)}> {{
          [a] y = Conv(x, w)
          [b] z = Conv(x, v)
        }}""",
        w=(3, 2, 1, 1), v=(3, 2, 1, 1),
    )  # fmt: skip
    result = before
    context = make_context(before, precisions=frozenset({"fp32", "int8", "fp8"}))
    candidates, _ = proposals(InsertQdq(), before, context)
    for site, choice in zip("ab", order, strict=True):
        [mine] = [c for c in candidates if (c.site, c.choice) == (site, choice)]
        result = apply_candidate("insert-qdq", mine, result).after
    reads = {n: result.node(n).inputs[0].producer() for n in "ab"}
    assert reads["a"] is reads["b"]
    assert reads["a"].inputs[0].dtype == ir.DataType.UINT8


def test_details_tell_of_each_value_once_and_of_every_form():
    offered, _ = proposals(InsertQdq(), conv_relu())
    observed = [name for c in offered for name in c.details.get("observed", {})]
    assert observed
    assert len(observed) == len(set(observed))
    for candidate in offered:
        forms = candidate.details["activations"]
        assert set(forms) <= set(observed)
        for form in forms.values():
            assert form["low"] <= 0 <= form["high"]
            assert form["sqnr_db"] > 20
        assert candidate.details["weight"]["type"] == "INT8"
        assert candidate.details["weight"]["sqnr_db"] > 30


GROUPS = f"""g (float[1,8,6,6] x) => (float[1,8,6,6] y)
<{zeros("w", 16, 8, 1, 1)}, {zeros("v", 16, 1, 3, 3)}, {zeros("u", 16, 4, 3, 3)}, {zeros("t", 8, 16, 1, 1)}> {{
  [expand] a = Conv(x, w) [r1] ar = Relu(a)
  [depthwise] b = Conv<group=16, pads=[1,1,1,1]>(ar, v) [r2] br = Relu(b)
  [grouped] c = Conv<group=4, pads=[1,1,1,1]>(br, u) [r3] cr = Relu(c)
  [last] y = Conv(cr, t)
}}"""  # noqa: E501
FEW = replace(PLAIN, fusions=frozenset({"contraction"}))


def few_bits(precision: str, **options) -> tuple[Program, Program]:
    before = program(GROUPS, w=(16, 8, 1, 1), v=(16, 1, 3, 3), u=(16, 4, 3, 3), t=(8, 16, 1, 1))
    context = make_context(
        before, capabilities=FEW, precisions=frozenset({"fp32", precision}),
        calibration=[random_inputs(before, s) for s in range(4)],
    )  # fmt: skip
    return before, apply_all(InsertQdq(**options), before, context)[0]


def kinds(program: Program) -> dict[str, str]:
    return {
        n.inputs[0].name: n.outputs[0].dtype.name
        for n in program.graph if n.op_type == "QuantizeLinear"
    }  # fmt: skip


def test_every_weight_may_have_four_bits_per_channel():
    _, after = few_bits("w4a8")
    found = kinds(after)
    assert {found[w] for w in "wvut"} == {"INT4"}
    assert {found[v] for v in ("x", "ar", "br", "cr")} == {"UINT8"}
    assert constant(after.value("v_scale")).shape == (16,)
    assert after.opset == 21


def test_four_bit_activations_leave_eight_to_the_ends():
    _, after = few_bits("w4a4")
    found = kinds(after)
    assert (found["x"], found["w"], found["cr"], found["t"]) == ("UINT8", "INT8", "UINT8", "INT8")
    assert (found["ar"], found["v"], found["br"], found["u"]) == ("UINT4", "INT4", "UINT4", "INT4")
    _, same = few_bits("w4a4", ends="same")
    assert set(kinds(same).values()) == {"UINT4", "INT4"}


def test_the_wider_of_two_widths_wins_whatever_the_order():
    before, _ = few_bits("w4a4")
    found = {}
    for precision in ("int8", "w4a4"):
        context = make_context(
            before, capabilities=FEW, precisions=frozenset({"fp32", precision}),
            calibration=[random_inputs(before, s) for s in range(4)],
        )  # fmt: skip
        candidates, _ = proposals(InsertQdq(ends="same"), before, context)
        found |= {(c.site, c.choice): c for c in candidates}
    skip = replace(found["depthwise", "int8"], site="depthwise")
    orders = ([found["grouped", "w4a4"], skip], [skip, found["grouped", "w4a4"]])
    texts = set()
    for order in orders:
        after = before
        for candidate in order:
            after = apply_candidate("insert-qdq", candidate, after).after
        after.verify(like=before)
        texts.add(tuple(sorted(kinds(after).items())))
    assert texts == {(("ar", "UINT8"), ("br", "UINT4"), ("u", "INT4"), ("v", "INT8"))}


def test_depthwise_weights_of_four_bits_are_bytes_in_the_cpu_library(tmp_path: Path):
    _, after = few_bits("w4a8")
    backend, target = CpuBackend(), Target("cpu", threads=1)
    assert {k.dtype for k in backend.kernels(after, target) if k.macs} == {"int8"}
    info = backend.lower(after, target, tmp_path)
    runner = backend.load(tmp_path, info, threads=1)
    feed = random_inputs(after, 5)
    [got], [[wanted]] = runner.run(feed), run_batches(after, [feed], builtin_table())
    runner.close()
    scale = float(np.abs(wanted.numpy()).max())
    assert np.abs(got - wanted.numpy()).max() < 0.01 * scale
