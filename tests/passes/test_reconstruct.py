"""reconstruct: units from the graph, rounding that is learnt, and that it can be interrupted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch

from optcompiler.damage import Judge
from optcompiler.errors import Declined, InputError
from optcompiler.program import Program, constant
from optcompiler.rewriting import PassContext
from optcompiler_passes import _reconstruction, _teaching
from optcompiler_passes._boundaries import boundaries
from optcompiler_passes._reconstruction import rectified, rounding_of
from optcompiler_passes._units import units_of
from optcompiler_passes.insert_qdq import InsertQdq
from optcompiler_passes.reconstruct import Reconstruct
from tests.support import INT8, apply_all, filled_program, make_context, op_types, proposals

FOUR = replace(INT8, precisions=frozenset({"fp32", "w4a8", "w4a4"}))

NET = """<ir_version: 10, opset_import: ["": 21]>
g (float[n,3,8,8] x) => (float[n,10] y)
<float[8,3,3,3] w1, float[8] b1, float[16,8,1,1] w2, float[16,1,3,3] w3, float[8,16,1,1] w4,
 float[8,8,3,3] w5, float[8] b5, float[8,10] w6, float[10] b6, int64[2] flat = {0, 8},
 float low = {0}, float high = {6}> {
  [conv1] c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
  [relu1] r1 = Relu(c1)
  [expand] e = Conv(r1, w2)
  [clip1] e6 = Clip(e, low, high)
  [depthwise] d = Conv<pads=[1,1,1,1], group=16>(e6, w3)
  [clip2] d6 = Clip(d, low, high)
  [project] p = Conv(d6, w4)
  [add] a = Add(p, r1)
  [conv5] c5 = Conv<pads=[1,1,1,1]>(a, w5, b5)
  [relu5] r5 = Relu(c5)
  [pool] g = GlobalAveragePool(r5)
  [flatten] f = Reshape(g, flat)
  [fc] y = Gemm(f, w6, b6)
}"""


def data(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((16, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


@pytest.fixture
def case() -> tuple[Program, Program, PassContext]:
    teacher = filled_program(NET)
    context = make_context(
        teacher, calibration=data(4, 1), holdout=data(1, 2), capabilities=FOUR,
        precisions=frozenset({"fp32", "w4a8"}),
    )  # fmt: skip
    student, _ = apply_all(InsertQdq(), teacher, context)
    return teacher, student, context


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTCOMPILER_CACHE", str(tmp_path / "cache"))


QUICK = Reconstruct(steps=40, batch_size=16)


def test_units_end_where_every_path_passes_and_hold_a_few_weights(case):
    teacher, student, _ = case
    units = units_of(student, teacher, 3)
    assert [u.ends for u in units] == [("r1",), ("a",), ("y",)]
    assert [p.name for p in units[1].student.inputs] == ["r1"]
    assert op_types(units[1].teacher) == ["Conv", "Clip", "Conv", "Clip", "Conv", "Add"]
    single = units_of(student, teacher, 1)
    assert [u.ends for u in single] == [("r1",), ("a",), ("f",), ("y",)]


def test_four_bit_weights_come_much_nearer_and_lie_on_levels(case):
    teacher, student, context = case
    after, [patch] = apply_all(replace(QUICK, steps=120), student, context)
    assert (patch.added, patch.removed) == ((), ())
    fresh = Judge(teacher, data(4, 77), context.ops, "nmse")
    assert fresh.damage(after) < 0.6 * fresh.damage(student)
    for name in ("w1", "w3", "w4"):
        weight, scale = (constant(after.value(n)) for n in (name, f"{name}_scale"))
        levels = weight / scale.reshape(-1, 1, 1, 1)
        assert np.abs(levels - np.rint(levels)).max() < 1e-4
        assert (levels.min() >= -8.001, levels.max() <= 7.001) == (True, True)
        nearest = np.rint(constant(student.value(name)) / scale.reshape(-1, 1, 1, 1))
        assert np.abs(levels - nearest).max() <= 1.001
    assert op_types(after) == op_types(student)


def test_eight_bits_learn_scales_and_biases_but_no_rounding(case):
    teacher, _, context = case
    context = replace(context, precisions=frozenset({"fp32", "int8"}))
    student, _ = apply_all(InsertQdq(observer="minmax"), teacher, context)
    for name in ("r1_scale", "e6_scale"):
        value = student.value(name)
        student.set_weight(value, (constant(value) * np.float32(0.7)).astype(np.float32))
    after, [patch] = apply_all(QUICK, student, context)
    changed = set(patch.changed_weights)
    assert "r1_scale" in changed
    assert not changed & {"w1", "w2", "w3", "w4", "w5", "w6"}
    judge = Judge(teacher, context.holdout, context.ops, "nmse")
    assert judge.damage(after) < 0.5 * judge.damage(student)
    _, [patch] = apply_all(replace(QUICK, rounding="all"), student, context)
    assert "w2" in patch.changed_weights


def test_same_seed_same_bytes(case):
    _, student, context = case
    options = replace(QUICK, steps=10)
    one, _ = apply_all(options, student, context)
    torch.manual_seed(5)
    two, _ = apply_all(options, student, context)
    assert one.content_hash() == two.content_hash()
    other, _ = apply_all(options, student, replace(context, seed=3))
    assert other.content_hash() != one.content_hash()


def test_it_goes_on_after_the_units_that_were_done(case, monkeypatch, tmp_path):
    _, student, context = case
    options = replace(QUICK, steps=10)
    whole, _ = apply_all(options, student, context)
    monkeypatch.setenv("OPTCOMPILER_CACHE", str(tmp_path / "other"))
    real, calls = _reconstruction.learn, []

    def interrupted(*arguments, **named):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments, **named)

    monkeypatch.setattr(_teaching, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_all(options, student, context)
    again = []
    monkeypatch.setattr(_teaching, "learn", lambda *a, **k: (again.append(1), real(*a, **k))[1])
    resumed, _ = apply_all(options, student, context)
    assert len(again) == 1
    assert resumed.content_hash() == whole.content_hash()


def test_an_input_beside_the_boundary_reaches_every_unit():
    teacher = filled_program(
        """<ir_version: 10, opset_import: ["": 21]>
        g (float[n,4,6] x, float[n,4,1] mask) => (float[n,4,6] y)
        <float[6,6] w, float[6,6] v> {
          m1 = Mul(x, mask) h = MatMul(m1, w) r = Relu(h)
          k = MatMul(r, v) m2 = Mul(k, mask) y = Tanh(m2)
        }"""
    )
    rng = np.random.default_rng(0)
    feeds = [
        {"x": rng.standard_normal((8, 4, 6)).astype(np.float32),
         "mask": rng.integers(0, 2, (8, 4, 1)).astype(np.float32)} for _ in range(5)
    ]  # fmt: skip
    context = make_context(
        teacher, calibration=feeds[:4], holdout=feeds[4:], capabilities=FOUR,
        precisions=frozenset({"fp32", "w4a8"}),
    )  # fmt: skip
    student, _ = apply_all(InsertQdq(), teacher, context)
    units = units_of(student, teacher, 1)
    assert [sorted(p.name for p in u.student.inputs) for u in units][1] == ["mask", "r"]
    after, _ = apply_all(replace(QUICK, unit_weights=1), student, context)
    judge = Judge(teacher, feeds, context.ops, "nmse")
    assert judge.damage(after) < 0.8 * judge.damage(student)


def test_samples_of_other_shapes_are_left_out():
    teacher = filled_program(
        """<ir_version: 10, opset_import: ["": 21]>
        g (float[n,t,3] x) => (float[n,t,5] y) <float[3,8] w, float[8,5] v>
        { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"""
    )
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((8, t, 3)).astype(np.float32)} for t in (3, 5, 3, 3)]
    context = make_context(
        teacher, calibration=feeds, holdout=[], capabilities=FOUR,
        precisions=frozenset({"fp32", "w4a8"}),
    )  # fmt: skip
    student, _ = apply_all(InsertQdq(), teacher, context)
    after, _ = apply_all(QUICK, student, context)
    judge = Judge(teacher, feeds, context.ops, "nmse")
    assert judge.damage(after) < judge.damage(student)


def test_rounding_begins_at_the_weight_itself(case):
    _, student, _ = case
    rounding = rounding_of(student.node("w5_quantize"))
    assert rounding is not None
    weight = torch.from_numpy(np.array(constant(student.value("w5"))))
    inside = (weight / rounding.scale).abs() < 7
    soft = rounding.soft(rounding.start)
    assert torch.allclose(soft[inside], weight[inside], atol=1e-3)
    assert rectified(torch.tensor([-20.0, 20.0])).tolist() == [0.0, 1.0]
    assert bool((rounding.hard(rounding.start) - weight)[inside].abs().max() <= 0.51 * float(
        rounding.scale.max()))  # fmt: skip


def test_reasons(case):
    teacher, student, context = case

    def reason(program: Program, **changes) -> str:
        candidates, [decline] = proposals(QUICK, program, replace(context, **changes))
        assert not candidates
        return decline.reason

    assert reason(student, calibration=()) == (
        "no calibration data to learn from; pass calibration=batches"
    )
    assert reason(teacher.clone()) == "nothing is quantised"
    options = replace(QUICK, steps=1, learn=("biases",), learning_rate=1e-30)
    [candidate], _ = proposals(options, student, context)
    with pytest.raises(Declined, match="no block came nearer"):
        candidate.rewrite(student.clone())


def test_options_are_checked():
    for options, words in (
        ({"steps": 0}, "steps=0"), ({"learn": ("gamma",)}, "'gamma'"), ({"drop": 1.0}, "drop=1.0"),
        ({"rounding": "up"}, "rounding='up'"), ({"weighting": "all"}, "weighting='all'"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            Reconstruct(**options)


def test_sizes_that_inference_names_anew_are_no_difference():
    """A Reshape to -1 along the batch gets a size of another name in each program."""
    teacher = filled_program(
        """<ir_version: 10, opset_import: ["": 21]>
        g (float[n,4,6] x) => (float[n,4,6] y)
        <float[6,6] w, float[6,6] v, int64[3] flat = {-1, 4, 6}> {
          h = MatMul(x, w) r = Relu(h) f = Reshape(r, flat) k = MatMul(f, v) y = Tanh(k)
        }"""
    )
    student = teacher.clone()
    for program, size in ((teacher, "unk__2"), (student, "unk__7")):
        for name in ("f", "k"):
            value = program.value(name)
            value.shape = ir.Shape([size, 4, 6])
    assert boundaries(student, teacher) == ["h", "r", "f", "k"]
    student.value("k").shape = ir.Shape(["unk__7", 4, 5])
    assert boundaries(student, teacher) == ["h", "r", "f"]
