"""cast-bf16: where casts go, which cancel, and the reasons for leaving nodes alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from optcompiler.damage import run_batches
from optcompiler.errors import Declined
from optcompiler.ops import builtin_table
from optcompiler.program import Program, constant
from optcompiler.rewriting import apply_candidate
from optcompiler_passes.cast_bf16 import CastBf16
from optcompiler_passes.insert_qdq import InsertQdq
from tests.support import INT8, apply_all, filled_program, make_context, proposals, random_inputs

BF16 = replace(INT8, precisions=frozenset({"fp32", "bf16", "int8"}))
HEAD = '<ir_version: 10, opset_import: ["": 20]> '


def program(body: str, **weights: np.ndarray) -> Program:
    return filled_program(HEAD + body, **weights)


def context(source: Program, **changes):
    return make_context(source, **{"capabilities": BF16, "precisions": BF16.precisions, **changes})


def lines(source: Program) -> list[str]:
    """Nodes as `results = Operator(operands)`; a Cast with the type it casts to."""
    texts = []
    for node in source.graph:
        to = node.attributes.get_int("to", 0)
        name = f"{node.op_type}<{ir.DataType(to).name}>" if to else node.op_type
        operands = ", ".join(str(v.name) for v in node.inputs if v is not None)
        texts.append(f"{', '.join(str(v.name) for v in node.outputs)} = {name}({operands})")
    return texts


def cast(source: Program) -> Program:
    after, _ = apply_all(CastBf16(), source, context(source))
    return after


def reasons(source: Program, pass_: CastBf16 | None = None, **changes) -> dict[str, str]:
    _, declines = proposals(pass_ or CastBf16(), source, context(source, **changes))
    return {d.site: d.reason for d in declines}


def outputs(source: Program, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    [found] = run_batches(source, [inputs], builtin_table())
    return [o.numpy() for o in found]


CHAIN = """g (float[1,2,6,6] x) => (float[1,5] y)
<float[4,2,3,3] w, float[4] b, float[36,5] v> {
  [conv] c = Conv<pads=[1,1,1,1]>(x, w, b)
  [relu] r = Relu(c)
  [pool] p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
  [flat] f = Flatten(p)
  [fc] y = MatMul(f, v)
}"""


def test_values_between_two_sites_stay_in_bfloat16():
    before = program(CHAIN)
    after = cast(before)
    assert lines(after) == [
        "x_bf16 = Cast<BFLOAT16>(x)",
        "c_bf16 = Conv(x_bf16, w_bf16, b_bf16)",
        "r_bf16 = Relu(c_bf16)",
        "p_bf16 = MaxPool(r_bf16)",
        "f_bf16 = Flatten(p_bf16)",
        "y_bf16 = MatMul(f_bf16, v_bf16)",
        "y = Cast<FLOAT>(y_bf16)",
    ]
    assert set(after.graph.initializers) == {"w_bf16", "b_bf16", "v_bf16"}
    assert after.opset == 22
    np.testing.assert_array_equal(
        constant(after.value("w_bf16")),
        constant(before.value("w")).astype(ir.DataType.BFLOAT16.numpy()),
    )


def test_numbers_are_those_of_eight_bits_of_mantissa():
    before = program(CHAIN)
    inputs = random_inputs(before, 3)
    [want], [got] = outputs(before, inputs), outputs(cast(before), inputs)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 1e-5 < error < 2.0**-7


def test_one_site_alone_is_cast_back():
    before = program(CHAIN)
    candidates, declines = proposals(CastBf16(), before, context(before))
    assert [(c.site, c.choice, c.exact, c.nodes) for c in candidates] == [
        ("conv", "bf16", False, ("conv",)),
        ("fc", "bf16", False, ("fc",)),
    ]
    assert not declines
    after = apply_candidate("cast-bf16", candidates[0], before).after
    after.verify(like=before)
    assert lines(after)[2:4] == ["c = Cast<FLOAT>(c_bf16)", "r = Relu(c)"]
    after = apply_candidate("cast-bf16", candidates[1], before).after
    after.verify(like=before)
    assert lines(after)[1:5] == [
        "r = Relu(c)",
        "p = MaxPool(r)",
        "p_bf16 = Cast<BFLOAT16>(p)",
        "f_bf16 = Flatten(p_bf16)",
    ]  # a MaxPool takes bfloat16 from operator set 22 on, which a MatMul does not need


def test_order_of_application_does_not_matter():
    before = program(CHAIN)
    candidates, _ = proposals(CastBf16(), before, context(before))
    found = set()
    for order in (candidates, candidates[::-1]):
        after = before
        for candidate in order:
            after = apply_candidate("cast-bf16", candidate, after).after
        after.verify(like=before)
        found.add(outputs(after, random_inputs(before))[0].tobytes())
    assert len(found) == 1


SHARED = """g (float[3,8] x) => (float[3,8] y, float[3,8] z)
<float[8,8] w, float[8] s, float[8] t> {
  [norm] n = LayerNormalization(x, s, t)
  [a] p = MatMul(n, w)
  [b] q = MatMul(n, w)
  [tanh] u = Tanh(q)
  [add] y = Add(n, p)
  [c] z = MatMul(u, w)
}"""


def test_values_and_weights_are_cast_once_and_float_readers_keep_theirs():
    after = cast(program(SHARED))
    assert lines(after) == [
        "n = LayerNormalization(x, s, t)",
        "n_bf16 = Cast<BFLOAT16>(n)",
        "p_bf16 = MatMul(n_bf16, w_bf16)",
        "p = Cast<FLOAT>(p_bf16)",
        "q_bf16 = MatMul(n_bf16, w_bf16)",
        "q = Cast<FLOAT>(q_bf16)",
        "u = Tanh(q)",
        "u_bf16 = Cast<BFLOAT16>(u)",
        "y = Add(n, p)",
        "z_bf16 = MatMul(u_bf16, w_bf16)",
        "z = Cast<FLOAT>(z_bf16)",
    ]
    assert set(after.graph.initializers) == {"w_bf16", "s", "t"}


def test_a_weight_that_a_float_node_reads_stays_beside_the_narrow_one():
    after = cast(
        program(
            """g (float[3,8] x) => (float[8,8] y) <float[8,8] w> {
              [a] p = MatMul(x, w)
              [t] q = Transpose(p)
              [b] r = MatMul(q, p)
              [add] y = Add(r, w)
            }"""
        )
    )
    assert {"w", "w_bf16"} <= set(after.graph.initializers)


def test_a_name_that_is_taken_is_not_taken_for_the_cast_weight():
    source = program(
        """g (float[3,8] x) => (float[3,8] y) <float[8,8] w, float[8] w_bf16> {
          [a] p = MatMul(x, w)
          [add] y = Add(p, w_bf16)
        }"""
    )
    after = cast(source)
    assert "p_bf16 = MatMul(x_bf16, w_bf16_1)" in lines(after)
    assert "y = Add(p, w_bf16)" in lines(after)


ATTENTION = """g (float[1,4,6] x) => (float[1,4,6] y)
<float[6,6] wq, float[6,6] wk, float[6] bias> {
  [q] q0 = MatMul(x, wq)
  [qb] q1 = Add(q0, bias)
  [qt] q2 = Transpose<perm=[0,1,2]>(q1)
  [k] k0 = MatMul(x, wk)
  [kt] k1 = Transpose<perm=[0,2,1]>(k0)
  [qk] s = MatMul(q2, k1)
  [softmax] p = Softmax(s)
  [pv] y = MatMul(p, x)
}"""


def test_two_computed_operands_are_both_cast_before_what_moves_them():
    after = lines(cast(program(ATTENTION)))
    assert "q1_bf16 = Cast<BFLOAT16>(q1)" in after
    assert "q2_bf16 = Transpose(q1_bf16)" in after
    assert "k1_bf16 = Transpose(k0_bf16)" in after
    assert "s_bf16 = MatMul(q2_bf16, k1_bf16)" in after
    assert "p = Softmax(s)" in after
    assert "y_bf16 = MatMul(p_bf16, x_bf16)" in after


GEMM = """g (float[3,8] x) => (float[3,5] y) <float[5,8] w, float[5] b> {
  [fc] y = Gemm<transB=1>(x, w, b)
}"""


def test_a_target_without_bfloat16_is_left_alone():
    source = program(GEMM)
    assert reasons(source, capabilities=INT8, precisions=INT8.precisions) == {
        "program": "target onnxruntime has no bfloat16 kernels"
    }


def test_precision_and_calibration_are_asked_for():
    source = program(GEMM)
    assert reasons(source, precisions=frozenset({"fp32", "int8"})) == {
        "program": "precision bf16 is not among those allowed: fp32, int8"
    }
    assert reasons(source, calibration=[]) == {
        "program": "no calibration data to measure damage on; pass calibration=batches"
    }


@pytest.mark.parametrize(("value", "count"), [(np.nan, 1), (np.inf, 1), (3.4e38, 1), (3.38e38, 0)])
def test_weights_that_are_not_finite_in_bfloat16_are_declined(value: float, count: int):
    weight = np.ones((5, 8), np.float32)
    weight[2, 3] = value
    source = program(GEMM)
    source.set_weight(source.value("w"), weight)
    found = reasons(source)
    want = {"fc": f"{count} values of 'w' are NaN or infinite in bfloat16"} if count else {}
    assert found == want


def test_other_nodes_that_are_no_sites():
    source = program(
        """g (float[3,8] x, float[8,5] w, double[3,3] d)
           => (float[3,5] y, float[4,8] z, double[3,3] e) <float[4,3] c> {
          [gemm] y = Gemm(x, w)
          [left] z = MatMul(c, x)
          [wide] e = MatMul(d, d)
        }"""
    )
    assert reasons(source) == {
        "gemm": "its weight 'w' is not a constant",
        "left": "its operand 'c' is a constant where data is expected",
        "wide": "'d' is double, not float",
    }


def test_skipped_nodes_and_old_operator_sets():
    source = program(CHAIN)
    assert reasons(source, CastBf16(skip=("f*",))) == {"fc": "skipped by 'f*'"}
    source.graph.opset_imports[""] = 18
    assert reasons(source) == {
        "conv": "a Conv of bfloat16 needs operator set 22, and the program is of 18"
    }


def test_a_quantised_node_is_left_and_a_cast_one_is_not_quantised():
    source = program(GEMM)
    [int8], _ = proposals(InsertQdq(), source, context(source))
    [bf16], _ = proposals(CastBf16(), source, context(source))
    quantised = apply_candidate("insert-qdq", int8, source).after
    assert reasons(quantised) == {"fc": "already quantised"}
    with pytest.raises(Declined, match="already quantised"):
        apply_candidate("cast-bf16", bf16, quantised)
    narrow = apply_candidate("cast-bf16", bf16, source).after
    assert reasons(narrow) == {"fc": "'x_bf16' is bfloat16, not float"}
    with pytest.raises(Declined, match="no longer works on floats"):
        apply_candidate("insert-qdq", int8, narrow)


def test_a_quantised_neighbour_reads_the_float_of_the_old_name():
    """Candidates of both passes, proposed on one program and applied one after the other."""
    source = program(CHAIN)
    int8 = {c.site: c for c in proposals(InsertQdq(), source, context(source))[0]}
    bf16 = {c.site: c for c in proposals(CastBf16(), source, context(source))[0]}
    for first, second in (("conv", "fc"), ("fc", "conv")):
        after = apply_candidate("cast-bf16", bf16[first], source).after
        after = apply_candidate("insert-qdq", int8[second], after).after
        after.verify(like=source)
        other = apply_candidate("insert-qdq", int8[second], source).after
        other = apply_candidate("cast-bf16", bf16[first], other).after
        other.verify(like=source)
        inputs = random_inputs(source)
        np.testing.assert_allclose(
            outputs(after, inputs)[0], outputs(other, inputs)[0], rtol=0, atol=0.05
        )


def test_a_gone_site_is_declined():
    source = program(GEMM)
    [candidate], _ = proposals(CastBf16(), source, context(source))
    with pytest.raises(Declined, match="is gone"):
        candidate.rewrite(program(SHARED))
