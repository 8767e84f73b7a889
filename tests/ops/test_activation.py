"""Activation functions against ONNX Runtime."""

import pytest

from tests.ops.comparing import check, seeded, single


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("Relu", ""),
        ("LeakyRelu", "alpha = 0.2"),
        ("ThresholdedRelu", "alpha = 0.5"),
        ("Elu", "alpha = 0.7"),
        ("Selu", ""),
        ("Celu", "alpha = 0.7"),
        ("Sigmoid", ""),
        ("HardSigmoid", "alpha = 0.3, beta = 0.4"),
        ("HardSwish", ""),
        ("Tanh", ""),
        ("Softplus", ""),
        ("Softsign", ""),
        ("Mish", ""),
        ("Gelu", ""),
        ("Gelu", 'approximate = "tanh"'),
        ("Shrink", "bias = 0.1, lambd = 0.6"),
    ],
)
def test_activation(op_type: str, attributes: str) -> None:
    program = single(op_type, "float[4,9] x", "float[4,9] y", attributes)
    check(program, seeded(program, low=-4, high=4), rtol=1e-5)


def test_prelu_slope_broadcasts() -> None:
    check(single("PRelu", "float[2,3,4] x, float[3,1] slope", "float[2,3,4] y"))


def test_swish() -> None:
    check(single("Swish", "float[9] x", "float[9] y", "alpha = 1.7", opset=24), reference=True)
