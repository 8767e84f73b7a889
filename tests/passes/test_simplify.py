from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optcompiler.program import Program
from optcompiler.rewriting import apply_candidate
from optcompiler_passes._folding import FoldingPolicy
from optcompiler_passes._gelu import as_gelu
from optcompiler_passes.simplify import Simplify, interval
from tests.support import apply_all, assert_close, op_types, proposals, random_inputs, run_onnx


def program(body: str) -> Program:
    return Program.from_text('<ir_version: 10, opset_import: ["": 20]>\n' + body)


def simplified(body: str) -> Program:
    after, patches = apply_all(Simplify(), program(body))
    assert len(patches) == 1
    return after


def left_alone(before: Program) -> bool:
    [candidate], _ = proposals(Simplify(), before)
    return apply_candidate("simplify", candidate, before).empty


def test_folds_shapes_and_drops_dead_code_and_keeps_names():
    after = simplified("""
agraph (float[2, 3, 4] x) => (float[6, 4] y)
<int64[1] four = {4}, int64[1] all = {-1}> {
  [unused] u = Relu (x)
  [shape] s = Shape (x)
  [concat] t = Concat <axis = 0> (all, four)
  [relu] r = Relu (x)
  [reshape] y = Reshape (r, t)
}
""")
    assert [n.name for n in after.graph] == ["relu", "reshape"]
    assert after.weights()["t"].numpy().tolist() == [-1, 4]


def test_removes_what_does_nothing():
    after = simplified("""
agraph (float[2, 3] x) => (float[2, 3] y)
<float zero = {0.0}, float one = {1.0}, int64[2] shape = {2, -1}> {
  a = Identity (x)
  b = Dropout (a)
  c = Cast <to = 1> (b)
  d = Reshape (c, shape)
  e = Transpose <perm = [0, 1]> (d)
  f = Add (e, zero)
  g = Mul (one, f)
  t = Transpose <perm = [1, 0]> (g)
  u = Transpose <perm = [1, 0]> (t)
  [tanh] y = Tanh (u)
}
""")
    assert [n.name for n in after.graph] == ["tanh"]
    assert next(iter(after.graph)).inputs[0] is after.graph.inputs[0]


def test_a_replaced_node_keeps_the_name_of_its_value_and_node():
    after = simplified("""
agraph (float[2, 3] x) => (float[2, 3] y)
<float low = {-1.0}, float high = {6.0}> {
  [relu] r = Relu (x)
  [clip] c = Clip (r, low, high)
  [tanh] y = Tanh (c)
}
""")
    assert [(n.name, n.op_type, n.outputs[0].name) for n in after.graph] == [
        ("clip", "Clip", "c"),
        ("tanh", "Tanh", "y"),
    ]


def test_equal_nodes_become_one_but_random_ones_do_not():
    after = simplified("""
agraph (float[2, 3] x) => (float[2, 3] y, float[2, 3] z)
<float a = {2.0}, float b = {2.0}> {
  [one] p = Mul (x, a)
  [two] q = Mul (x, b)
  y = Add (p, q)
  n1 = RandomNormalLike <seed = 1.0> (x)
  n2 = RandomNormalLike <seed = 1.0> (x)
  z = Sub (n1, n2)
}
""")
    assert op_types(after) == ["Mul", "Add", "RandomNormalLike", "RandomNormalLike", "Sub"]
    assert "two" not in [n.name for n in after.graph]


def test_equal_weights_stay_apart():
    body = """
agraph (float[2, 3] x) => (float[2, 3] y)
<float[3] a = {2, 3, 4}, float[3] b = {2, 3, 4}> {
  p = Mul (x, a)
  y = Mul (p, b)
}
"""
    assert left_alone(program(body))


@pytest.mark.parametrize(
    "node",
    [
        "h = ConstantOfShape (huge)",
        "h = Expand (one, huge)",
        "h = Tile (square, huge)",
        "h = Range (start, limit, delta)",
        'h = Resize <mode = "nearest"> (square, , , huge)',
    ],
)
def test_folding_bombs_are_left_alone(node: str):
    before = program(
        """
agraph (float x) => (float y)
<int64[2] huge = {200000, 100000}, float one = {1.0}, float[1, 1] square = {1.0},
 float start = {0.0}, float limit = {1000000000.0}, float delta = {1.0}> {
  i = Identity (x)
  NODE
  s = ReduceMax <keepdims = 0> (h)
  y = Add (i, s)
}
""".replace("NODE", node)
    )
    [candidate], _ = proposals(Simplify(), before)
    after = apply_candidate("simplify", candidate, before).after
    assert op_types(after)[-3:][0] == node.split()[2]
    assert after.weight_bytes < 1000


def test_many_small_growths_are_bounded_together():
    policy = FoldingPolicy(ir.Graph([], [], nodes=[]), growth_bytes=1000, total_growth_bytes=1500)

    def expand() -> ir.Node:
        shape = ir.val("s", const_value=ir.tensor(np.array([200], np.int64)))
        one = ir.val("o", const_value=ir.tensor(np.float32(1)))
        out = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([200]))
        return ir.Node("", "Expand", [one, shape], outputs=[out])

    assert [policy(expand()) for _ in range(3)] == [True, False, False]


def test_gather_elements_of_constants():
    after = simplified("""
agraph (float[1, 3] x) => (float[1, 3] y)
<float[1, 4] table = {5, 6, 7, 8}, int64[1, 3] at = {2, -1, 0}> {
  g = GatherElements <axis = 1> (table, at)
  y = Mul (x, g)
}
""")
    assert op_types(after) == ["Mul"]
    [folded] = after.weights().values()
    assert folded.numpy().tolist() == [[7, 8, 5]]


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        ("Clip (x, low, high)", "Relu (c)", ["Clip"]),
        ("Clip (x, low, high)", "Clip (c, zero, high)", ["Clip"]),
        ("Clip (x, low, below)", "Relu (c)", ["Clip", "Relu"]),
        ("Clip (x, low, below)", "Clip (c, zero, high)", ["Clip", "Clip"]),
        ("Clip (x, zero, high)", "Clip (c, low, below)", ["Clip", "Clip"]),
    ],
)
def test_clips_join_where_an_interval_is_left(first: str, second: str, left: list[str]):
    after = simplified(f"""
agraph (float[2, 3] x) => (float[2, 3] y)
<float low = {{-3.0}}, float below = {{-2.0}}, float zero = {{0.0}}, float high = {{1.0}}> {{
  c = {first}
  y = {second}
}}
""")
    assert op_types(after) == left


def test_max_and_min_become_clip():
    after = simplified("""
agraph (float[2, 3] x) => (float[2, 3] y)
<float low = {-1.0}, float high = {1.0}> {
  a = Max (x, low)
  [clip] b = Min (a, high)
  y = Neg (b)
}
""")
    assert op_types(after) == ["Clip", "Neg"]
    assert after.node("clip") is not None


def test_branch_of_a_constant_condition_is_taken():
    after = simplified("""
agraph (float[2, 3] x) => (float[2, 3] y) <bool yes = {1}> {
  r = If (yes) <
    then_branch = then_graph () => (float[2, 3] t) { t = Relu (x) },
    else_branch = else_graph () => (float[2, 3] e) { e = Neg (x) }
  >
  y = Abs (r)
}
""")
    assert op_types(after) == ["Relu", "Abs"]


def test_branches_of_constant_conditions_may_nest_capture_and_return_what_is_outside():
    after = simplified("""
agraph (float[2] x) => (float[2] y, float[2] z)
<bool yes = {1}, bool no = {0}, float[2] w = {1, 2}> {
  a = Relu (x)
  r, s, t = If (yes) <
    then_branch = then_graph () => (float[2] i, float[2] j, float[2] k)
    <float[2] own = {3, 4}> {
      i = If (no) <
        then_branch = inner_then () => (float[2] p) { p = Neg (a) },
        else_branch = inner_else () => (float[2] q) { q = Add (a, w) }
      >
      j = Identity (a)
      k = Mul (own, x)
    },
    else_branch = else_graph () => (float[2] l, float[2] m, float[2] n) {
      l = Neg (x)  m = Neg (x)  n = Neg (x)
    }
  >
  u = Sub (r, s)
  y = Add (u, t)
  z = Identity (a)
}
""")
    assert sorted(op_types(after)) == ["Add", "Add", "Mul", "Relu", "Sub"]


def test_an_unknown_condition_keeps_its_branches_apart():
    before = program("""
agraph (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}> {
  a = Relu (x)
  y = If (c) <
    then_branch = then_graph () => (float[2] t) { t = Identity (a) },
    else_branch = else_graph () => (float[2] e) { b = Add (a, w)  e = Identity (b) }
  >
}
""")
    after, _ = apply_all(Simplify(), before)
    assert op_types(after) == ["Relu", "If"]
    for c in (True, False):
        inputs = {"x": np.array([-1, 5], np.float32), "c": np.array(c)}
        assert_close(run_onnx(after, inputs), run_onnx(before, inputs))


@pytest.mark.parametrize(("trips", "keep"), [(0, 1), (3, 0)])
def test_a_loop_of_no_iteration_gives_back_what_went_in(trips: int, keep: int):
    after = simplified(f"""
agraph (float[2] x) => (float[2] y, float[N, 2] z)
<int64 trips = {{{trips}}}, bool keep = {{{keep}}}> {{
  a = Relu (x)
  b, z = Loop (trips, keep, a) <
    body = body (int64 i, bool c, float[2] v) => (bool d, float[2] w, float[2] s) {{
      d = Identity (c)  w = Neg (v)  s = Exp (v)
    }}
  >
  y = Abs (b)
}}
""")
    assert sorted(op_types(after)) == ["Abs", "Identity", "Relu"]


def test_a_loop_that_runs_is_left_alone():
    body = """
agraph (float[2] x) => (float[2] y) <int64 trips = {2}, bool keep = {1}> {
  y = Loop (trips, keep, x) <
    body = body (int64 i, bool c, float[2] v) => (bool d, float[2] w) {
      d = Identity (c)  w = Neg (v)
    }
  >
}
"""
    assert left_alone(program(body))


def test_outputs_of_a_body_stay_apart():
    before = program("""
agraph (float[2] s, float[3, 2] x) => (float[2] y, float[3, 2] z) {
  y, z = Scan <num_scan_inputs = 1,
    body = body (float[2] i, float[2] n) => (float[2] o, float[2] p) {
      o = Add (i, n)  p = Identity (o)
    }> (s, x)
  unused = Relu (s)
}
""")
    after, _ = apply_all(Simplify(), before)
    [scan] = after.graph
    names = [v.name for v in scan.attributes["body"].as_graph().outputs]
    assert names == ["o", "p"]


def test_quantisation_of_a_weight_is_not_folded():
    body = """
agraph (float[2, 2] x) => (float[2, 2] y)
<float[2, 2] w = {1, 2, 3, 4}, float s = {0.1}, int8 z = {0}> {
  q = QuantizeLinear (w, s, z)
  d = DequantizeLinear (q, s, z)
  y = MatMul (x, d)
}
"""
    assert left_alone(program(body))


def test_interface_is_kept_when_outputs_are_simplified_away():
    before = program("""
agraph (float[n, 3] x) => (float[n, 3] y, float[n, 3] z)
<int64[2] same = {0, 3}> {
  r = Relu (x)
  y = Identity (r)
  z = Reshape (r, same)
}
""")
    after, _ = apply_all(Simplify(), before)
    assert (after.inputs, after.outputs) == (before.inputs, before.outputs)


def test_reshape_transpose_reshape_becomes_one_transpose():
    after = simplified("""
agraph (float[2, 3, 4, 5] x) => (float[2, 3, 5, 4] z)
<int64[3] flat = {-1, 4, 5}, int64[4] full = {2, 3, 5, 4}> {
  a = Reshape (x, flat)
  b = Transpose <perm = [0, 2, 1]> (a)
  y = Reshape (b, full)
  z = Relu (y)
}
""")
    assert op_types(after) == ["Transpose", "Relu"]
    assert next(iter(after.graph)).attributes["perm"].as_ints() == (0, 1, 3, 2)


GUARDED = """
agraph (float[2, 4, 6] q, float[2, 6, 4] k, MASK) => (float[2, 4, 4] y)
<float zero = {0.0}, float low = {LOW}> {
  s = MatMul (q, k)
  BIAS
  a = Add (s, bias)
  p = Softmax <axis = -1> (a)
  n = IsNaN (p)
  y0 = Where (n, zero, p)
  y = Relu (y0)
}
"""


@pytest.mark.parametrize(
    ("mask", "low", "bias", "kept"),
    [
        ("bool[2, 1, 4] m", "-3.4028235e38", "bias = Where (m, zero, low)", False),
        ("bool[2, 1, 4] m", "-10000.0",
         "f = Cast <to = 1> (m) i = Sub (zero, f) bias = Mul (i, low)", False),
        ("float[2, 1, 4] m", "-1.0", "bias = Mul (m, low)", True),
    ],
)  # fmt: skip
def test_nan_guard_goes_only_where_nothing_can_be_nan(mask: str, low: str, bias: str, kept: bool):
    before = program(GUARDED.replace("MASK", mask).replace("LOW", low).replace("BIAS", bias))
    if kept:
        assert left_alone(before)
        return
    after, _ = apply_all(Simplify(), before)
    assert "IsNaN" not in op_types(after)


def test_nan_guard_of_an_infinite_mask_stays():
    before = program(
        GUARDED.replace("MASK", "bool[2, 1, 4] m")
        .replace("LOW", "-1.0")
        .replace("BIAS", "bias = Where (m, zero, low)")
    )
    before.set_weight(before.graph.initializers["low"], np.array(-np.inf, np.float32))
    assert left_alone(before)


def test_interval_of_an_unknown_operator_is_unknown():
    before = program("agraph (float[2] x) => (float[2] y) { y = Exp (x) }")
    assert interval(before.graph.outputs[0]) is None
    assert interval(before.graph.inputs[0]) is None


def test_export_of_a_module_with_attention(tmp_path):
    import torch

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = torch.nn.Linear(16, 16)
            self.k = torch.nn.Linear(16, 16)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            def heads(t: torch.Tensor) -> torch.Tensor:
                return t.view(2, 6, 2, 8).transpose(1, 2)

            k = heads(self.k(x))
            out = torch.nn.functional.scaled_dot_product_attention(
                heads(self.q(x)), k, k, attn_mask=mask[:, None, None, :]
            )
            return out.transpose(1, 2).reshape(2, 6, 16)

    torch.manual_seed(0)
    args = (torch.randn(2, 6, 16), torch.ones(2, 6, dtype=torch.bool))
    with torch.no_grad():
        exported = torch.onnx.export(
            Block().eval(), args, dynamo=True, verbose=False, optimize=False
        )
    assert exported is not None
    before = Program.from_onnx(exported.model)
    after, [patch] = apply_all(Simplify(), before)
    assert not {"IsNaN", "Shape", "Identity", "Expand"} & set(op_types(after))
    survivors = {n.name for n in after.graph} & {n.name for n in before.graph}
    assert "node_scaled_dot_product_attention" in survivors
    inputs = random_inputs(before)
    assert_close(run_onnx(after, inputs), run_onnx(before, inputs), 1e-5)
    assert patch.before is before
    assert left_alone(after)


NUMBERS = """float half = {0.5}, float one = {1.0}, float two = {2.0}, float three = {3.0},
 float c = {0.044715}, float root = {0.7978845608028654}, float down = {0.70710678},
 float sqrt2 = {1.4142135}, float other = {0.05}"""
BELLS = {
    "tanh": """p = Pow (x, three) q = Mul (c, p) i = Add (x, q) j = Mul (root, i)
        b = Tanh (j)""",
    "tanh of products": """s = Mul (x, x) p = Mul (s, x) q = Mul (p, c) i = Add (q, x)
        j = Mul (i, root) b = Tanh (j)""",
    "tanh of a factor": """s = Pow (x, two) q = Mul (s, c) i = Add (q, one) r = Mul (root, x)
        j = Mul (r, i) b = Tanh (j)""",
    "erf of a product": "j = Mul (down, x) b = Erf (j)",
    "erf of a quotient": "j = Div (x, sqrt2) b = Erf (j)",
}
ENDS = (
    "h = Mul (half, x) u = Add (one, b) y = Mul (h, u)",
    "u = Add (b, one) h = Mul (x, u) y = Mul (h, half)",
    "u = Add (b, one) h = Mul (u, half) y = Mul (h, x)",
    "h = Div (x, two) k = Mul (h, b) y = Add (h, k)",
)


def spelled(body: str, shape: str = "2, 3") -> str:
    return (
        f"agraph (float[{shape}] z) => (float[{shape}] o) <{NUMBERS}> "
        f"{{ x = Mul (z, three) {body} o = Sin (y) }}"
    )


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("bell", BELLS)
def test_gelu_in_any_spelling_is_the_operator(bell: str, end: str):
    after = simplified(spelled(f"{BELLS[bell]} {end}"))
    assert op_types(after) == ["Mul", "Gelu", "Sin"]
    (gelu,) = [n for n in after.graph if n.op_type == "Gelu"]
    form = "tanh" if bell.startswith("tanh") else "none"
    assert gelu.attributes["approximate"].as_string() == form


@pytest.mark.parametrize(
    "body",
    [
        BELLS["tanh"].replace("(c, p)", "(other, p)") + ENDS[0],
        BELLS["tanh"].replace("three", "two") + ENDS[0],
        BELLS["erf of a product"].replace("down", "half") + ENDS[0],
        BELLS["erf of a product"] + ENDS[0].replace("(half, x)", "(half, z)"),
        BELLS["erf of a product"] + ENDS[0].replace("(one, b)", "(two, b)"),
        BELLS["erf of a product"] + ENDS[0].replace("y = ", "v = ") + "y = Mul (v, b)",
    ],
)
def test_what_is_nearly_gelu_stays(body: str):
    assert "Gelu" not in op_types(simplified(spelled(body)))


@pytest.mark.parametrize(("opset", "dtype"), [(18, "float"), (20, "double")])
def test_gelu_of_an_older_opset_or_another_type_stays(opset: int, dtype: str):
    before = program(spelled(BELLS["erf of a product"] + ENDS[0]).replace("float", dtype))
    before.graph.opset_imports[""] = opset
    (bell,) = [n for n in before.graph if n.op_type == "Erf"]
    as_gelu(before, bell)
    assert "Gelu" not in op_types(before)
