"""Pooling against ONNX Runtime."""

import pytest

from tests.ops.comparing import check, single


@pytest.mark.parametrize(
    ("y", "attributes"),
    [
        ("[1,2,4,4]", "kernel_shape = [2,2], strides = [2,2]"),
        ("[1,2,4,4]", "kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]"),
        ("[1,2,4,4]", "kernel_shape = [3,3], strides = [2,2], ceil_mode = 1"),
        ("[1,2,7,8]", "kernel_shape = [3,2], pads = [0,1,1,0]"),
        ("[1,2,4,4]", 'kernel_shape = [3,3], strides = [2,2], auto_pad = "SAME_LOWER"'),
        ("[1,2,4,4]", "kernel_shape = [3,3], dilations = [2,2]"),
    ],
)
def test_max_pool(y: str, attributes: str) -> None:
    check(single("MaxPool", "float[1,2,8,8] x", f"float{y} y", attributes))


def test_max_pool_of_integers() -> None:
    check(
        single("MaxPool", "uint8[1,2,6] x", "uint8[1,2,3] y", "kernel_shape = [2], strides = [2]")
    )


@pytest.mark.parametrize("order", [0, 1])
def test_max_pool_indices(order: int) -> None:
    attributes = f"kernel_shape = [3,3], strides = [2,2], pads = [1,1,0,0], storage_order = {order}"
    check(single("MaxPool", "float[2,2,7,7] x", "float[2,2,3,3] y, int64[2,2,3,3] i", attributes))


@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize(
    ("y", "attributes"),
    [
        ("[1,2,4,4]", "kernel_shape = [2,2], strides = [2,2]"),
        ("[1,2,4,4]", "kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]"),
        ("[1,2,5,5]", "kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1], ceil_mode = 1"),
        ("[1,2,7,8]", "kernel_shape = [3,2], pads = [0,1,1,0]"),
        ("[1,2,4,4]", 'kernel_shape = [3,3], strides = [2,2], auto_pad = "SAME_UPPER"'),
    ],
)
def test_average_pool(y: str, attributes: str, include: int) -> None:
    attributes = f"{attributes}, count_include_pad = {include}"
    size = "[1,2,9,9]" if "ceil_mode" in attributes else "[1,2,8,8]"
    check(single("AveragePool", f"float{size} x", f"float{y} y", attributes))


@pytest.mark.parametrize("op_type", ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
def test_global_pooling(op_type: str) -> None:
    check(single(op_type, "float[2,3,4,5] x", "float[2,3,1,1] y"))


def test_lp_pool() -> None:
    check(single("LpPool", "float[1,2,6,6] x", "float[1,2,3,3] y", "kernel_shape = [2,2], strides = [2,2], p = 3"))  # fmt: skip  # noqa: E501
