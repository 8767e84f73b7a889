"""Normalisations against ONNX Runtime or the ONNX reference."""

import pytest
import torch

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.executor import to_torch
from tests.ops.comparing import check, seeded, single


def test_batch_normalization() -> None:
    program = single(
        "BatchNormalization",
        "float[2,3,4,4] x, float[3] s, float[3] b, float[3] m, float[3] v",
        "float[2,3,4,4] y",
        "epsilon = 0.01",
    )
    check(program, seeded(program, low=0.5))


@pytest.mark.parametrize(("axis", "shape"), [(-1, "[4]"), (1, "[3,4]")])
def test_layer_normalization(axis: int, shape: str) -> None:
    inputs = f"float[2,3,4] x, float{shape} s, float{shape} b"
    check(single("LayerNormalization", inputs, "float[2,3,4] y", f"axis = {axis}"))


def test_layer_normalization_with_statistics() -> None:
    outputs = "float[2,3,4] y, float[2,3,1] mean, float[2,3,1] inverse"
    check(single("LayerNormalization", "float[2,3,4] x, float[4] s", outputs))


def test_rms_normalization() -> None:
    program = single("RMSNormalization", "float[2,3,4] x, float[4] s", "float[2,3,4] y", opset=23)
    check(program, reference=True)


def test_instance_normalization() -> None:
    check(
        single("InstanceNormalization", "float[2,3,5] x, float[3] s, float[3] b", "float[2,3,5] y")
    )


@pytest.mark.parametrize(("opset", "count"), [(20, 2), (21, 4)])
def test_group_normalization(opset: int, count: int) -> None:
    program = single(
        "GroupNormalization",
        f"float[2,4,5] x, float[{count}] s, float[{count}] b",
        "float[2,4,5] y",
        "num_groups = 2",
        opset=opset,
    )
    check(program, reference=True)


@pytest.mark.parametrize("size", [3, 5])
def test_lrn(size: int) -> None:
    attributes = f"size = {size}, alpha = 0.1, beta = 0.5, bias = 2.0"
    check(single("LRN", "float[1,6,3,3] x", "float[1,6,3,3] y", attributes))


@pytest.mark.parametrize("p", [1, 2])
def test_lp_normalization(p: int) -> None:
    check(single("LpNormalization", "float[3,4] x", "float[3,4] y", f"axis = 1, p = {p}"))


def test_mean_variance_normalization() -> None:
    check(single("MeanVarianceNormalization", "float[2,3,4,4] x", "float[2,3,4,4] y"))


def test_dropout_is_the_identity() -> None:
    check(single("Dropout", "float[3,4] x", "float[3,4] y, bool[3,4] mask"))


def test_dropout_in_training_is_refused() -> None:
    constants = "float ratio = {0.5}, bool training = {1}"
    module = to_torch(single("Dropout", "float[4] x", "float[4] y", "", constants))
    with pytest.raises(UnsupportedOperatorError, match="training mode"):
        module(torch.ones(4))
