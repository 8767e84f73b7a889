"""Resampling against ONNX Runtime and the ONNX reference."""

import pytest

from tests.ops.comparing import check, single

COORDINATES = ["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"]


def _resize(y: str, attributes: str, constants: str, arguments: str) -> None:
    program = single(
        "Resize", "float[1,2,5,4] x", f"float{y} y", attributes, constants, arguments=arguments
    )
    check(program, reference=True, rtol=1e-5)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_resize_by_sizes(mode: str, coordinates: str) -> None:
    attributes = f'mode = "{mode}", coordinate_transformation_mode = "{coordinates}"'
    for sizes in ("8, 9", "3, 2"):
        shape = f"[1,2,{sizes.replace(' ', '')}]"
        constants = f"int64[4] sizes = {{1, 2, {sizes}}}"
        _resize(shape, attributes, constants, 'x, "", "", sizes')


@pytest.mark.parametrize("rule", ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
def test_nearest_rules(rule: str) -> None:
    attributes = f'nearest_mode = "{rule}", coordinate_transformation_mode = "half_pixel"'
    constants = "float[4] scales = {1, 1, 2, 0.5}"
    _resize("[1,2,10,2]", attributes, constants, 'x, "", scales')


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_antialias(mode: str) -> None:
    constants = "float[4] scales = {1, 1, 0.6, 0.5}"
    _resize("[1,2,3,2]", f'mode = "{mode}", antialias = 1', constants, 'x, "", scales')


def test_some_axes_keeping_the_ratio() -> None:
    attributes = 'mode = "linear", axes = [2, 3], keep_aspect_ratio_policy = "not_larger"'
    _resize("[1,2,10,8]", attributes, "int64[2] sizes = {10, 9}", 'x, "", "", sizes')


@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_grid_sample(mode: str, padding: str) -> None:
    attributes = f'mode = "{mode}", padding_mode = "{padding}"'
    inputs = "float[1,2,5,4] x, float[1,3,3,2] grid"
    check(single("GridSample", inputs, "float[1,2,3,3] y", attributes))


@pytest.mark.parametrize("align", [0, 1])
def test_affine_grid(align: int) -> None:
    constants = "int64[4] size = {2, 3, 5, 6}"
    attributes = f"align_corners = {align}"
    program = single("AffineGrid", "float[2,2,3] t", "float[2,5,6,2] y", attributes, constants)
    check(program, reference=True)
