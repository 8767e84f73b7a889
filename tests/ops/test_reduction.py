"""Reductions, arg-reductions, softmaxes, cumulative sums, TopK and Unique."""

import numpy as np
import pytest

from tests.ops.comparing import check, run_torch, seeded, single

REDUCTIONS = [
    "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
    "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp",
]  # fmt: skip


@pytest.mark.parametrize("op_type", REDUCTIONS)
def test_axes_as_input(op_type: str) -> None:
    program = single(
        op_type, "float[2,3,4] x", "float[3] y", "keepdims = 0", "int64[2] axes = {0, -1}"
    )
    check(program, seeded(program, low=0.5))


@pytest.mark.parametrize("op_type", sorted(set(REDUCTIONS) - {"ReduceSum"}))
def test_axes_as_attribute(op_type: str) -> None:
    program = single(op_type, "float[2,3,4] x", "float[2,1,4] y", "axes = [1]", opset=17)
    check(program, seeded(program, low=0.5))


def test_no_axes_reduces_all_or_nothing() -> None:
    check(single("ReduceSum", "float[2,3] x", "float[1,1] y"))
    check(single("ReduceSum", "float[2,3] x", "float[2,3] y", "noop_with_empty_axes = 1"))


def test_axes_computed_at_run_time() -> None:
    program = single("ReduceSum", "float[2,3] x, int64[1] axes", "float[2,1] y")
    check(program, seeded(program) | {"axes": np.array([1], np.int64)})


@pytest.mark.parametrize("op_type", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("last", [0, 1])
def test_arg(op_type: str, last: int) -> None:
    attributes = f"axis = 1, keepdims = 0, select_last_index = {last}"
    program = single(op_type, "int32[3,9] x", "int64[3] y", attributes)
    check(program)


def test_top_k_prefers_lower_indices() -> None:
    program = single(
        "TopK", "float[2,6] x", "float[2,3] v, int64[2,3] i", "axis = 1", "int64[1] k = {3}"
    )
    check(program, {"x": np.array([[1, 3, 3, 2, 3, 0], [5, 5, 5, 5, 1, 1]], np.float32)})


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [1, -1])
def test_softmax(op_type: str, axis: int) -> None:
    check(single(op_type, "float[2,3,4] x", "float[2,3,4] y", f"axis = {axis}"))


@pytest.mark.parametrize("attributes", ["", "exclusive = 1", "reverse = 1, exclusive = 1"])
def test_cum_sum(attributes: str) -> None:
    check(single("CumSum", "float[2,5] x", "float[2,5] y", attributes, "int64 axis = {1}"))


@pytest.mark.parametrize("sort", [0, 1])
def test_unique(sort: int) -> None:
    program = single(
        "Unique", "int64[8] x", "int64[N] y, int64[N] i, int64[8] v, int64[N] c", f"sorted = {sort}"
    )
    inputs = {"x": np.array([2, 1, 1, 3, 4, 3, 2, 0], np.int64)}
    check(program, inputs)
    assert run_torch(program, inputs)[0].size == 5
