"""RNN, GRU and LSTM, and losses, against ONNX Runtime."""

import numpy as np
import pytest

from tests.ops.comparing import check, seeded, single

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@pytest.mark.parametrize("op_type", GATES)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_directions(op_type: str, direction: str) -> None:
    n, d = GATES[op_type] * 4, 2 if direction == "bidirectional" else 1
    program = single(
        op_type,
        f"float[5,2,3] x, float[{d},{n},3] w, float[{d},{n},4] r, float[{d},{2 * n}] b",
        f"float[5,{d},2,4] y, float[{d},2,4] h",
        f'hidden_size = 4, direction = "{direction}"',
    )
    check(program, rtol=1e-5)


def test_lengths_initial_state_and_peepholes() -> None:
    program = single(
        "LSTM",
        "float[5,2,3] x, float[1,16,3] w, float[1,16,4] r, float[1,32] b, int32[2] n, "
        "float[1,2,4] h0, float[1,2,4] c0, float[1,12] p",
        "float[5,1,2,4] y, float[1,2,4] h, float[1,2,4] c",
        "hidden_size = 4",
    )
    check(program, seeded(program) | {"n": np.array([5, 3], np.int32)})


def test_gru_with_linear_reset_and_other_activations() -> None:
    program = single(
        "GRU",
        "float[5,2,3] x, float[1,12,3] w, float[1,12,4] r, float[1,24] b",
        "float[5,1,2,4] y",
        'hidden_size = 4, linear_before_reset = 1, activations = ["HardSigmoid", "Relu"]',
    )
    check(program, seeded(program, low=-1, high=1))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_losses(reduction: str) -> None:
    shape = "[2,3]" if reduction == "none" else ""
    program = single(
        "SoftmaxCrossEntropyLoss", "float[2,5,3] x, int64[2,3] t, float[5] w",
        f"float{shape} y, float[2,5,3] p", f'reduction = "{reduction}", ignore_index = 0',
    )  # fmt: skip
    check(program)
    program = single(
        "NegativeLogLikelihoodLoss", "float[2,5,3] x, int64[2,3] t", f"float{shape} y",
        f'reduction = "{reduction}"',
    )  # fmt: skip
    check(program)
