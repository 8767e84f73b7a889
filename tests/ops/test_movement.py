"""Operators that move elements, against ONNX Runtime."""

import numpy as np
import pytest

from tests.ops.comparing import check, seeded, single


@pytest.mark.parametrize(
    ("y", "shape", "allow"),
    [("[6,4]", "{6, -1}", 0), ("[2,12]", "{0, 12}", 0), ("[4,3,2]", "{4, 3, 2}", 1)],
)
def test_reshape(y: str, shape: str, allow: int) -> None:
    count = shape.count(",") + 1
    program = single(
        "Reshape", "float[2,3,4] x", f"float{y} y", f"allowzero = {allow}",
        f"int64[{count}] shape = {shape}",
    )  # fmt: skip
    check(program)


def test_reshape_to_a_computed_shape() -> None:
    program = single("Reshape", "float[2,3] x, int64[1] shape", "float[6] y")
    check(program, seeded(program) | {"shape": np.array([-1], np.int64)})


@pytest.mark.parametrize("perm", ["", "perm = [1,2,0]"])
def test_transpose(perm: str) -> None:
    shape = "[3,4,2]" if perm else "[4,3,2]"
    check(single("Transpose", "float[2,3,4] x", f"float{shape} y", perm))


def test_squeeze_and_unsqueeze() -> None:
    check(single("Squeeze", "float[1,3,1] x", "float[3] y"))
    check(single("Squeeze", "float[1,3,1] x", "float[1,3] y", "", "int64[1] axes = {-1}"))
    check(single("Unsqueeze", "float[3] x", "float[1,3,1] y", "", "int64[2] axes = {0, -1}"))
    check(single("Squeeze", "float[1,3,1] x", "float[3,1] y", "axes = [0]", opset=11))


@pytest.mark.parametrize(("axis", "y"), [(0, "[1,24]"), (2, "[6,4]"), (-1, "[6,4]")])
def test_flatten(axis: int, y: str) -> None:
    check(single("Flatten", "float[2,3,4] x", f"float{y} y", f"axis = {axis}"))


def test_concat() -> None:
    check(single("Concat", "float[2,3] a, float[2,1] b", "float[2,4] y", "axis = -1"))


def test_split() -> None:
    outputs = "float[2,3] a, float[2,3] b, float[2,1] c"
    check(single("Split", "float[2,7] x", outputs, "axis = 1, num_outputs = 3"))
    check(single("Split", "float[2,7] x", outputs, "axis = 1", "int64[3] sizes = {3, 3, 1}"))
    check(single("Split", "float[4] x", "float[2] a, float[2] b", "", opset=13))


@pytest.mark.parametrize(
    ("start", "end", "step", "size"),
    [(1, 5, 2, 2), (-3, 1000, 1, 3), (6, 0, -2, 3), (1000, -1000, -1, 7), (5, 2, 1, 0)],
)
def test_slice(start: int, end: int, step: int, size: int) -> None:
    constants = (
        f"int64[1] starts = {{{start}}}, int64[1] ends = {{{end}}}, "
        f"int64[1] axes = {{-1}}, int64[1] steps = {{{step}}}"
    )
    check(single("Slice", "float[2,7] x", f"float[2,{size}] y", "", constants))


def test_expand_and_tile() -> None:
    check(single("Expand", "float[3,1] x", "float[2,3,4] y", "", "int64[3] shape = {2, 1, 4}"))
    check(single("Tile", "float[2,3] x", "float[4,3] y", "", "int64[2] repeats = {2, 1}"))


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pad(mode: str) -> None:
    constants = "int64[4] pads = {1, 2, 0, 1}"
    program = single("Pad", "float[4,5] x", "float[5,8] y", f'mode = "{mode}"', constants)
    check(program)


def test_pad_some_axes_with_a_value_and_crop() -> None:
    constants = "int64[2] pads = {-1, 2}, float value = {1.5}, int64[1] axes = {-1}"
    check(single("Pad", "float[2,4] x", "float[2,5] y", "", constants))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space(mode: str) -> None:
    attributes = f'blocksize = 2, mode = "{mode}"'
    check(single("DepthToSpace", "float[1,8,2,3] x", "float[1,2,4,6] y", attributes))


def test_space_to_depth() -> None:
    check(single("SpaceToDepth", "float[1,2,4,6] x", "float[1,8,2,3] y", "blocksize = 2"))


@pytest.mark.parametrize("upper", [0, 1])
def test_trilu(upper: int) -> None:
    constants = "int64 k = {1}"
    check(single("Trilu", "float[2,4,5] x", "float[2,4,5] y", f"upper = {upper}", constants))


def test_reverse_sequence() -> None:
    program = single("ReverseSequence", "float[4,2] x", "float[4,2] y", "", "int64[2] n = {2, 4}")
    check(program)


def test_center_crop_pad() -> None:
    program = single("CenterCropPad", "float[5,3] x", "float[2,6] y", "", "int64[2] n = {2, 6}")
    check(program, reference=True)


def test_col_to_im() -> None:
    constants = "int64[2] image = {5, 5}, int64[2] block = {2, 2}"
    program = single("Col2Im", "float[1,8,16] x", "float[1,2,5,5] y", "", constants)
    check(program, reference=True)
