from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from optcompiler.program import Program
from optcompiler.rewriting import Declined, apply_candidate
from optcompiler_passes.fold_batchnorm import FoldBatchNorm
from tests.support import INT8, apply_all, make_context, op_types, proposals

BN = """float[4] g = {1.5, 0.5, -1.0, 2.0}, float[4] h = {0.1, -0.2, 0.3, 0.0},
 float[4] m = {0.5, 0.0, -0.5, 1.0}, float[4] v = {1.0, 0.25, 4.0, 2.0}"""


def numbers(count: int) -> str:
    return ", ".join(str((i * 7 % 11 - 5) / 10) for i in range(count))


def program(inputs: str, outputs: str, weights: str, nodes: str) -> Program:
    return Program.from_text(
        f"""<ir_version: 10, opset_import: ["": 20]>
agraph ({inputs}) => ({outputs})
<{weights}> {{
  {nodes}
}}
"""
    )


def folded(before: Program) -> Program:
    after, patches = apply_all(FoldBatchNorm(), before)
    assert patches
    assert all(p.removed for p in patches)
    return after


X = "float[2, 3, 6, 6] x"
Y = "float[2, 4, 4, 4] y"
CONV = f"float[4, 3, 3, 3] w = {{{numbers(108)}}}, float[4] b = {{1, 2, 3, 4}}"


def test_conv_without_bias_gets_one():
    before = program(
        X, Y, f"{CONV}, {BN}", "[conv] c = Conv (x, w) [bn] y = BatchNormalization (c, g, h, m, v)"
    )
    [candidate], declines = proposals(FoldBatchNorm(), before)
    assert (candidate.site, candidate.choice, candidate.exact) == ("bn", "into Conv 'conv'", True)
    assert not declines
    after = folded(before)
    [node] = after.graph
    assert (node.name, node.outputs[0].name) == ("conv", "y")
    assert set(after.weights()) == {"w", "conv.bias"}


@pytest.mark.parametrize(
    ("weights", "nodes", "output"),
    [
        (CONV, "c = Conv (x, w, b)", Y),
        (
            f"float[4, 1, 3, 3] w = {{{numbers(36)}}}",
            "s = Concat <axis = 1> (x, x) t = Slice (s, from, to, at) c = Conv <group = 4> (t, w)",
            Y,
        ),
        (f"float[3, 4, 2, 2] w = {{{numbers(48)}}}", "c = ConvTranspose (x, w)",
         "float[2, 4, 7, 7] y"),
        (f"float[4, 2, 1, 1] w = {{{numbers(8)}}}",
         "s = Concat <axis = 1> (x, x) t = Slice (s, from, to, at) "
         "c = ConvTranspose <group = 2> (t, w)",
         "float[2, 4, 6, 6] y"),
        (f"float[4, 108] w = {{{numbers(432)}}}, float[4] b = {{1, 2, 3, 4}}",
         "f = Flatten (x) c = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (f, w, b)",
         "float[2, 4] y"),
        (f"float[108, 4] w = {{{numbers(432)}}}", "f = Flatten (x) c = Gemm (f, w)",
         "float[2, 4] y"),
        (f"float[108, 4] w = {{{numbers(432)}}}, float[4] b = {{1, 2, 3, 4}}",
         "f = Flatten (x) d = MatMul (f, w) c = Add (b, d)", "float[2, 4] y"),
    ],
)  # fmt: skip
def test_batchnorm_after_every_contraction(weights: str, nodes: str, output: str):
    extra = "int64[1] from = {0}, int64[1] to = {4}, int64[1] at = {1}"
    before = program(
        X, output, f"{weights}, {BN}, {extra}", f"{nodes} y = BatchNormalization (c, g, h, m, v)"
    )
    assert "BatchNormalization" not in op_types(folded(before))


@pytest.mark.parametrize(
    "nodes",
    [
        "c = Conv (x, w, b) y = Mul (c, k)",
        "c = Conv (x, w) y = Add (k, c)",
        "c = Conv (x, w) y = Sub (k, c)",
        "c = Conv (x, w, b) y = Div (c, k)",
        "c = Conv (x, w, b) d = Mul (c, k) e = Sub (d, k) y = Mul (e, half)",
    ],
)
def test_arithmetic_per_channel(nodes: str):
    before = program(
        X, Y, f"{CONV}, float[4, 1, 1] k = {{2.0, -1.0, 0.5, 3.0}}, float half = {{0.5}}", nodes
    )
    assert op_types(folded(before)) == ["Conv"]


def test_chain_of_batchnorm_and_arithmetic():
    before = program(
        X, Y, f"{CONV}, {BN}, float[1, 4, 1, 1] k = {{2.0, -1.0, 0.5, 3.0}}",
        "c = Conv (x, w) n = BatchNormalization (c, g, h, m, v) y = Mul (n, k)",
    )  # fmt: skip
    assert op_types(folded(before)) == ["Conv"]


def test_scale_of_attention_moves_into_the_projection():
    before = program(
        "float[2, 3, 4] x", "float[2, 2, 3, 2] y",
        f"float[4, 4] w = {{{numbers(16)}}}, float[4] b = {{1, 2, 3, 4}}, float s = {{0.25}}, "
        "int64[4] heads = {2, 3, 2, 2}",
        "p = MatMul (x, w) a = Add (p, b) r = Reshape (a, heads) "
        "[heads_first] t = Transpose <perm = [0, 2, 1, 3]> (r) [scale] y = Mul (t, s)",
    )  # fmt: skip
    after = folded(before)
    assert op_types(after) == ["MatMul", "Add", "Reshape", "Transpose"]
    assert after.graph.outputs[0].name == "y"


def test_batchnorm_before_a_contraction():
    bn = "float[3] g = {2, -1, 0.5}, float[3] h = {1, 2, 3}, float[3] m = {0, 1, 2}, " \
        "float[3] v = {1, 2, 4}"  # fmt: skip
    before = program(
        X, Y, f"{CONV}, {bn}", "n = BatchNormalization (x, g, h, m, v) [conv] y = Conv (n, w, b)"
    )
    assert op_types(folded(before)) == ["Conv"]
    before = program(
        "float[2, 3] x", "float[2, 4] y",
        f"float[4, 3] w = {{{numbers(12)}}}, {bn}",
        "n = BatchNormalization (x, g, h, m, v) y = Gemm <transB = 1, alpha = 0.5> (n, w)",
    )  # fmt: skip
    assert op_types(folded(before)) == ["Gemm"]


PADDED = program(
    X, "float[2, 4, 6, 6] y",
    f"{CONV}, float[3] g = {{2, -1, 0.5}}, float[3] m = {{0, 1, 2}}, float[3] v = {{1, 2, 4}}",
    "[bn] n = BatchNormalization (x, g, m, m, v) y = Conv <pads = [1, 1, 1, 1]> (n, w, b)",
)  # fmt: skip


def test_batchnorm_before_padding_becomes_mul_and_add():
    [candidate], _ = proposals(FoldBatchNorm(), PADDED)
    assert candidate.choice == "Mul and Add"
    assert "pads its input with zeros" in candidate.note
    assert op_types(folded(PADDED)) == ["Mul", "Add", "Conv"]


def test_batchnorm_stays_where_the_backend_fuses_nothing():
    context = make_context(PADDED, capabilities=replace(INT8, fusions=frozenset()))
    [], [decline] = proposals(FoldBatchNorm(), PADDED, context)
    assert decline.site == "bn"
    assert "pads its input with zeros" in decline.reason


def test_shared_weight_is_copied():
    before = program(
        X, f"{Y}, float[2, 4, 4, 4] z", f"{CONV}, {BN}",
        "[one] c = Conv (x, w, b) y = BatchNormalization (c, g, h, m, v) [two] z = Conv (x, w, b)",
    )  # fmt: skip
    original = before.weights()["w"].numpy().copy()
    after = folded(before)
    assert set(after.weights()) == {"w", "b", "w.one", "b.one"}
    np.testing.assert_array_equal(after.weights()["w"].numpy(), original)


@pytest.mark.parametrize(
    ("outputs", "nodes", "reason"),
    [
        (Y, "c = Conv (x, w, b) d = Relu (c) e = Mul (c, k) y = Add (d, e)",
         "the result 'c' of Conv '%' is also read elsewhere or is an output."),
        (f"{Y}, float[2, 4, 4, 4] c", "c = Conv (x, w, b) y = Mul (c, k)",
         "the result 'c' of Conv '%' is also read elsewhere or is an output."),
        (Y, "i = Relu (w) c = Conv (x, i, b) y = Mul (c, k)",
         "the weights of Conv '%' are not constant."),
        (Y, "c = Conv (x, w, b) y = Mul (c, wide)",
         "its constant is not one number per channel of Conv '%'."),
    ],
)  # fmt: skip
def test_reasons(outputs: str, nodes: str, reason: str):
    before = program(
        X, outputs,
        f"{CONV}, float[4, 1, 1] k = {{2, -1, 0.5, 3}}, float[1, 4] wide = {{1, 2, 3, 4}}", nodes,
    )  # fmt: skip
    candidates, [decline] = proposals(FoldBatchNorm(), before)
    assert not candidates
    conv = next(n.name for n in before.graph if n.op_type == "Conv")
    assert decline.reason == reason.replace("%", str(conv))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("v = {1, -3, 1, 1}", "variance + epsilon is -2.99999; the checkpoint is broken."),
        ("v = {1, 1, 1, 1}, float[4] q = {1, 1, 1, 1}", ""),
    ],
)
def test_broken_variance(change: str, reason: str):
    stats = BN.replace("v = {1.0, 0.25, 4.0, 2.0}", change)
    before = program(
        X, Y, f"{CONV}, {stats}", "c = Conv (x, w) y = BatchNormalization (c, g, h, m, v)"
    )
    _, declines = proposals(FoldBatchNorm(), before)
    assert [d.reason for d in declines] == ([reason] if reason else [])


def test_a_scale_that_overflows_is_declined_when_applied():
    before = program(
        X, Y, f"{CONV}, float k = {{1e38}}", "[conv] c = Conv (x, w, b) y = Mul (c, k)"
    )
    before.set_weight(before.graph.initializers["b"], np.full(4, 1e30, np.float32))
    [candidate], _ = proposals(FoldBatchNorm(), before)
    with pytest.raises(Declined, match="weights of 'conv' would not be finite"):
        apply_candidate("fold-batchnorm", candidate, before)
