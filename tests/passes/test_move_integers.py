from __future__ import annotations

from optcompiler.program import Program
from optcompiler_passes.move_integers import MoveIntegers
from tests.support import apply_all, op_types, proposals


def program(nodes: str, outputs: str = "uint8[1, 8, 4, 4] y") -> Program:
    return Program.from_text(
        f"""<ir_version: 10, opset_import: ["": 20]>
agraph (uint8[1, 4, 4, 8] x, uint8[1, 4, 4, 8] x2) => ({outputs})
<float s = {{0.1}}, uint8 z = {{7}}, float s2 = {{0.2}}, int64[3] flat = {{4, 4, 8}},
 int64[4] full = {{1, 4, 4, 8}}, float same = {{0.1}}> {{
  {nodes}
}}
"""
    )


CHAIN = """
  r = DequantizeLinear (x, s, z)
  [reshape] a = Reshape (r, flat)
  aq = QuantizeLinear (a, s, z)
  ar = DequantizeLinear (aq, s, z)
  [back] b = Reshape (ar, full)
  bq = QuantizeLinear (b, same, z)
  br = DequantizeLinear (bq, s, z)
  [pool] p = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (br)
  pq = QuantizeLinear (p, s, z)
  pr = DequantizeLinear (pq, s, z)
  [transpose] t = Transpose <perm = [0, 3, 1, 2]> (pr)
  y = QuantizeLinear (t, s, z)
"""


def test_a_chain_of_moves_becomes_integer():
    before = program(CHAIN)
    [candidate], declines = proposals(MoveIntegers(), before)
    assert candidate.nodes == ("reshape", "back", "pool", "transpose")
    assert candidate.exact
    assert not declines
    after, _ = apply_all(MoveIntegers(), before)
    assert op_types(after) == ["Reshape", "Reshape", "MaxPool", "Transpose"]
    assert [n.outputs[0].name for n in after.graph] == ["aq", "bq", "pq", "y"]
    assert all(n.outputs[0].dtype is not None for n in after.graph)
    assert {n.outputs[0].dtype.name for n in after.graph if n.outputs[0].dtype} == {"UINT8"}


def test_concat_and_several_readers():
    after, _ = apply_all(
        MoveIntegers(),
        program(
            """r = DequantizeLinear (x, s, z) r2 = DequantizeLinear (x2, s, z)
  [concat] c = Concat <axis = 1> (r, r2)
  y = QuantizeLinear (c, s, z)
  k = QuantizeLinear (c, s, z)
  kr = DequantizeLinear (k, s, z)
  w = Relu (kr)""",
            "uint8[1, 8, 4, 8] y, float[1, 8, 4, 8] w",
        ),
    )
    assert op_types(after) == ["Concat", "DequantizeLinear", "Relu"]


def test_different_scales_are_declined_with_both():
    candidates, [decline] = proposals(
        MoveIntegers(),
        program(
            """r = DequantizeLinear (x, s, z)
  [transpose] t = Transpose <perm = [0, 3, 1, 2]> (r)
  y = QuantizeLinear (t, s2, z)"""
        ),
    )
    assert not candidates
    assert decline.reason == (
        "its pairs differ: uint8 scale 0.1 zero point 7; uint8 scale 0.2 zero point 7."
    )


def test_a_float_reader_leaves_the_site_alone():
    candidates, declines = proposals(
        MoveIntegers(),
        program(
            """r = DequantizeLinear (x, s, z)
  t = Transpose <perm = [0, 3, 1, 2]> (r)
  y = QuantizeLinear (t, s, z)
  w = Relu (t)""",
            "uint8[1, 8, 4, 4] y, float[1, 8, 4, 4] w",
        ),
    )
    assert (candidates, declines) == ([], [])
