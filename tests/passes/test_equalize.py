"""equalize: which channels may be scaled, that the float function stays, and what is won back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from optcompiler.channels import unshare_vectors
from optcompiler.damage import Judge, run_batches, typical_error
from optcompiler.errors import Declined, InputError
from optcompiler.observers import MinMaxObserver
from optcompiler.program import Program, constant
from optcompiler.rewriting import PassContext
from optcompiler_passes._boundaries import boundaries
from optcompiler_passes._equalisation import Search
from optcompiler_passes._homogeneous import Scaling
from optcompiler_passes._rescaling import (
    as_in_teacher,
    is_rescaled,
    is_symmetric,
    refresh_scales,
    without_pairs,
)
from optcompiler_passes.equalize import Equalize
from optcompiler_passes.insert_qdq import InsertQdq
from optcompiler_passes.quantize_weights import QuantizeWeights
from tests.support import (
    INT8,
    apply_all,
    filled_program,
    make_context,
    proposals,
    random_inputs,
    run_onnx,
)

HEAD = '<ir_version: 10, opset_import: ["": 20]> '

CAPPED = """g (float[n,3,12,12] x) => (float[n,5] y)
<float[16,3,3,3] w1, float[16] b1, float[16,1,1] c1, float[16,1,3,3] w2, float[16] b2,
 float[1,16,1,1] c2, float[8,16,1,1] w3, float[8] b3, float[8,5] w4, float[5] b4> {
  [conv1] y1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
  [relu1] r1 = Relu(y1)
  [cap1] m1 = Min(r1, c1)
  [conv2] y2 = Conv<pads=[1,1,1,1], group=16>(m1, w2, b2)
  [relu2] r2 = Relu(y2)
  [cap2] m2 = Min(c2, r2)
  [conv3] y3 = Conv(m2, w3, b3)
  [relu3] r3 = Relu(y3)
  [pool] p3 = GlobalAveragePool(r3)
  [flat] f3 = Flatten(p3)
  [fc] y = Gemm(f3, w4, b4)
}"""


def uneven(seed: int, count: int = 16) -> np.ndarray:
    return 64 ** np.random.default_rng(seed).uniform(-1, 1, count)


def capped(factors: tuple[np.ndarray, np.ndarray] = (np.ones(16), np.ones(16))) -> Program:
    """The net above with caps at 2, its channels multiplied by factors and divided again."""
    even = filled_program(HEAD + CAPPED)
    weights = {n: np.array(t.numpy(), np.float64) for n, t in even.weights().items()}
    for index, factor in zip((1, 2), factors, strict=True):
        weights[f"w{index}"] *= factor.reshape(-1, 1, 1, 1)
        weights[f"b{index}"] *= factor
        weights[f"c{index}"] = (2 * factor).reshape(weights[f"c{index}"].shape)
    weights["w2"] /= factors[0].reshape(-1, 1, 1, 1)
    weights["w3"] /= factors[1].reshape(1, -1, 1, 1)
    return filled_program(HEAD + CAPPED, **weights)


def batches(program: Program, count: int = 4, rows: int = 16) -> list[dict[str, np.ndarray]]:
    return [random_inputs(program, seed, dynamic=rows) for seed in range(count)]


def case(program: Program, **changes) -> tuple[Program, PassContext]:
    """The program quantised, and its context."""
    feeds = batches(program, 5)
    context = make_context(program, calibration=feeds[:4], holdout=feeds[4:], **changes)
    return apply_all(InsertQdq(), program, context)[0], context


def float_error(one: Program, other: Program, context: PassContext) -> float:
    """How far two programs without their pairs are from each other."""
    pair = [run_batches(without_pairs(p), context.holdout, context.ops) for p in (one, other)]
    return typical_error(*pair)


def damage(program: Program, context: PassContext) -> float:
    return Judge(context.teacher, batches(program, 2, 33), context.ops).damage(program)


def reasons(program: Program, context: PassContext, pass_: Equalize | None = None) -> list[str]:
    return [d.reason for d in proposals(pass_ or Equalize(), program, context)[1]]


@pytest.mark.parametrize("swap", [False, True])
def test_a_rescaled_twin_comes_back(swap):
    factors = (uneven(1), uneven(2))
    expected = damage(*case(capped()))
    student, context = case(capped(factors[::-1] if swap else factors))
    assert damage(student, context) > 20 * expected
    after, [patch] = apply_all(Equalize(), student, context)
    assert damage(after, context) < 4 * expected
    assert float_error(student, after, context) < 1e-5
    assert not patch.added
    assert not patch.removed


def test_the_same_twice():
    student, context = case(capped((uneven(1), uneven(2))))
    one, other = (apply_all(Equalize(), student, context)[0] for _ in range(2))
    assert one.content_hash() == other.content_hash()


SMOOTHED = """g (float[n,10,16] x) => (float[n,10,8] y)
<float[16] gamma, float[16] beta, float[16,24] wq, float[24] bq, float[16,12] wk, float[24,8] wo,
 float[12,8] wp> {
  [norm] h = LayerNormalization<axis=-1>(x, gamma, beta)
  [q] q0 = MatMul(h, wq)
  [qb] q1 = Add(q0, bq)
  [qr] q2 = Tanh(q1)
  [k] k0 = MatMul(h, wk)
  [kr] k2 = Tanh(k0)
  [o] o0 = MatMul(q2, wo)
  [p] p0 = MatMul(k2, wp)
  [sum] y = Add(o0, p0)
}"""


def outlier() -> Program:
    """Two channels of the norm are 60 times the others, and their weights small."""
    even = filled_program(HEAD + SMOOTHED)
    weights = {n: np.array(t.numpy()) for n, t in even.weights().items()}
    factor = np.where(np.isin(np.arange(16), (3, 11)), 60.0, 1.0)
    weights["gamma"] = (1 + 0.1 * weights["gamma"]) * factor
    weights["beta"] = weights["beta"] * factor
    for name in ("wq", "wk"):
        weights[name] = weights[name] / factor[:, None]
    return filled_program(HEAD + SMOOTHED, **weights)


def test_outliers_of_a_layer_norm_move_into_all_that_reads_it():
    student, context = case(outlier())
    after, [patch] = apply_all(Equalize(), student, context)
    assert {"gamma", "beta", "wq", "wk"} <= set(patch.changed_weights)
    assert not {"wo", "wp", "bq"} & set(patch.changed_weights)
    assert damage(after, context) < 0.1 * damage(student, context)
    assert float_error(student, after, context) < 1e-5
    assert np.ptp(np.log2(np.abs(constant(after.value("gamma"))))) < 4


def test_without_quantised_activations_it_is_a_search_for_weights():
    """AWQ: weights that large activations meet get more of the levels of their block."""
    text = """g (float[n,64] x) => (float[n,16] y)
    <float[64] gamma, float[64] beta, float[64,64] w, float[64,16] v> {
      [norm] h = LayerNormalization<axis=-1>(x, gamma, beta)
      [first] a = MatMul(h, w)
      [act] t = Tanh(a)
      [second] y = MatMul(t, v)
    }"""
    gamma = np.where(np.arange(64) % 16 == 0, 30.0, 1.0)
    program = filled_program(HEAD + text, gamma=gamma)
    four = replace(
        INT8, precisions=frozenset({"fp32", "int4"}), stored_weight_ops=frozenset({"MatMul"})
    )
    feeds = batches(program, 5)
    context = make_context(
        program, capabilities=four, precisions=four.precisions,
        calibration=feeds[:4], holdout=feeds[4:],
    )  # fmt: skip
    student, _ = apply_all(QuantizeWeights(least_weights=1), program, context)
    after, _ = apply_all(Equalize(), student, context)
    assert damage(after, context) < 0.7 * damage(student, context)
    assert float_error(student, after, context) < 1e-5


GRAPHS = {
    "residual": """g (float[2,3,8,8] x) => (float[2,4,8,8] y)
    <float[6,3,1,1] a, float[6] ab, float[6,6,3,3] b, float[4,6,1,1] c> {
      [a] s0 = Conv(x, a, ab)
      [r0] t0 = Relu(s0)
      [b] s1 = Conv<pads=[1,1,1,1]>(t0, b)
      [add] s2 = Add(s1, t0)
      [r1] t1 = LeakyRelu(s2)
      [c] y = Conv(t1, c)
    }""",
    "concat": """g (float[2,3,8,8] x) => (float[2,4,1,1] y)
    <float[6,3,1,1] a, float[2,3,1,1] b, float[4,8,1,1] c, int64[2] parts = {4,4},
     float[4,4,1,1] d> {
      [a] s0 = Conv(x, a)
      [b] s1 = Conv(x, b)
      [cat] s2 = Concat<axis=1>(s0, s1)
      [split] p0, p1 = Split<axis=1>(s2, parts)
      [r] p2 = Relu(p0)
      [cat2] p3 = Concat<axis=1>(p2, p1)
      [pool] t0 = GlobalAveragePool(p3)
      [c] y0 = Conv(t0, c)
      [pool1] t1 = GlobalAveragePool(p1)
      [d] y1 = Conv(t1, d)
      [sum] y = Add(y0, y1)
    }""",
    "flatten": """g (float[2,3,8,8] x) => (float[2,7] y)
    <float[6,3,3,3] a, float[6] slope_, int64[2] flat = {2,96}, float[7,96] c, float[7] cb> {
      [a] s0 = Conv<strides=[2,2], pads=[1,1,1,1]>(x, a)
      [pad] s1 = Pad<mode="constant">(s0, where)
      [r] s2 = Relu(s1)
      [reshape] t = Reshape(s2, flat)
      [c] y = Gemm<transB=1, beta=0.5>(t, c, cb)
    }""".replace("float[6] slope_", "int64[8] where = {0,0,0,0,0,0,0,0}"),
    "transposed": """g (float[2,4,6,6] x) => (float[2,3,12,12] y)
    <float[4,3,2,2] a, float[6] ab, float[6,3,1,1] c, float[6,1,3,3] d> {
      [a] s0 = ConvTranspose<group=2, strides=[2,2]>(x, a, ab)
      [r] s1 = Relu(s0)
      [d] s2 = Conv<group=6, pads=[1,1,1,1]>(s1, d)
      [r2] s3 = Relu(s2)
      [c] y = ConvTranspose(s3, c)
    }""",
    "grouped": """g (float[2,4,6,6] x) => (float[2,2,6,6] y)
    <float[6,2,1,1] a, float[4,3,1,1] b, float[2,4,1,1] c, float[4,1,1] bias, float zero = {0}> {
      [a] s0 = Conv<group=2>(x, a)
      [r] s1 = Max(s0, zero)
      [b] s2 = Conv<group=2>(s1, b)
      [bias] s3 = Add(s2, bias)
      [pool] s4 = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(s3)
      [c] y = Conv(s4, c)
    }""",
    "decomposed norm": """g (float[2,5,8] x) => (float[2,5,4] y)
    <float[8] gamma, float[8] beta, float[8,6] a, float[6] ab, float[6,4] b> {
      [mean] m = ReduceMean<keepdims=1>(x, last)
      [sub] d = Sub(x, m)
      [mul] n = Mul(d, gamma)
      [shift] h = Add(n, beta)
      [a] s0 = MatMul(h, a)
      [ab] s1 = Add(s0, ab)
      [turn] s2 = Transpose<perm=[0,2,1]>(s1)
      [r] s3 = Relu(s2)
      [back] s4 = Transpose<perm=[0,2,1]>(s3)
      [b] y = MatMul(s4, b)
    }""".replace("float[8] gamma", "int64[1] last = {-1}, float[8] gamma"),
}  # fmt: skip
COUNTS = {
    "residual": 1, "concat": 3, "flatten": 1, "transposed": 2, "grouped": 2, "decomposed norm": 2
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_any_factors_leave_the_float_function_alone(name):
    program = filled_program(HEAD + GRAPHS[name])
    context = make_context(program)
    scaled = program.clone()
    unshare_vectors(scaled)
    scaling = Scaling(scaled, context.ops)
    free = [g for g in scaling.groups if not g.pinned]
    assert len(free) == COUNTS[name], {g.name: g.pinned for g in scaling.groups}
    rng = np.random.default_rng(0)
    for group in free:
        scaling.scale(group, 8 ** rng.uniform(-1, 1, group.channels))
        scaled.verify(like=program)
        inputs = random_inputs(program, 5)
        for got, expected in zip(run_onnx(scaled, inputs), run_onnx(program, inputs), strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    changed = {n for n, t in scaled.weights().items() if t is not program.weights()[n]}
    assert changed


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[act] r = Clip(s, low, high)", "axis 1 of 's' is fixed by Clip 'act'"),
        ("[act] r = Sigmoid(s)", "axis 1 of 's' is fixed by Sigmoid 'act'"),
        ("[act] r = Add(s, high)", "axis 1 of 's' is fixed by Add 'act'"),
        ("[act] r = Min(s, high)", "axis 1 of 's' is fixed by Min 'act'"),
        ("[act] r = Mul(s, s)", "axis 1 of 's' is fixed by Mul 'act'"),
        ("[act] r = Softmax<axis=1>(s)", "axis 1 of 's' is fixed by Softmax 'act'"),
    ],
)
def test_what_is_not_homogeneous_is_declined_by_name(line, reason):
    text = f"""g (float[2,3,8,8] x) => (float[2,4,8,8] y)
    <float[6,3,1,1] a, float[4,6,1,1] b, float[4,6,1,1] c, float low = {{0}}, float high = {{6}}> {{
      [a] s0 = Conv(x, a)
      [relu] s = Relu(s0)
      [b] y0 = Conv(s, b)
      {line}
      [c] y1 = Conv(r, c)
      [sum] y = Add(y0, y1)
    }}"""
    program = filled_program(HEAD + text)
    scaling = Scaling(program, make_context(program).ops)
    assert [g.pinned for g in scaling.groups if g.name == "a"] == [reason]


def test_shared_weights_are_left_alone():
    text = """g (float[2,6] x) => (float[2,6] y) <float[6,6] w> {
      [a] s = MatMul(x, w)
      [r] t = Relu(s)
      [b] y = MatMul(t, w)
    }"""
    program = filled_program(HEAD + text)
    assert not Scaling(program, make_context(program).ops).groups


def test_what_cannot_be_done_is_said():
    student, context = case(capped())
    assert reasons(student, replace(context, calibration=[], holdout=[])) == [
        "no calibration data to measure on; pass calibration=batches"
    ]
    assert reasons(context.teacher, context) == ["nothing in it is quantised"]
    with pytest.raises(InputError, match=r"alpha 1.5 is not in \[0, 1\]"):
        Equalize(alphas=(1.5,))
    with pytest.raises(InputError, match="weight_observer='max'"):
        Equalize(weight_observer="max")
    with pytest.raises(InputError, match="equalize: observer 'sharp' is not known"):
        proposals(Equalize(observer="sharp"), student, context)


def test_scaled_values_are_no_boundaries_and_can_be_compared():
    student, context = case(capped((uneven(1), uneven(2))))
    after, _ = apply_all(Equalize(), student, context)
    assert "m1" in boundaries(student, context.teacher)
    assert not {"y1", "m1", "y2", "m2"} & set(boundaries(after, context.teacher))
    value = after.value("m1")
    assert is_rescaled(value)
    assert not is_rescaled(after.value("y"))
    scaled = constant(after.value("b1"))
    np.testing.assert_allclose(
        as_in_teacher(value, 1, scaled), constant(context.teacher.value("b1")), rtol=1e-5
    )
    assert as_in_teacher(value, 0, scaled) is None


def test_scales_are_refreshed_where_asked():
    student, context = case(capped())
    assert not is_symmetric(student.node("m1_quantize"))
    moved = student.clone()
    for name in ("b1", "w3"):
        moved.set_weight(moved.value(name), 10 * constant(moved.value(name)))
    refresh_scales(moved, {"x"}, ["conv3"], context, MinMaxObserver)
    changed = {n for n, t in moved.weights().items() if t is not student.weights().get(n)}
    assert changed <= {"b1", "w3", "x_scale", "x_zero_point_1", "w3_scale"}
    np.testing.assert_allclose(
        constant(moved.value("w3_scale")), 10 * constant(student.value("w3_scale")), rtol=1e-5
    )
    seen = np.concatenate([b["x"] for b in (*context.calibration, *context.holdout)])
    width = 255 * constant(moved.value("x_scale"))
    np.testing.assert_allclose(width, seen.max() - seen.min(), rtol=1e-5)


def test_groups_that_gain_most_are_tried_alone_when_all_of_them_do_harm(monkeypatch):
    student, context = case(capped((uneven(1), uneven(2))))
    found = Search.chosen

    def with_harm(search: Search):
        group = next(g for g in search.groups if g.name == "conv3")
        return [*found(search), (group, 1e4 ** np.linspace(-1, 1, group.channels))]

    monkeypatch.setattr(Search, "chosen", with_harm)
    after, _ = apply_all(Equalize(), student, context)
    assert is_rescaled(after.value("m1")) or is_rescaled(after.value("m2"))
    assert not is_rescaled(after.value("r3"))
    monkeypatch.setattr(Search, "chosen", lambda search: with_harm(search)[-1:])
    with pytest.raises(Declined, match="the damage on data held out is"):
        apply_all(Equalize(), student, context)
