from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest

from optcompiler.program import FUSED_DOMAIN, Program
from optcompiler_passes._regions import KIND_KEY
from optcompiler_passes.fuse_operators import FuseOperators
from tests.support import INT8, apply_all, make_context, op_types, proposals

HEADER = '<ir_version: 10, opset_import: ["": 20]>\n'


def program(body: str, header: str = HEADER) -> Program:
    return Program.from_text(header + body)


CONV = """
agraph (float[1, 3, 8, 8] x, float[1, 4, 8, 8] r) => (float[1, 4, 8, 8] y)
<float[4, 3, 3, 3] w = {WEIGHTS}, float[4] b = {0.1, 0.2, 0.3, 0.4}> {
  [conv] c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
  [add] s = Add (c, r)
  [relu] y = Relu (s)
}
""".replace("WEIGHTS", ", ".join(str((i * 7 % 11 - 5) / 10) for i in range(108)))


def test_contraction_takes_residual_and_activation():
    before = program(CONV)
    candidates, declines = proposals(FuseOperators(), before)
    assert [(c.site, c.choice) for c in candidates] == [("conv", "contraction: Conv+Add+Relu")]
    assert candidates[0].exact
    assert candidates[0].nodes == ("conv", "add", "relu")
    assert not declines
    after, patches = apply_all(FuseOperators(), before)
    [node] = after.graph
    assert (node.name, node.domain, node.outputs[0].name) == ("conv", FUSED_DOMAIN, "y")
    assert node.op_type.startswith("Conv_Add_Relu_")
    assert [v.name for v in node.inputs] == ["x", "w", "b", "r"]
    [function] = after.functions.values()
    assert function.metadata_props[KIND_KEY] == "contraction"
    assert [v.name for v in function.inputs] == ["x", "w", "b", "b_1"]
    assert patches[0].removed == ("add", "relu")


def test_equal_bodies_share_one_function():
    after, _ = apply_all(
        FuseOperators(),
        program("""
agraph (float[2, 3] x) => (float[2, 3] y)
<float[3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}, float[3, 3] v = {9, 8, 7, 6, 5, 4, 3, 2, 1}> {
  [first] a = MatMul (x, w)
  [relu1] b = Relu (a)
  [second] c = MatMul (b, v)
  [relu2] y = Relu (c)
}
"""),
    )
    assert [n.name for n in after.graph] == ["first", "second"]
    assert len(after.functions) == 1
    assert op_types(after.inlined()) == ["MatMul", "Relu", "MatMul", "Relu"]


def test_names_do_not_depend_on_names_of_the_model():
    one, _ = apply_all(FuseOperators(), program(CONV))
    text = CONV.replace("[conv]", "[other]").replace(" c", " k").replace("(c", "(k")
    two, _ = apply_all(FuseOperators(), program(text))
    assert list(one.functions) == list(two.functions)


QUANTIZED = """
agraph (uint8[1, 4] xq) => (uint8[1, 3] yq, uint8[1, 3] zq)
<int8[4, 3] w = {1, -2, 3, -4, 5, -6, 7, -8, 9, -10, 11, -12}, float[3] ws = {0.1, 0.2, 0.3},
 int8[3] wz = {0, 0, 0}, float xs = {0.05}, uint8 xz = {128}, float ys = {0.1}, uint8 yz = {3},
 int32[3] b = {1, 2, 3}, float[3] bs = {0.005, 0.01, 0.015}, float low = {0.0},
 float high = {6.0}> {
  [dx] x = DequantizeLinear (xq, xs, xz)
  [dw] wf = DequantizeLinear <axis = 1> (w, ws, wz)
  [db] bf = DequantizeLinear <axis = 0> (b, bs)
  [gemm] g = Gemm (x, wf, bf)
  [clip] c = Clip (g, low, high)
  [qy] yq = QuantizeLinear (c, ys, yz)
  [mm] m = MatMul (x, wf)
  [qz] zq = QuantizeLinear (m, ys, yz)
}
"""


def test_quantized_regions_copy_the_shared_dequantize():
    candidates, _ = proposals(FuseOperators(), program(QUANTIZED))
    assert [c.choice for c in candidates] == [
        "contraction: Gemm+Clip+QuantizeLinear",
        "contraction: MatMul+QuantizeLinear",
    ]
    assert candidates[0].nodes == ("dx", "dw", "db", "gemm", "clip", "qy")
    after, _ = apply_all(FuseOperators(), program(QUANTIZED))
    gemm, matmul = after.graph
    assert [v.dtype.name for v in gemm.outputs] == ["UINT8"]
    assert [v.name for v in gemm.inputs] == [
        "xq", "xs", "xz", "w", "ws", "wz", "b", "bs", "ys", "yz",
    ]  # fmt: skip
    assert [v.name for v in matmul.inputs] == ["xq", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
    body = after.functions[gemm.op_identifier()]
    assert [n.op_type for n in body] == [
        "DequantizeLinear", "DequantizeLinear", "DequantizeLinear", "Gemm",
        "Constant", "Constant", "Clip", "QuantizeLinear",
    ]  # fmt: skip
    assert [v.name for v in body.inputs] == [
        "a", "a_scale", "a_zero_point", "b", "b_scale", "b_zero_point", "c", "c_scale",
        "y_scale", "y_zero_point",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "operators"),
    [
        ("s = Sigmoid (c) y = Mul (c, s)", "Sigmoid+Mul"),
        (
            "d = Div (c, root) e = Erf (d) o = Add (e, one) m = Mul (c, o) y = Mul (m, half)",
            "Div+Erf+Add+Mul+Mul",
        ),
        (
            "p = Pow (c, three) k = Mul (p, k0) a = Add (c, k) t = Mul (a, k1) h = Tanh (t) "
            "o = Add (h, one) f = Mul (c, half) y = Mul (f, o)",
            "Pow+Mul+Add+Mul+Tanh+Add+Mul+Mul",
        ),
    ],
)
def test_branching_activations_are_taken_whole(nodes: str, operators: str):
    before = program(
        """
agraph (float[2, 3] x) => (float[2, 3] y)
<float[3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}, float root = {1.4142135}, float one = {1.0},
 float half = {0.5}, float three = {3.0}, float k0 = {0.044715}, float k1 = {0.7978845}> {
  [mm] c = MatMul (x, w)
  NODES
}
""".replace("NODES", nodes)
    )
    candidates, _ = proposals(FuseOperators(), before)
    assert [c.choice for c in candidates] == [f"contraction: MatMul+{operators}"]
    after, _ = apply_all(FuseOperators(), before)
    assert [v.name for v in next(iter(after.graph)).inputs] == ["x", "w"]


@pytest.mark.parametrize(
    ("nodes", "outputs", "reason"),
    [
        ("y = Relu (c) [m] z = ReduceSum <keepdims = 0> (c)", "float[2, 3] y, float z",
         "nothing to fuse: 'c' is also read by 'm'."),
        ("y = Relu (c)", "float[2, 3] y, float[2, 3] c",
         "nothing to fuse: 'c' is an output of the program."),
        ("[r] y = Reshape (c, flat)", "float[6] y", "nothing to fuse: 'r' is Reshape."),
    ],
)  # fmt: skip
def test_near_misses_say_why(nodes: str, outputs: str, reason: str):
    before = program(
        f"""
agraph (float[2, 3] x) => ({outputs})
<float[3, 3] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9}}, int64[1] flat = {{6}}> {{
  [mm] c = MatMul (x, w)
  {nodes}
}}
"""
    )
    candidates, declines = proposals(FuseOperators(), before)
    assert not candidates
    assert (declines[0].site, declines[0].reason) == ("mm", reason)


def test_float_result_read_beside_its_quantisation_stays_outside():
    before = program(
        """
agraph (float[2, 3] x) => (uint8[2, 3] q, float[2] s)
<float[3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}, float scale = {0.1}, uint8 zero = {0}> {
  [mm] c = MatMul (x, w)
  [relu] r = Relu (c)
  [quantize] q = QuantizeLinear (r, scale, zero)
  [sum] s = ReduceSum <keepdims = 0> (r, axis)
}
""".replace("uint8 zero = {0}", "uint8 zero = {0}, int64[1] axis = {1}")
    )
    [candidate], _ = proposals(FuseOperators(), before)
    assert candidate.choice == "contraction: MatMul+Relu"
    assert candidate.note == "'r' is also read by 'sum'"
    apply_all(FuseOperators(), before)


LAYER_NORM = """
agraph (float[2, 5, 8] x, float[2, 5, 8] r) => (uint8[2, 5, 8] y)
<float[8] g = {1, 2, 3, 4, 5, 6, 7, 8}, float[8] b = {8, 7, 6, 5, 4, 3, 2, 1}, float two = {2.0},
 float eps = {0.00001}, int64[1] last = {-1}, float s = {0.1}, uint8 z = {100}> {
  [residual] a = Add (x, r)
  NODES
  [quantize] y = QuantizeLinear (n, s, z)
}
"""


@pytest.mark.parametrize(
    ("nodes", "anchor"),
    [
        ("[ln] n = LayerNormalization (a, g, b)", "ln"),
        (
            "[mean] m = ReduceMean (a, last) d = Sub (a, m) p = Pow (d, two) "
            "v = ReduceMean (p, last) e = Add (v, eps) q = Sqrt (e) o = Div (d, q) "
            "t = Mul (o, g) n = Add (t, b)",
            "mean",
        ),
        (
            "p = Mul (a, a) [mean] v = ReduceMean (p, last) e = Add (v, eps) q = Sqrt (e) "
            "i = Reciprocal (q) o = Mul (a, i) n = Mul (g, o)",
            "mean",
        ),
    ],
)
def test_normalization(nodes: str, anchor: str):
    before = program(LAYER_NORM.replace("NODES", nodes))
    [candidate], _ = proposals(FuseOperators(), before)
    assert candidate.site == anchor
    assert candidate.choice.startswith("normalization: Add+")
    assert candidate.choice.endswith("+QuantizeLinear")
    after, _ = apply_all(FuseOperators(), before)
    assert len(after.graph) == 1


ATTENTION = """
agraph (float[1, 4, 6] q, float[1, 4, 6] k, float[1, 4, 6] v, float[1, 1, 1, 4] mask)
  => (float[1, 4, 6] y)
<int64[4] split = {1, 4, 2, 3}, int64[3] join = {1, 4, 6}, float scale = {0.577}> {
  q0 = Reshape (q, split)
  k0 = Reshape (k, split)
  v0 = Reshape (v, split)
  [tq] q1 = Transpose <perm = [0, 2, 1, 3]> (q0)
  [tk] k1 = Transpose <perm = [0, 2, 3, 1]> (k0)
  [tv] v1 = Transpose <perm = [0, 2, 1, 3]> (v0)
  [scores] s0 = MatMul (q1, k1)
  [scaled] s1 = Mul (s0, scale)
  [masked] s2 = Add (s1, mask)
  [softmax] p = Softmax <axis = -1> (s2)
  [context] c = MatMul (p, v1)
  [tc] t = Transpose <perm = [0, 2, 1, 3]> (c)
  [merge] y = Reshape (t, join)
}
"""


def test_attention_is_one_region():
    before = program(ATTENTION)
    [candidate], declines = proposals(FuseOperators(), before)
    assert (candidate.site, declines) == ("context", [])
    assert set(candidate.nodes) == {
        "tq", "tk", "tv", "scores", "scaled", "masked", "softmax", "context", "tc",
    }  # fmt: skip
    after, _ = apply_all(FuseOperators(), before)
    call = after.node("context")
    assert call is not None
    assert [v.name for v in call.inputs] == ["q0", "k0", "v0", "mask"] or len(call.inputs) == 4


def test_quantised_attention_takes_transposes_of_integers():
    before = program("""
agraph (uint8[1, 4, 2, 3] q, uint8[1, 4, 2, 3] k, uint8[1, 4, 2, 3] v) => (uint8[1, 4, 2, 3] y)
<float s = {0.05}, uint8 z = {128}, float ps = {0.004}, uint8 pz = {0}> {
  [tq] q1 = Transpose <perm = [0, 2, 1, 3]> (q)
  [dq] q2 = DequantizeLinear (q1, s, z)
  [tk] k1 = Transpose <perm = [0, 2, 3, 1]> (k)
  [dk] k2 = DequantizeLinear (k1, s, z)
  [tv] v1 = Transpose <perm = [0, 2, 1, 3]> (v)
  [dv] v2 = DequantizeLinear (v1, s, z)
  [scores] s0 = MatMul (q2, k2)
  [softmax] p = Softmax <axis = -1> (s0)
  [qp] p1 = QuantizeLinear (p, ps, pz)
  [dp] p2 = DequantizeLinear (p1, ps, pz)
  [context] c = MatMul (p2, v2)
  [qc] c1 = QuantizeLinear (c, s, z)
  [tc] y = Transpose <perm = [0, 2, 1, 3]> (c1)
}
""")
    [candidate], _ = proposals(FuseOperators(), before)
    assert candidate.site == "context"
    assert set(candidate.nodes) == {str(n.name) for n in before.graph}
    after, _ = apply_all(FuseOperators(), before)
    assert len(after.graph) == 1


def test_kinds_are_those_of_the_backend():
    before = program(ATTENTION)
    context = make_context(
        before, capabilities=replace(INT8, fusions=frozenset({"contraction", "softmax"}))
    )
    candidates, _ = proposals(FuseOperators(), before, context)
    assert [c.choice for c in candidates] == ["contraction: MatMul+Mul+Add"]
    context = make_context(before, capabilities=replace(INT8, fusions=frozenset({"softmax"})))
    candidates, _ = proposals(FuseOperators(), before, context)
    assert [c.choice for c in candidates] == ["softmax: Mul+Add+Softmax"]
    context = make_context(before, capabilities=replace(INT8, fusions=frozenset()))
    assert proposals(FuseOperators(), before, context) == ([], [])


def test_attention_with_probabilities_used_elsewhere_is_declined():
    text = ATTENTION.replace("=> (float[1, 4, 6] y)", "=> (float[1, 4, 6] y, float[1, 2, 4, 4] p)")
    candidates, declines = proposals(FuseOperators(), program(text))
    assert [c.choice for c in candidates] == [
        "contraction: MatMul+Mul+Add",
    ]
    assert declines[0].site == "softmax"
    assert "no attention" in declines[0].reason


def test_pointwise_joins_both_branches():
    before = program("""
agraph (uint8[2, 8] a, float[2, 8] b) => (uint8[2, 8] y)
<float s = {0.1}, uint8 z = {3}> {
  [dequantize] f = DequantizeLinear (a, s, z)
  [left] l = Sigmoid (f)
  [right] r = Tanh (b)
  [product] m = Mul (l, r)
  [quantize] y = QuantizeLinear (m, s, z)
}
""")
    [candidate], _ = proposals(FuseOperators(), before)
    assert (candidate.site, candidate.choice) == (
        "left", "pointwise: Sigmoid+Tanh+Mul+QuantizeLinear",
    )  # fmt: skip
    after, _ = apply_all(FuseOperators(), before)
    assert len(after.graph) == 1


def test_dynamic_batch_is_kept():
    before = program("""
agraph (float[batch, 4] x) => (float[batch, 2] y)
<float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] b = {1, 2}> {
  [mm] m = MatMul (x, w)
  [bias] a = Add (m, b)
  [relu] y = Relu (a)
}
""")
    after, _ = apply_all(FuseOperators(), before)
    assert len(after.graph) == 1


def test_a_region_whose_node_is_gone_is_declined():
    from optcompiler.rewriting import Declined, apply_candidate

    before = program(CONV)
    [candidate], _ = proposals(FuseOperators(), before)
    fused = apply_candidate("fuse-operators", candidate, before).after
    with pytest.raises(Declined, match="node 'add' is gone"):
        apply_candidate("fuse-operators", candidate, fused)


def test_calls_survive_a_round_trip_through_protobuf():
    after, _ = apply_all(FuseOperators(), program(QUANTIZED))
    again = ir.from_proto(after.to_proto())
    assert {f.metadata_props[KIND_KEY] for f in again.functions.values()} == {"contraction"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_exports_of_modules(dynamic: bool):
    import torch
    from torch import nn

    from optcompiler_passes.fold_batchnorm import FoldBatchNorm
    from optcompiler_passes.simplify import Simplify

    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(8)
            self.down = nn.Conv2d(8, 2, 1)
            self.up = nn.Conv2d(2, 8, 1)
            self.grow = nn.ConvTranspose2d(8, 4, 2, stride=2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = nn.functional.silu(self.norm(self.stem(x)))
            gate = torch.sigmoid(self.up(self.down(x.mean((2, 3), keepdim=True)).relu()))
            x = x * gate
            return self.grow(x).clamp(-1, 1), x.flatten(1).softmax(-1)

    torch.manual_seed(0)
    module = Squeeze().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        traced = torch.export.export(
            module, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},) if dynamic else None
        )
        exported = torch.onnx.export(traced, dynamo=True, verbose=False, optimize=False)
    assert exported is not None
    after = Program.from_onnx(exported.model)
    for pass_ in (Simplify(), FoldBatchNorm(), FuseOperators()):
        after, _ = apply_all(pass_, after)
    called = [n.op_type.rsplit("_", 1)[0] for n in after.graph if n.domain == FUSED_DOMAIN]
    assert called == ["Conv_Sigmoid_Mul", "Conv_Relu", "Conv_Sigmoid", "ConvTranspose_Clip"]
