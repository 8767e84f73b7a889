"""unify-caps: which bounds per channel become one, and what keeps others from it."""

from __future__ import annotations

import numpy as np
import pytest

from optcompiler.program import Program, constant
from optcompiler_passes._rescaling import is_rescaled
from optcompiler_passes.unify_caps import UnifyCaps
from tests.passes.test_equalize import HEAD, capped, case, damage, uneven
from tests.support import apply_all, filled_program, make_context, op_types, proposals


def reasons(program: Program) -> dict[str, str]:
    _, declines = proposals(UnifyCaps(), program, make_context(program))
    return {d.site: d.reason for d in declines}


@pytest.mark.parametrize("swap", [False, True])
def test_caps_become_one_clip_under_their_own_names(swap):
    factors = (uneven(1), uneven(2))
    program = capped(factors[::-1] if swap else factors)
    [candidate], declines = proposals(UnifyCaps(), program)
    assert candidate.nodes == ("cap1", "cap2")
    assert not declines
    after, [patch] = apply_all(UnifyCaps(), program)
    assert set(patch.removed) == {"relu1", "relu2"}
    assert op_types(after).count("Clip") == 2
    for name in ("cap1", "cap2"):
        node = after.node(name)
        assert node.outputs[0].name == f"m{name[-1]}"
        assert constant(node.inputs[1]) == 0
        assert node.inputs[0].producer().op_type == "Conv"
        assert is_rescaled(node.outputs[0])
    assert not is_rescaled(after.value("y3"))


def test_it_undoes_a_rescaling_up_to_one_factor_for_all():
    even, uneven_ = capped(), capped((uneven(1), uneven(2)))
    after, _ = apply_all(UnifyCaps(), uneven_)
    ratio = constant(after.value("w1")) / constant(even.value("w1"))
    np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-4)


def test_equal_caps_need_no_scaling():
    program = capped()
    after, [patch] = apply_all(UnifyCaps(), program)
    assert op_types(after).count("Clip") == 2
    kept = program.weights().keys() & after.weights().keys()
    assert not [n for n in patch.changed_weights if n in kept]
    assert not proposals(UnifyCaps(), after)[0]


def test_max_with_zero_is_a_relu():
    text = """g (float[2,3,4,4] x) => (float[2,5,4,4] y)
    <float[6,3,1,1] a, float[6,1,1] caps, float[5,6,1,1] b, float zero = {0}> {
      [a] s = Conv(x, a)
      [max] r = Max(zero, s)
      [min] m = Min(caps, r)
      [b] y = Conv(m, b)
    }"""
    program = filled_program(HEAD + text, caps=uneven(3, 6).reshape(6, 1, 1))
    after, _ = apply_all(UnifyCaps(), program)
    assert op_types(after) == ["Conv", "Clip", "Conv"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[r] r = Relu(x) [m] m = Min(r, caps) [b] y = Conv(m, b)",
         "its channels do not come from weights"),
        ("[a] s = Conv(x, a) [r] r = Relu(s) [m] m = Min(r, caps) [e] e = Exp(m) "
         "[b] y = Conv(e, b)",
         "axis 1 of 'm' is fixed by Exp 'e'"),
        ("[a] s = Conv(x, a) [r] r = Relu(s) [m] m = Min(r, caps) [r2] q = Relu(m) "
         "[m2] n = Min(q, others) [b] y = Conv(n, b)",
         "caps of the same channels have other ratios elsewhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_unified_is_declined_with_the_reason(text, reason):
    head = """g (float[2,6,4,4] x) => (float[2,5,4,4] y)
    <float[6,6,1,1] a, float[6,1,1] caps, float[6,1,1] others, float[5,6,1,1] b> {"""
    caps = {"caps": uneven(3, 6).reshape(6, 1, 1), "others": uneven(4, 6).reshape(6, 1, 1)}
    program = filled_program(f"{HEAD}{head} {text} }}", **caps)
    assert not proposals(UnifyCaps(), program)[0]
    assert reasons(program)["m"] == reason


def test_caps_far_apart_are_left():
    program = capped((np.geomspace(1e-3, 1e3, 16), np.ones(16)))
    assert reasons(program)["cap1"] == "its caps differ by more than a factor of 65536"
    after, _ = apply_all(UnifyCaps(), program)
    assert op_types(after).count("Clip") == 1


def test_quantised_it_loses_what_the_even_network_loses():
    expected = damage(*case(capped()))
    twin = capped((uneven(1), uneven(2)))
    assert damage(*case(apply_all(UnifyCaps(), twin)[0])) < 1.5 * expected
    assert damage(*case(twin)) > 20 * expected
