"""Attention and rotary embeddings against the ONNX reference."""

import numpy as np
import pytest

from tests.ops.comparing import check, seeded, single

HEADS = "float[2,4,3,8] q, float[2,2,5,8] k, float[2,2,5,6] v"


@pytest.mark.parametrize("attributes", ["", "is_causal = 1", "scale = 0.1, softcap = 2.0"])
def test_grouped_heads(attributes: str) -> None:
    program = single("Attention", HEADS, "float[2,4,3,6] y", attributes, opset=23)
    check(program, reference=True)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_over_flat_heads(kind: str) -> None:
    inputs = f"float[2,3,8] q, float[2,5,8] k, float[2,5,8] v, {kind}[3,5] m"
    attributes = "q_num_heads = 2, kv_num_heads = 2"
    program = single("Attention", inputs, "float[2,3,8] y", attributes, opset=23)
    values = seeded(program)
    if kind == "bool":
        values["m"][:, 0] = True
    check(program, values, reference=True)


def test_cache_and_scores() -> None:
    inputs = (
        "float[1,2,3,4] q, float[1,2,3,4] k, float[1,2,3,4] v, float[1,2,2,4] pk, float[1,2,2,4] pv"
    )
    outputs = "float[1,2,3,4] y, float[1,2,5,4] k2, float[1,2,5,4] v2, float[1,2,3,5] s"
    program = single(
        "Attention", inputs, outputs, "qk_matmul_output_mode = 3, is_causal = 1", opset=23,
        arguments='q, k, v, "", pk, pv',
    )  # fmt: skip
    check(program, reference=True)


@pytest.mark.parametrize("attributes", ["", "interleaved = 1", "rotary_embedding_dim = 4"])
def test_rotary_embedding(attributes: str) -> None:
    half = 2 if "dim" in attributes else 4
    inputs = f"float[2,3,5,8] x, float[9,{half}] c, float[9,{half}] s, int64[2,5] p"
    program = single("RotaryEmbedding", inputs, "float[2,3,5,8] y", attributes, opset=23)
    check(program, reference=True)


def test_rotary_embedding_of_flat_heads() -> None:
    inputs = "float[2,5,24] x, float[2,5,4] c, float[2,5,4] s"
    program = single("RotaryEmbedding", inputs, "float[2,5,24] y", "num_heads = 3", opset=23)
    check(program, seeded(program) | {"c": np.ones((2, 5, 4), np.float32)}, reference=True)
