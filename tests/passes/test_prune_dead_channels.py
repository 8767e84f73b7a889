"""prune-dead-channels: what leaves, what stays and why; the function never changes."""

from __future__ import annotations

import numpy as np
import pytest

from optcompiler.errors import Declined
from optcompiler.program import Program, constant, static_shape
from optcompiler.rewriting import Candidate, Decline
from optcompiler_passes.prune_dead_channels import PruneDeadChannels, intervals
from tests.support import (
    apply_all,
    assert_close,
    filled_program,
    make_context,
    proposals,
    random_inputs,
    run_onnx,
)

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
RNG = np.random.default_rng(5)

CHAIN = f"""{HEAD}
chain (float[2,3,8,8] x) => (float[2,5,6,6] y)
<float[8,3,3,3] w1, float[8] b1, float[6,8,3,3] w2, float[5,6,1,1] w3> {{
  c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
  r1 = Relu (c1)
  c2 = Conv (r1, w2)
  y = Conv (c2, w3)
}}"""


def dead_weights(shape: tuple[int, ...], channels: list[int], axis: int = 0) -> np.ndarray:
    weight = RNG.standard_normal(shape)
    where = [slice(None)] * len(shape)
    where[axis] = channels
    weight[tuple(where)] = 0
    return weight


def choices(program: Program) -> dict[str, str]:
    return {c.site: c.choice for c in proposals(PruneDeadChannels(), program)[0]}


def declines(program: Program) -> dict[str, str]:
    return {d.site: d.reason for d in proposals(PruneDeadChannels(), program)[1]}


def test_zero_weights_with_a_negative_bias_die_in_the_relu() -> None:
    program = filled_program(
        CHAIN, w1=dead_weights((8, 3, 3, 3), [1, 4]), b1=-np.abs(RNG.standard_normal(8))
    )
    assert choices(program) == {"Conv_0": "remove 2 of 8 channels"}
    pruned, _ = apply_all(PruneDeadChannels(), program)
    assert static_shape(pruned.value("w1")) == (6, 3, 3, 3)
    assert static_shape(pruned.value("w2")) == (6, 6, 3, 3)


def test_a_constant_moves_into_the_consumers_bias() -> None:
    program = filled_program(
        CHAIN, w1=dead_weights((8, 3, 3, 3), [1, 4]), b1=np.abs(RNG.standard_normal(8))
    )
    pruned, _ = apply_all(PruneDeadChannels(), program)
    consumer = pruned.node("Conv_1")
    assert consumer is not None
    assert len(consumer.inputs) == 3
    assert constant(consumer.inputs[2]) is not None
    assert static_shape(pruned.value("w1")) == (6, 3, 3, 3)


def test_a_padded_consumer_keeps_constants_and_says_so() -> None:
    padded = CHAIN.replace("c2 = Conv (r1", "c2 = Conv <pads = [1,1,1,1]> (r1").replace(
        "float[2,5,6,6] y", "float[2,5,8,8] y"
    )
    bias = np.full(8, 0.25)
    program = filled_program(padded, w1=dead_weights((8, 3, 3, 3), [1, 4, 6]), b1=bias)
    assert choices(program) == {}
    assert declines(program)["Conv_0"] == (
        "consumer Conv 'Conv_1' has padding, and the constant is 0.25 for 3 channels"
    )
    bias[4] = -0.5
    program = filled_program(padded, w1=dead_weights((8, 3, 3, 3), [1, 4, 6]), b1=bias)
    candidates, _ = proposals(PruneDeadChannels(), program)
    assert [c.choice for c in candidates] == ["remove 1 of 8 channels"]
    assert candidates[0].details["removed"] == [4]
    assert "0.25 for 2 channels" in candidates[0].note


def test_pinned_groups_name_what_pins_them() -> None:
    program = filled_program(CHAIN, w3=dead_weights((5, 6, 1, 1), [0]))
    assert declines(program) == {
        "Conv_0": "no channel is dead",
        "Conv_1": "no channel is dead",
        "Conv_2": "reaches output 'y'",
    }


def test_channels_that_consumers_ignore_leave_and_reveal_others() -> None:
    w2 = dead_weights((6, 8, 3, 3), [2, 3], axis=1)
    w2[:, 5] = 0
    w2[0, 5] = 1
    w3 = dead_weights((5, 6, 1, 1), [0], axis=1)
    program = filled_program(CHAIN, w2=w2, w3=w3)
    candidates, _ = proposals(PruneDeadChannels(), program)
    assert [(c.site, c.choice) for c in candidates] == [
        ("Conv_0", "remove 2 of 8 channels"),
        ("Conv_1", "remove 1 of 6 channels"),
        ("Conv_0@2", "remove 1 of 6 channels"),
    ]
    pruned, _ = apply_all(PruneDeadChannels(), program)
    assert static_shape(pruned.value("w1")) == (5, 3, 3, 3)
    assert static_shape(pruned.value("w2")) == (5, 5, 3, 3)
    with pytest.raises(Declined, match=r"changed|not dead"):
        candidates[2].rewrite(program.clone())


def test_relu_never_active_by_interval_bounds() -> None:
    text = f"""{HEAD}
    bounds (float[2,4] x) => (float[2,3] y)
    <float[4,4] w1, float[4,6] w2, float[6] b2, float[6,3] w3> {{
      a = Gemm (x, w1)
      s = Sigmoid (a)
      h = Gemm (s, w2, b2)
      r = Relu (h)
      y = Gemm (r, w3)
    }}"""
    w2, b2 = np.abs(RNG.standard_normal((4, 6))), np.zeros(6)
    w2[:, 1], b2[1] = [1, 1, 1, 1], -4.0
    w2[:, 2], b2[2] = [1, 1, 1, 1], -3.9
    w2[:, 3], b2[3] = [-1, -1, -1, 1], -1.5
    program = filled_program(text, w2=w2, b2=b2)
    candidates, _ = proposals(PruneDeadChannels(), program)
    low, high = intervals(program)["h"]
    assert float(low[0, 3]) == -4.5
    assert float(high[0, 3]) == -0.5
    (candidate,) = candidates
    assert candidate.details["removed"] == [1, 3]
    apply_all(PruneDeadChannels(), program)


def test_saturated_clip_is_a_constant() -> None:
    text = f"""{HEAD}
    clip (float[2,4] x) => (float[2,3] y)
    <float[4,6] w1, float[6,5] w2, float[5] b2, float[5,3] w3,
     float lo = {{0.0}}, float hi = {{6.0}}> {{
      a = MatMul (x, w1)
      c = Clip (a, lo, hi)
      h = Gemm <alpha = 0.5, beta = 2.0> (c, w2, b2)
      d = Clip (h, lo, hi)
      y = Gemm (d, w3)
    }}"""
    w2, b2 = np.abs(RNG.standard_normal((6, 5))), np.full(5, 0.1)
    b2[3] = 4.0
    program = filled_program(text, w2=w2, b2=b2)
    pruned, _ = apply_all(PruneDeadChannels(), program)
    assert static_shape(pruned.value("w2")) == (6, 4)
    assert [n.op_type for n in pruned.graph] == ["MatMul", "Clip", "Gemm", "Clip", "Gemm"]


def test_matmul_takes_a_constant_in_the_add_behind_it() -> None:
    text = f"""{HEAD}
    mlp (float[2,5,4] x) => (float[2,5,3] y)
    <float[4,6] w1, float[6] b1, float[6,3] w2, float[3] b2> {{
      a = MatMul (x, w1)
      b = Add (a, b1)
      g = Gelu (b)
      c = MatMul (g, w2)
      y = Add (c, b2)
    }}"""
    program = filled_program(text, w1=dead_weights((4, 6), [0, 5], axis=1))
    pruned, _ = apply_all(PruneDeadChannels(), program)
    assert static_shape(pruned.value("w1")) == (4, 4)
    assert len(pruned.graph) == len(program.graph)
    bare = filled_program(
        text.replace(
            "c = MatMul (g, w2)\n      y = Add (c, b2)", "c = MatMul (g, w2)\n y = Neg(c)"
        ).replace(", float[3] b2", ""),
        w1=dead_weights((4, 6), [0, 5], axis=1),
    )
    pruned, _ = apply_all(PruneDeadChannels(), bare)
    assert [n.op_type for n in pruned.graph] == ["MatMul", "Add", "Gelu", "MatMul", "Add", "Neg"]


def test_residual_channels_need_every_branch() -> None:
    text = f"""{HEAD}
    residual (float[2,3,4,4] x) => (float[2,4] y)
    <float[6,3,1,1] w1, float[6] b1, float[6,6,3,3] w2, float[6,4] wf> {{
      a = Conv (x, w1, b1)
      r = Relu (a)
      b = Conv <pads = [1,1,1,1]> (r, w2)
      s = Add (r, b)
      p = GlobalAveragePool (s)
      f = Flatten (p)
      y = Gemm (f, wf)
    }}"""
    b1 = np.full(6, -1.0)
    one = filled_program(text, w1=dead_weights((6, 3, 1, 1), [1, 2]), b1=b1)
    assert choices(one) == {}
    w2 = dead_weights((6, 6, 3, 3), [2, 3])
    both = filled_program(text, w1=dead_weights((6, 3, 1, 1), [1, 2]), b1=b1, w2=w2)
    assert [c.details["removed"] for c in proposals(PruneDeadChannels(), both)[0]] == [[2]]
    pruned, _ = apply_all(PruneDeadChannels(), both)
    assert static_shape(pruned.value("wf")) == (5, 4)


def test_concat_flatten_depthwise_and_batch_norm() -> None:
    text = f"""{HEAD}
    mixed (float[2,3,4,4] x) => (float[2,5] y)
    <float[4,3,1,1] wa, float[6,3,1,1] wb, float[6] s, float[6] o, float[6] m, float[6] var,
     float[10,1,3,3] wd, float[10] bd, float[160,5] wf, float[5] bf> {{
      a = Conv (x, wa)
      b = Conv (x, wb)
      n = BatchNormalization (b, s, o, m, var)
      q = Relu (n)
      c = Concat <axis = 1> (a, q)
      d = Conv <pads = [1,1,1,1], group = 10> (c, wd, bd)
      t = HardSwish (d)
      f = Flatten (t)
      y = Gemm (f, wf, bf)
    }}"""
    offset, mean, scale = np.full(6, -3.0), np.zeros(6), np.full(6, 0.5)
    wd, bd = RNG.standard_normal((10, 1, 3, 3)), RNG.standard_normal(10)
    wd[0] = 0
    program = filled_program(
        text, wb=dead_weights((6, 3, 1, 1), [1, 5]), o=offset, m=mean, s=scale, wd=wd, bd=bd
    )
    assert choices(program) == {
        "Conv_0": "remove 1 of 4 channels",
        "Conv_1": "remove 2 of 6 channels",
    }
    pruned, _ = apply_all(PruneDeadChannels(), program)
    assert static_shape(pruned.value("wd")) == (7, 1, 3, 3)
    assert static_shape(pruned.value("wf")) == (112, 5)


def test_one_channel_of_an_entirely_dead_group_stays() -> None:
    program = filled_program(CHAIN, w1=np.zeros((8, 3, 3, 3)), b1=np.zeros(8))
    assert choices(program)["Conv_0"] == "remove 7 of 8 channels"
    pruned, _ = apply_all(PruneDeadChannels(), program)
    assert static_shape(pruned.value("w1")) == (1, 3, 3, 3)


def test_normalised_channels_are_declined() -> None:
    text = f"""{HEAD}
    norm (float[2,4] x) => (float[2,3] y)
    <float[4,8] w1, float[8] s, float[8] b, float[8,3] w2> {{
      a = MatMul (x, w1)
      n = LayerNormalization (a, s, b)
      y = MatMul (n, w2)
    }}"""
    program = filled_program(text, w2=dead_weights((8, 3), [1]))
    assert declines(program)["MatMul_0"] == "its channels are normalised together"


def test_random_networks_keep_their_function() -> None:
    from tests.test_channel_graph import random_cnn

    rng = np.random.default_rng(3)
    removed = 0
    for seed in range(24):
        program = filled_program(random_cnn(rng), seed)
        program.sweep()
        for _, value in sorted(program.graph.initializers.items()):
            weight = constant(value)
            assert weight is not None
            if str(value.name).startswith("w") and weight.ndim > 1:
                cut = weight * (rng.random((len(weight), *[1] * (weight.ndim - 1))) < 0.6)
                program.set_weight(value, cut.astype(np.float32))
        context = make_context(program)
        pruned = program.clone()
        for found in PruneDeadChannels().propose(program, context):
            assert isinstance(found, Candidate | Decline)
            if isinstance(found, Candidate):
                found.rewrite(pruned)
                removed += 1
        pruned.verify(like=program)
        inputs = random_inputs(program, 2)
        assert_close(run_onnx(pruned, inputs), run_onnx(program, inputs), 1e-4)
        assert choices(pruned) == {}
    assert removed > 15


def test_an_input_of_unknown_rank_has_no_bounds():
    program = Program.from_text(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[3,2] x) => (float[2,3] y) { h = Relu (x) y = Transpose <perm = [1, 0]> (h) }
        """
    )
    program.graph[0].outputs[0].shape = None
    assert not intervals(program)
