"""Operators of object detection against ONNX Runtime."""

import numpy as np
import pytest

from tests.ops.comparing import check, single


@pytest.mark.parametrize("centred", [0, 1])
def test_non_max_suppression(centred: int) -> None:
    rng = np.random.default_rng(0)
    corner, side = (
        rng.random((2, 12, 2), np.float32),
        0.1 + 0.4 * rng.random((2, 12, 2), np.float32),
    )
    boxes = np.concatenate([corner, side if centred else corner + side], -1)
    program = single(
        "NonMaxSuppression", "float[2,12,4] boxes, float[2,3,12] scores", "int64[K,3] kept",
        f"center_point_box = {centred}",
        "int64[1] most = {5}, float[1] overlap = {0.3}, float[1] least = {0.2}",
    )  # fmt: skip
    check(program, {"boxes": boxes, "scores": rng.random((2, 3, 12), np.float32)})


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "output_half_pixel"])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align(mode: str, coordinates: str, ratio: int) -> None:
    program = single(
        "RoiAlign", "float[2,3,8,9] x, float[3,4] rois, int64[3] which", "float[3,3,2,4] y",
        f'mode = "{mode}", coordinate_transformation_mode = "{coordinates}", output_height = 2, '
        f"output_width = 4, sampling_ratio = {ratio}, spatial_scale = 0.5",
    )  # fmt: skip
    x = np.random.default_rng(1).random((2, 3, 8, 9), np.float32)
    rois = np.array([[0, 0, 8, 8], [3, 2, 15, 13], [-4, -3, 25, 6]], np.float32)
    check(program, {"x": x, "rois": rois, "which": np.array([0, 1, 0])}, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_deformable_convolution(masked: bool) -> None:
    rng = np.random.default_rng(2)
    mask = ", float[1,18,5,3] m" if masked else ""
    program = single(
        "DeformConv", f"float[1,4,6,7] x, float[2,2,3,3] w, float[1,36,5,3] o, float[2] b{mask}",
        "float[1,2,5,3] y",
        "dilations = [1, 2], group = 2, offset_group = 2, pads = [1, 1, 0, 1], strides = [1, 2]",
    )  # fmt: skip
    inputs = {
        "x": rng.random((1, 4, 6, 7), np.float32), "w": rng.random((2, 2, 3, 3), np.float32),
        "o": rng.standard_normal((1, 36, 5, 3)).astype(np.float32), "b": np.ones(2, np.float32),
        "m": rng.random((1, 18, 5, 3), np.float32),
    }  # fmt: skip
    check(program, {p.name: inputs[p.name] for p in program.inputs}, rtol=1e-4)
