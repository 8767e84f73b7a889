"""Damage: the measures against numbers computed by hand, and how batches are averaged."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from optcompiler.damage import Judge, kl, largest_error, nmse, typical_error
from optcompiler.errors import InputError
from optcompiler.ops import builtin_table
from optcompiler.program import Program
from tests.support import MLP, random_inputs, run_onnx

LINEAR = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[n, 2] x) => (float[n, 2] y) <float[2] k = {%s, %s}> { y = Mul (x, k) }
"""


def linear(first: float, second: float) -> Program:
    return Program.from_text(LINEAR % (first, second))


def judge(program: Program, *batches: list[list[float]], measure: str = "kl") -> Judge:
    arrays = [{"x": np.array(b, np.float32)} for b in batches]
    return Judge(program, arrays, builtin_table(), measure)


# -- measures -------------------------------------------------------------------------------


def test_kl_of_two_distributions() -> None:
    teacher = torch.log(torch.tensor([[0.5, 0.5], [0.8, 0.2]]))
    student = torch.log(torch.tensor([[0.25, 0.75], [0.8, 0.2]]))
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl(teacher, student) == pytest.approx(first / 2, rel=1e-6)
    assert kl(student, teacher) != pytest.approx(first / 2, rel=1e-2)
    assert kl(teacher, teacher) == 0.0


def test_kl_is_blind_to_a_constant_added_to_all_scores_and_nmse_is_not() -> None:
    teacher = torch.tensor([[1.0, 2.0, 4.0]])
    assert kl(teacher, teacher + 3) == pytest.approx(0, abs=1e-12)
    assert nmse(teacher, teacher + 3) > 1


def test_kl_of_masked_scores_counts_what_is_left() -> None:
    teacher = torch.tensor([[0.0, 0.0, -math.inf]])
    student = torch.tensor([[0.0, math.log(3), -math.inf]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl(teacher, student) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(), (1,), (4, 1)])
def test_kl_without_a_distribution_is_nmse(shape: tuple[int, ...]) -> None:
    teacher = torch.arange(1.0, 1 + math.prod(shape)).reshape(shape)
    assert kl(teacher, teacher + 0.5) == nmse(teacher, teacher + 0.5) > 0


def test_nmse_is_relative_to_the_variance() -> None:
    teacher = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert nmse(teacher, torch.tensor([1.0, 2.0, 3.0, 5.0])) == pytest.approx(0.25 / 1.25)
    assert nmse(10 * teacher, 10 * teacher.flip(0)) == nmse(teacher, teacher.flip(0))
    assert nmse(teacher, torch.full((4,), 2.5)) == pytest.approx(1)


@pytest.mark.parametrize("other", [float("-inf"), float("inf"), float("nan")])
def test_infinities_in_the_same_places_are_no_difference(other: float) -> None:
    masked = torch.tensor([1.0, 2.0, 3.0, 4.0, other])
    near = torch.tensor([1.0, 2.0, 3.0, 5.0, other])
    assert nmse(masked, near) == pytest.approx(0.25 / 1.25)
    assert typical_error([(masked,)], [(near,)]) == pytest.approx((0.25 / 7.5) ** 0.5)
    assert largest_error([(masked,)], [(near,)]) == pytest.approx(0.25)
    for apart in (torch.arange(5.0), torch.tensor([other, 2.0, 3.0, 4.0, other])):
        assert nmse(masked, apart) == float("inf")
        assert typical_error([(masked,)], [(apart,)]) == float("inf")
        assert largest_error([(masked,)], [(apart,)]) == float("inf")
    nothing = masked[4:]
    assert nmse(nothing, nothing) == 0
    assert typical_error([(nothing,)], [(nothing,)]) == 0


def test_nmse_of_a_constant_teacher_is_relative_to_its_square() -> None:
    assert nmse(torch.full((3,), 2.0), torch.full((3,), 3.0)) == pytest.approx(1 / 4)
    assert nmse(torch.zeros(3), torch.full((3,), 2.0)) == pytest.approx(4)


# -- the judge ------------------------------------------------------------------------------


def test_a_program_does_no_damage_to_itself() -> None:
    program = Program.from_text(MLP)
    batches = [random_inputs(program, seed) for seed in range(2)]
    assert Judge(program, batches, builtin_table()).damage(program.clone()) == 0.0


def test_batches_count_by_their_samples() -> None:
    teacher, student = linear(1, 1), linear(1, 0)
    one, three = [[0.0, 1.0]], [[0.0, 2.0]] * 3
    alone = [judge(teacher, b).damage(student) for b in (one, three)]
    both = judge(teacher, one, three).damage(student)
    assert alone[0] != pytest.approx(alone[1], rel=0.1)
    assert both == pytest.approx((alone[0] + 3 * alone[1]) / 4)


def test_the_measure_is_chosen_by_name() -> None:
    x = [[1.0, 2.0], [3.0, 4.0]]
    got = judge(linear(1, 1), x, measure="nmse").damage(linear(1, 1.5))
    assert got == pytest.approx((1 + 4) / 4 / 1.25, rel=1e-5)
    with pytest.raises(InputError, match="no damage measure 'mse'; there is kl, nmse"):
        judge(linear(1, 1), x, measure="mse")


def test_integer_outputs_count_the_share_that_differs() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[n, 2] x) => (int64[n] y) <float[2] k = {%s, 1}> {
        s = Mul (x, k)
        y = ArgMax <axis = 1, keepdims = 0> (s)
    }
    """
    teacher, student = Program.from_text(text % "1"), Program.from_text(text % "-1")
    x = [[2.0, 1.0], [1.0, 2.0], [3.0, 1.0], [-3.0, -4.0]]
    assert judge(teacher, x).damage(student) == 0.5
    assert judge(teacher, x).damage(teacher) == 0.0


@pytest.mark.parametrize("measure", ["kl", "nmse"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_student_that_gives_no_numbers_does_infinite_damage(measure: str, value: float) -> None:
    judged = judge(linear(1, 1), [[1.0, 2.0]], measure=measure)
    broken = np.array([[1.0, value]], np.float32)
    assert judged.damage_of(lambda batch: [broken]) == math.inf


def test_a_teacher_that_gives_nan_is_refused() -> None:
    with pytest.raises(InputError, match="the model gives NaN in output 'y'"):
        judge(linear(1, 1), [[1.0, math.nan]])


def test_anything_that_maps_batches_can_be_judged() -> None:
    judged = judge(linear(1, 1), [[1.0, 2.0]], [[3.0, 5.0]])
    student = linear(1, 0.9)
    expected = judged.damage(student)
    assert expected > 0
    got = judged.damage_of(lambda batch: run_onnx(student, dict(batch)))
    assert got == pytest.approx(expected, rel=1e-5)


def test_damage_of_rounding_counts_as_none() -> None:
    teacher = linear(1, 1)
    judged = judge(teacher, [[1.0, 2.0]])
    nudged = np.array([[1.0, np.nextafter(np.float32(2), np.float32(3))]], np.float32)
    assert judged.damage_of(lambda batch: [nudged]) == 0.0


# -- exactness ------------------------------------------------------------------------------


def error(expected: list[float], got: list[float]) -> float:
    return largest_error([[torch.tensor(expected)]], [[torch.tensor(got)]])


def test_largest_error_is_relative_to_the_largest_magnitude() -> None:
    assert error([1.0, -4.0], [1.5, -4.0]) == pytest.approx(0.125)
    assert error([0.0, 0.0], [0.0, 0.5]) == pytest.approx(0.5)
    assert error([], []) == 0.0


def test_infinities_and_nans_must_be_in_the_same_places() -> None:
    assert error([math.inf, 2.0, math.nan], [math.inf, 2.0, math.nan]) == 0.0
    assert error([math.inf, 2.0], [-math.inf, 2.0]) == math.inf
    assert error([math.inf, 2.0], [3.0, 2.0]) == math.inf
    assert error([1.0, 2.0], [1.0, math.nan]) == math.inf


def test_shapes_types_and_integers_must_be_equal() -> None:
    assert error([1.0], [1.0, 1.0]) == math.inf
    whole = torch.tensor([1, 2])
    assert largest_error([[whole]], [[whole.clone()]]) == 0.0
    assert largest_error([[whole]], [[whole + 1]]) == math.inf
    assert largest_error([[whole]], [[whole.float()]]) == math.inf
