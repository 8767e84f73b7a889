"""Gathers, scatters, one-hot and shape operators against ONNX Runtime."""

import numpy as np
import pytest

from tests.ops.comparing import check, seeded, single


@pytest.mark.parametrize(("axis", "y"), [(0, "[2,2,4]"), (1, "[3,2,2]")])
def test_gather(axis: int, y: str) -> None:
    constants = "int64[2,2] i = {0, -1, 2, 1}"
    check(single("Gather", "float[3,4] x", f"float{y} y", f"axis = {axis}", constants))


def test_gather_one() -> None:
    check(single("Gather", "float[3,4] x", "float[3] y", "axis = 1", "int64 i = {-1}"))
    program = single("Gather", "int64[3] x, int64 i", "int64 y")
    check(program, {"x": np.array([4, 5, 6]), "i": np.array(1)})


def test_gather_elements_and_nd() -> None:
    constants = "int64[2,2] i = {0, -1, 2, 1}"
    check(single("GatherElements", "float[3,2] x", "float[2,2] y", "axis = 0", constants))
    check(single("GatherND", "float[3,2] x", "float[2] y", "", "int64[2,2] i = {0, 1, 2, -1}"))
    constants = "int64[2,1] i = {1, 0}"
    check(single("GatherND", "float[2,3,4] x", "float[2,4] y", "batch_dims = 1", constants))


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scatter(reduction: str) -> None:
    attributes = f'reduction = "{reduction}"'
    program = single(
        "ScatterElements", "float[3,4] x, float[2,4] u", "float[3,4] y", attributes,
        "int64[2,4] i = {0, 1, 2, 0, 2, -1, 0, 1}", arguments="x, i, u",
    )  # fmt: skip
    values = seeded(program)
    if reduction == "none":
        program = single(
            "ScatterElements", "float[3,4] x, float[1,4] u", "float[3,4] y", attributes,
            "int64[1,4] i = {0, 1, 2, 0}", arguments="x, i, u",
        )  # fmt: skip
        values = seeded(program)
    check(program, values)
    program = single(
        "ScatterND", "float[4,3] x, float[2,3] u", "float[4,3] y", attributes,
        "int64[2,1] i = {3, 1}", arguments="x, i, u",
    )  # fmt: skip
    check(program)


def test_one_hot() -> None:
    program = single(
        "OneHot", "int64[4] i, float[2] v", "float[4,3] y", "", "int64 n = {3}",
        arguments="i, n, v",
    )  # fmt: skip
    check(program, {"i": np.array([0, 2, -1, 7]), "v": np.array([0.5, 2], np.float32)})


def test_non_zero_and_compress() -> None:
    check(single("NonZero", "float[3,4] x", "int64[2,N] y"), {"x": np.eye(3, 4, dtype=np.float32)})
    program = single("Compress", "float[3,4] x, bool[3] c", "float[N,4] y", "axis = 0")
    check(program, seeded(program) | {"c": np.array([True, False, True])})


def test_shapes_as_values() -> None:
    check(single("Shape", "float[2,3,4] x", "int64[2] y", "start = 1"))
    check(single("Size", "float[2,3,4] x", "int64 y"))


def test_tensors_from_shapes() -> None:
    program = single("ConstantOfShape", "int64[2] n", "int32[2,3] y", "value = int32[1] {7}")
    check(program, {"n": np.array([2, 3])})
    program = single("Range", "int64 a, int64 b, int64 c", "int64[N] y")
    check(program, {"a": np.array(10), "b": np.array(3), "c": np.array(-2)})
    check(single("EyeLike", "float[3,4] x", "int64[3,4] y", "dtype = 7, k = 1"))
