"""correct-bias: means come back layer by layer, and only biases change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from optcompiler.damage import Judge
from optcompiler.errors import Declined, InputError
from optcompiler.executor import interpret
from optcompiler.program import Program, constant
from optcompiler.rewriting import PassContext
from optcompiler_passes._qdq import pair_of
from optcompiler_passes.correct_bias import CorrectBias
from optcompiler_passes.equalize import Equalize
from optcompiler_passes.insert_qdq import InsertQdq
from tests.support import apply_all, filled_program, make_context, proposals, random_inputs

HEAD = '<ir_version: 10, opset_import: ["": 20]> '

NET = """g (float[n,3,10,10] x) => (float[n,4] y)
<float[8,3,3,3] w1, float[8] b1, float[6,8,3,3] w2, float[6] b2, float[6,5,2,2] w3, float[10] b3,
 float[10,7] w4, float[7] b4, float[4,7] w5, float[4] b5> {
  [conv1] y1 = Conv(x, w1, b1)
  [relu1] r1 = Relu(y1)
  [conv2] y2 = Conv<strides=[2,2]>(r1, w2, b2)
  [relu2] r2 = Relu(y2)
  [up] y3 = ConvTranspose<group=2, strides=[2,2]>(r2, w3, b3)
  [relu3] r3 = Relu(y3)
  [pool] p3 = GlobalAveragePool(r3)
  [flat] f3 = Flatten(p3)
  [mat] m4 = MatMul(f3, w4)
  [add] y4 = Add(b4, m4)
  [relu4] r4 = Relu(y4)
  [fc] y = Gemm<transB=1, beta=2.0>(r4, w5, b5)
}"""
BIASES = {"b1", "b2", "b3", "b4", "b5"}


def coarse(program: Program) -> Program:
    """Every weight scale made 8 times as wide: weights of 5 bits."""
    wide = program.clone()
    for name in ("w1", "w2", "w4", "w5"):
        scale = wide.value(f"{name}_scale")
        wide.set_weight(scale, 8 * constant(scale))
    return wide


@pytest.fixture(scope="module")
def case() -> tuple[Program, PassContext]:
    program = filled_program(HEAD + NET)
    feeds = [random_inputs(program, seed, dynamic=32) for seed in range(5)]
    context = make_context(program, calibration=feeds[:4], holdout=feeds[4:])
    return coarse(apply_all(InsertQdq(), program, context)[0]), context


def means(program: Program, context: PassContext, name: str) -> np.ndarray:
    rows = [interpret(program, b, [name], context.ops)[name] for b in context.calibration]
    return np.mean([r.numpy().mean((0, *range(2, r.ndim))) for r in rows], axis=0)


def test_means_come_back_and_biases_alone_change(case):
    student, context = case
    after, [patch] = apply_all(CorrectBias(), student, context)
    assert set(patch.changed_weights) == BIASES
    assert not patch.added
    for name in ("y1", "y2", "y3", "y4", "y"):
        expected = means(context.teacher, context, name)
        off = np.abs(means(student, context, name) - expected).max()
        assert np.abs(means(after, context, name) - expected).max() < 1e-3 * off
    fresh = [random_inputs(context.teacher, 77, dynamic=64)]
    judge = Judge(context.teacher, fresh, context.ops)
    assert judge.damage(after) < 0.7 * judge.damage(student)


def test_few_samples_are_the_first_batches(case):
    student, context = case
    one = apply_all(CorrectBias(samples=32), student, context)[0]
    other = apply_all(
        CorrectBias(), student, replace(context, calibration=context.calibration[:1])
    )[0]
    assert one.content_hash() == other.content_hash()
    assert one.content_hash() != apply_all(CorrectBias(), student, context)[0].content_hash()


def test_channels_that_were_scaled_are_compared_as_they_were(case):
    _, context = case
    factors = 64 ** np.random.default_rng(0).uniform(-1, 1, 8)
    weights = {n: np.array(t.numpy()) for n, t in context.teacher.weights().items()}
    weights["w1"] *= factors.reshape(-1, 1, 1, 1)
    weights["b1"] *= factors
    weights["w2"] /= factors.reshape(1, -1, 1, 1)
    teacher = filled_program(HEAD + NET, **weights)
    context = replace(context, teacher=teacher)
    student = apply_all(Equalize(), apply_all(InsertQdq(), teacher, context)[0], context)[0]
    student = coarse(student)
    after, _ = apply_all(CorrectBias(), student, context)
    ratio = constant(student.value("b1")) / constant(teacher.value("b1"))
    assert np.ptp(np.log2(np.abs(ratio))) > 4
    expected = means(teacher, context, "y1") * ratio
    off = np.abs(means(student, context, "y1") - expected).max()
    assert np.abs(means(after, context, "y1") - expected).max() < 1e-3 * off


def test_shared_biases_part(case):
    _, context = case
    text = """g (float[n,6] x) => (float[n,6] y)
    <float[6,6] v, float[6,6] w, float[6] b> {
      [one] s = Gemm(x, v, b)
      [r] t = Relu(s)
      [two] y = Gemm(t, w, b)
    }"""
    program = filled_program(HEAD + text)
    context = make_context(program)
    student = apply_all(InsertQdq(), program, context)[0]
    for name in ("v", "w"):
        scale = student.value(f"{name}_scale")
        student.set_weight(scale, 16 * constant(scale))
    after, _ = apply_all(CorrectBias(), student, context)
    assert after.node("one").inputs[2] is not after.node("two").inputs[2]


def test_scales_grow_where_the_bias_would_not_fit(case):
    """A channel whose weights are next to nothing: scale · 2**31 has to hold its bias."""
    _, context = case
    weights = {n: np.array(t.numpy()) for n, t in context.teacher.weights().items()}
    weights["w2"][3] *= 1e-12
    teacher = filled_program(HEAD + NET, **weights)
    context = replace(context, teacher=teacher)
    student = apply_all(InsertQdq(), teacher, context)[0]
    student.set_weight(student.value("b2"), constant(student.value("b2")) - np.float32(0.3))
    after, _ = apply_all(CorrectBias(), student, context)
    activation = constant(pair_of(after.value("r1")).scale)
    scales = constant(after.value("w2_scale"))
    assert (np.abs(constant(after.value("b2"))) <= scales * activation * 2.0**30 * 1.001).all()


def test_what_cannot_be_done_is_said(case):
    student, context = case

    def reasons(program: Program, **changes) -> list[tuple[str, str]]:
        found = proposals(CorrectBias(), program, replace(context, **changes))[1]
        return [(d.site, d.reason) for d in found]

    assert reasons(student, calibration=[]) == [
        ("program", "no calibration data to measure on; pass calibration=batches")
    ]
    assert reasons(context.teacher) == [("program", "nothing in it is quantised")]
    bare = student.clone()
    for name in ("conv1", "fc"):
        bare.node(name).resize_inputs(2)
    assert reasons(bare) == [("conv1", "it has no bias"), ("fc", "it has no bias")]
    other = filled_program(HEAD + NET.replace("y2", "z2"))
    assert reasons(student, teacher=other) == [("conv2", "the teacher has no 'y2' like it")]
    with pytest.raises(InputError, match="samples=0"):
        CorrectBias(samples=0)


def test_what_is_right_already_is_left(case):
    student, context = case
    after, _ = apply_all(CorrectBias(), student, context)
    with pytest.raises(Declined, match="the damage on data held out is"):
        apply_all(CorrectBias(), after, context)
