"""distill: what it learns, that it comes nearer to the teacher, and that it can be repeated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from optcompiler.choices import Choices
from optcompiler.damage import Judge
from optcompiler.errors import Declined, InputError
from optcompiler.program import Program, constant
from optcompiler.rewriting import PassContext
from optcompiler_passes._boundaries import batch_free, boundaries
from optcompiler_passes._clock import Clock
from optcompiler_passes._learnables import learnables
from optcompiler_passes.distill import Distill
from optcompiler_passes.insert_qdq import InsertQdq
from optcompiler_passes.pack_weights import pack
from tests.support import apply_all, make_context, op_types, proposals, random_inputs


def network(batch: int | str = "n", seed: int = 0) -> Program:
    """A small residual network with seeded weights."""
    rows = f"""<ir_version: 10, opset_import: ["": 21]>
    g (float[{batch},2,6,6] x) => (float[{batch},5] y)
    <int64[2] flat = {{{batch if batch != "n" else -1}, 36}}, float low = {{0}}, float high = {{6}},
     float[1] w, float[1] b, float[1] v, float[1] u, float[1] c> {{
      [conv1] c1 = Conv<pads=[1,1,1,1]>(x, w, b)
      [clip] r1 = Clip(c1, low, high)
      [conv2] c2 = Conv<pads=[1,1,1,1]>(r1, v)
      [add] a = Add(c2, r1)
      [relu] r2 = Relu(a)
      [pool] p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(r2)
      [flatten] f = Reshape(p, flat)
      [fc] y = Gemm(f, u, c)
    }}"""
    shapes = {"w": (4, 2, 3, 3), "b": (4,), "v": (4, 4, 3, 3), "u": (36, 5), "c": (5,)}
    for name in shapes:
        rows = rows.replace(f"float[1] {name}", f"float[1] {name} = {{0}}")
    rng = np.random.default_rng(seed)
    text = rows
    for name, shape in shapes.items():
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) if name != "u" else 12)
        dims, numbers = ",".join(map(str, shape)), ",".join(f"{x:.6f}" for x in values.flat)
        text = text.replace(f"float[1] {name} = {{0}}", f"float[{dims}] {name} = {{{numbers}}}")
    return Program.from_text(text)


def student_of(teacher: Program, context: PassContext) -> Program:
    """The teacher quantised, with scales and biases then put off by a good deal."""
    student, _ = apply_all(InsertQdq(observer="minmax"), teacher, context)
    for name in ("r1_scale", "w_scale", "x_scale"):
        value = student.value(name)
        student.set_weight(value, (constant(value) * np.float32(1.7)).astype(np.float32))
    student.set_weight(student.value("b"), constant(student.value("b")) + np.float32(0.3))
    return student


@pytest.fixture
def case() -> tuple[Program, Program, PassContext]:
    teacher = network()
    feeds = [
        {"x": np.random.default_rng(i).standard_normal((16, 2, 6, 6)).astype(np.float32)}
        for i in range(5)
    ]
    context = make_context(teacher, calibration=feeds[:4], holdout=feeds[4:])
    return teacher, student_of(teacher, context), context


QUICK = Distill(steps=60, batch_size=16)


def distilled(options: Distill, student: Program, context: PassContext) -> Program:
    return apply_all(options, student, context)[0]


def test_it_comes_nearer_and_changes_initializers_only(case):
    teacher, student, context = case
    candidates, declines = proposals(QUICK, student, context)
    assert [(c.site, c.choice, c.exact) for c in candidates] == [("program", "kd 60 steps", False)]
    assert not declines
    after, [patch] = apply_all(QUICK, student, context)
    assert (patch.added, patch.removed) == ((), ())
    fresh = [{"x": np.random.default_rng(77).standard_normal((64, 2, 6, 6)).astype(np.float32)}]
    judge = Judge(teacher, fresh, context.ops)
    assert judge.damage(after) < 0.2 * judge.damage(student)
    assert op_types(after) == op_types(student)
    for name, tensor in after.weights().items():
        before = student.weights()[name]
        assert (tensor.dtype, list(tensor.shape)) == (before.dtype, list(before.shape))
        if name.endswith("_scale"):
            assert (tensor.numpy() > 0).all()


def test_same_seed_same_bytes_and_torch_is_left_alone(case):
    _, student, context = case
    torch.manual_seed(123)
    expected = torch.rand(1)
    torch.manual_seed(123)
    options = replace(QUICK, steps=12)
    one = distilled(options, student, context)
    assert torch.equal(torch.rand(1), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    assert distilled(options, student, context).content_hash() == one.content_hash()
    other = distilled(options, student, replace(context, seed=1))
    assert other.content_hash() != one.content_hash()


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("scales", {"x_scale", "r1_scale", "w_scale", "v_scale", "u_scale", "p_scale"}),
        ("biases", {"b", "c"}),
        ("weights", {"w", "v", "u"}),
        ("zero_points", {"x_zero_point"}),
    ],
)
def test_what_learns(case, role, names):
    _, student, context = case
    assert {i.name for i in learnables(student, (role,))} - {"a_scale", "r2_scale"} == names
    if role == "zero_points":
        student, _ = apply_all(InsertQdq(), network(), context)
        student.set_weight(student.value("x_zero_point"), np.array(70, np.uint8))
    options = replace(QUICK, learn=(role,), steps=30, learning_rate=0.1)
    _, [patch] = apply_all(options, student, context)
    assert set(patch.changed_weights) <= names | {"a_scale", "r2_scale"}
    assert patch.changed_weights


def test_scale_after_a_clip_implies_the_clip(case):
    _, student, context = case
    [item] = [i for i in learnables(student, ("scales",)) if i.name == "r1_scale"]
    assert item.most * 255 <= 6.0 < item.most * 255 * 1.001
    student.set_weight(student.value("r1_scale"), np.array(0.04, np.float32))
    after = distilled(replace(QUICK, learn=("scales",), steps=20), student, context)
    assert constant(after.value("r1_scale")) * np.float32(255) <= 6.0


def test_block_boundaries(case):
    teacher, student, _ = case
    assert boundaries(student, teacher) == ["c1", "r1", "a", "r2", "p", "f"]
    narrow = network(seed=1)
    for name, keep in (("w", np.s_[:3]), ("b", np.s_[:3]), ("v", np.s_[:3, :3])):
        narrow.set_weight(narrow.value(name), constant(narrow.value(name))[keep])
    narrow.set_weight(narrow.value("u"), constant(narrow.value("u"))[:27])
    narrow.set_weight(narrow.value("flat"), np.array([-1, 27], np.int64))
    narrow.infer_shapes()
    assert boundaries(narrow, teacher) == []


def test_a_fixed_batch_size_is_trained_with_larger_batches():
    teacher = network(1)
    feeds = [random_inputs(teacher, seed) for seed in range(12)]
    context = make_context(teacher, calibration=feeds[:10], holdout=feeds[10:])
    student = student_of(teacher, context)
    free = batch_free(teacher)
    [got] = free.to_torch()(torch.zeros(3, 2, 6, 6))
    assert got.shape == (3, 5)
    judge = Judge(teacher, context.holdout, context.ops)
    after = distilled(QUICK, student, context)
    assert judge.damage(after) < 0.3 * judge.damage(student)
    after.verify(like=teacher)


def test_batches_of_different_shapes_are_used_as_given():
    teacher = Program.from_text(
        """<ir_version: 10, opset_import: ["": 21]>
        g (float[n,t,3] x) => (float[n,t,3] y)
        <float[3,3] w = {1,2,3,4,5,6,7,8,10}, float[3] b = {0.5,0,1}>
        { m = MatMul(x, w) [add] y = Add(m, b) }"""
    )
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((2, t, 3)).astype(np.float32)} for t in (3, 5, 4)]
    context = make_context(teacher, calibration=feeds, holdout=feeds)
    student = teacher.clone()
    student.set_weight(student.value("w"), constant(student.value("w")) * np.float32(0.9))
    judge = Judge(teacher, feeds, context.ops)
    after = distilled(QUICK, student, context)
    assert judge.damage(after) < 0.1 * judge.damage(student)


def test_reasons(case):
    teacher, student, context = case

    def reason(program: Program, options: Distill = QUICK, **changes) -> str:
        candidates, [decline] = proposals(options, program, replace(context, **changes))
        assert not candidates
        return decline.reason

    assert reason(student, calibration=()) == (
        "no calibration data to learn from; pass calibration=batches"
    )
    assert reason(teacher.clone()) == "the student equals the teacher"
    bare = Program.from_text(
        """<ir_version: 10, opset_import: ["": 21]>
        g (float[n,2,6,6] x) => (float[n,2,6,6] y) { y = Exp(x) }"""
    )
    narrow = teacher.clone()
    narrow.set_weight(narrow.value("b"), constant(narrow.value("b")) * 2)
    assert reason(narrow, replace(QUICK, learn=("scales", "zero_points"))) == (
        "it holds no scales or zero_points to learn"
    )
    assert learnables(bare, ("weights",)) == []


def test_no_improvement_is_declined(case):
    _, student, context = case
    candidates, _ = proposals(replace(QUICK, steps=1, learning_rate=1e-12), student, context)
    with pytest.raises(Declined, match="none of 1 steps"):
        candidates[0].rewrite(student.clone())


def test_options_are_checked():
    with pytest.raises(InputError, match="steps=0"):
        Distill(steps=0)
    with pytest.raises(InputError, match="'gamma'"):
        Distill(learn=("gamma",))
    with pytest.raises(InputError, match="learning_rate"):
        Distill(learning_rate=float("nan"))


def test_time_limit_shortens_the_schedule():
    clock = Clock(1000, 1e-9, Choices())
    for step in range(4):
        clock.tick(step)
    assert clock.steps == 4
    assert clock.evaluates(3)


def test_packed_weights_do_not_learn():
    teacher = network()
    student, _ = apply_all(InsertQdq(), teacher, make_context(teacher))
    pack(student)
    names = {i.name for i in learnables(student, ("scales", "weights", "biases"))}
    assert not names & {"w_scale", "w_quantized", "b_quantized", "b_scale"}
    assert "x_scale" in names


@pytest.mark.slow
def test_a_quarter_of_the_channels_in_int8_recover_on_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(),
            torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Flatten(), torch.nn.Linear(512, 10),
        )  # fmt: skip
    x, target = torch.from_numpy(images[:1300]), torch.from_numpy(labels[:1300])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(8):
        for rows in torch.randperm(1300, generator=generator).split(64):
            loss = torch.nn.functional.cross_entropy(model(x[rows]), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def program(keep: list[np.ndarray]) -> Program:
        state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
        first, second = keep
        flat = state["6.weight"].reshape(10, 32, 16)[:, second].reshape(10, -1)
        text = """<ir_version: 10, opset_import: ["": 21]>
        g (float[n,1,8,8] x) => (float[n,10] y)
        <float[1] w = {0}, float[1] b = {0}, float[1] v = {0}, float[1] c = {0},
         float[1] u = {0}, float[1] d = {0}> {
          c1 = Conv<pads=[1,1,1,1]>(x, w, b)  r1 = Relu(c1)
          c2 = Conv<pads=[1,1,1,1]>(r1, v, c)  r2 = Relu(c2)
          p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r2)
          f = Flatten(p)
          y = Gemm<transB=1>(f, u, d)
        }"""
        arrays = {
            "w": state["0.weight"][first], "b": state["0.bias"][first],
            "v": state["2.weight"][second][:, first], "c": state["2.bias"][second],
            "u": flat, "d": state["6.bias"],
        }  # fmt: skip
        for name, array in arrays.items():
            dims = ",".join(map(str, array.shape))
            numbers = ",".join(f"{value:.7g}" for value in array.flat)
            text = text.replace(f"float[1] {name} = {{0}}", f"float[{dims}] {name} = {{{numbers}}}")
        return Program.from_text(text)

    teacher = program([np.arange(16), np.arange(32)])
    weights = {k: t.numpy() for k, t in teacher.weights().items()}

    def strongest(array: np.ndarray) -> np.ndarray:
        size = np.abs(array).sum(axis=(1, 2, 3))
        return np.sort(np.argsort(-size)[: len(size) // 4])

    pruned = program([strongest(weights["w"]), strongest(weights["v"])])
    batches = [{"x": images[i : i + 32]} for i in range(0, 320, 32)]
    context = make_context(teacher, calibration=batches[:8], holdout=batches[8:])
    student, _ = apply_all(InsertQdq(), pruned, context)
    after = distilled(Distill(steps=200), student, context)

    def accuracy(candidate: Program) -> float:
        [scores] = candidate.to_torch()(torch.from_numpy(images[1300:]))
        return float((scores.argmax(1).numpy() == labels[1300:]).mean())

    whole, broken, mended = (accuracy(p) for p in (teacher, student, after))
    assert whole > 0.9
    assert broken < whole - 0.1
    assert mended - broken > 0.7 * (whole - broken)
