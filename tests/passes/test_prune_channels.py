"""prune-channels: which channels leave, at which widths, and what the consumers take up."""

from __future__ import annotations

import json
from typing import get_args

import numpy as np
import pytest

from optcompiler.errors import Declined, InputError
from optcompiler.ops import builtin_table
from optcompiler.program import Program, constant, static_shape
from optcompiler.rewriting import Candidate
from optcompiler_passes.prune_channels import Importance, PruneChannels
from tests.support import (
    assert_close,
    filled_program,
    make_context,
    proposals,
    random_inputs,
    run_onnx,
)
from tests.test_channel_graph import NETS, TRANSFORMER, check_against_mask, graph_of

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'

NET = f"""{HEAD}
net (float[4,3,8,8] x) => (float[4,5] y)
<float[32,3,3,3] w1, float[32] b1, float[24,32,3,3] w2, float[24,5] w3, float[5] b3> {{
  c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
  r1 = Relu (c1)
  c2 = Conv (r1, w2)
  r2 = Relu (c2)
  p = GlobalAveragePool (r2)
  f = Flatten (p)
  y = Gemm (f, w3, b3)
}}"""


def offers(pass_: PruneChannels, program: Program) -> dict[tuple[str, str], Candidate]:
    return {(c.site, c.choice): c for c in proposals(pass_, program)[0]}


def weak_net(channels: list[int]) -> Program:
    """NET in which some channels of the first convolution hardly matter."""
    weights = np.random.default_rng(1).standard_normal((32, 3, 3, 3)) / 5
    weights[channels] *= 0.01
    return filled_program(NET, w1=weights, b1=np.zeros(32))


def test_one_candidate_per_group_and_ratio() -> None:
    program = filled_program(NET)
    found = offers(PruneChannels(), program)
    assert list(found) == [
        ("Conv_0", "keep 24 of 32 channels"),
        ("Conv_0", "keep 16 of 32 channels"),
        ("Conv_1", "keep 16 of 24 channels"),
    ]
    assert not any(c.exact for c in found.values())
    _, declined = proposals(PruneChannels(), program)
    assert [(d.site, d.reason) for d in declined] == [("Gemm_0", "reaches output 'y'")]
    for candidate in found.values():
        json.dumps(dict(candidate.details))


def test_counts_are_rounded_to_tiles() -> None:
    program = filled_program(NET)
    fine = offers(PruneChannels(keep_ratio=0.7, multiple_of=1), program)
    assert list(fine) == [
        ("Conv_0", "keep 22 of 32 channels"),
        ("Conv_1", "keep 17 of 24 channels"),
    ]
    found, declined = proposals(PruneChannels(keep_ratio=0.75, multiple_of=32), program)
    assert not found
    assert "0.75 of 32 channels rounds up to all of them" in [d.reason for d in declined]


def test_macs_are_those_of_the_pruned_program() -> None:
    program = filled_program(NET)
    for candidate in offers(PruneChannels(), program).values():
        pruned = program.clone()
        candidate.rewrite(pruned)
        ops = builtin_table()
        counted = [sum(ops.require(n).cost(n).macs for n in p.graph) for p in (program, pruned)]
        assert [candidate.details["macs_before"], candidate.details["macs_after"]] == counted


@pytest.mark.parametrize("importance", get_args(Importance))
def test_weak_channels_leave_first(importance: Importance) -> None:
    weak = [1, 4, 7, 11, 18, 20, 25, 31]
    program = weak_net(weak)
    found = offers(PruneChannels(importance=importance), program)
    candidate = found["Conv_0", "keep 24 of 32 channels"]
    assert candidate.details["removed"] == weak
    pruned = program.clone()
    candidate.rewrite(pruned)
    pruned.verify(like=program)
    assert static_shape(pruned.value("w1")) == (24, 3, 3, 3)
    inputs = random_inputs(program, 5)
    assert_close(run_onnx(pruned, inputs), run_onnx(program, inputs), 0.05)


@pytest.mark.parametrize("name", NETS)
def test_candidates_equal_masking(name: str) -> None:
    program = filled_program(NETS[name])
    pass_ = PruneChannels(keep_ratio=0.5, multiple_of=1, compensate="none")
    groups = {g.name: g for g in graph_of(program).groups}
    for (site, _), candidate in offers(pass_, program).items():
        check_against_mask(program, groups[site], candidate.details["removed"])
        pruned = program.clone()
        candidate.rewrite(pruned)
        pruned.verify(like=program)


def test_the_mean_of_what_leaves_goes_to_the_bias() -> None:
    program = filled_program(NET, b1=np.full(32, 3.0), w1=0.05 * np.ones((32, 3, 3, 3)))
    inputs = make_context(program).calibration[0]
    expected = run_onnx(program, dict(inputs))[0]
    errors = []
    for compensate in ("none", "mean", "linear"):
        pass_ = PruneChannels(keep_ratio=0.5, compensate=compensate)
        pruned = program.clone()
        offers(pass_, program)["Conv_0", "keep 16 of 32 channels"].rewrite(pruned)
        errors.append(float(np.abs(run_onnx(pruned, dict(inputs))[0] - expected).max()))
    assert errors[1] < 0.2 * errors[0]
    assert errors[2] < 0.2 * errors[1]
    node = pruned.node("Conv_1")
    assert node is not None
    assert constant(node.inputs[2]) is not None


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("a = Gemm (x, w1)\n h = Gemm <transB = 1, alpha = 0.5> (a, w2)", "12,16"),
        ("a = Gemm (x, w1)\n h = Gemm (a, w2)", "16,12"),
        ("a = MatMul (x, w1)\n h = MatMul (a, w2)", "16,12"),
        ("a = MatMul (x, w1)\n r = Reshape (a, k)\n c = Conv (r, w2)\n h = Flatten (c)",
         "12,16,1,1"),
    ],
)  # fmt: skip
def test_channels_that_others_determine_cost_nothing(body: str, shape: str) -> None:
    mixed = np.random.default_rng(2).standard_normal((4, 16)) @ np.random.default_rng(3).random(
        (16, 16)
    )
    program = filled_program(
        f"""{HEAD}
        linear (float[64,4] x) => (float[64,3] y)
        <float[4,16] w1, float[{shape}] w2, float[12,3] w3, int64[4] k = {{0, 0, 1, 1}}> {{
          {body}
          y = MatMul (h, w3)
        }}""",
        w1=mixed,
    )
    pass_ = PruneChannels(keep_ratio=0.5)
    pruned = program.clone()
    first = next(iter(offers(pass_, program).values()))
    assert first.choice == "keep 8 of 16 channels"
    first.rewrite(pruned)
    pruned.verify(like=program)
    inputs = random_inputs(program, 8)
    assert_close(run_onnx(pruned, inputs), run_onnx(program, inputs), 0.02)


def test_residual_bias_shrinks_with_its_group() -> None:
    program = filled_program(NETS["residual"])
    pass_ = PruneChannels(keep_ratio=0.5, multiple_of=1)
    pruned = program.clone()
    for candidate in offers(pass_, program).values():
        candidate.rewrite(pruned)
    pruned.verify(like=program)
    run_onnx(pruned)


def test_candidates_of_different_groups_combine_and_stale_ones_decline() -> None:
    program = filled_program(TRANSFORMER)
    found = offers(PruneChannels(keep_ratio=(0.75, 0.5), multiple_of=4), program)
    assert list(found) == [
        ("MatMul_0", "keep 3 of 4 channels"),
        ("MatMul_0", "keep 2 of 4 channels"),
        ("MatMul_6", "keep 16 of 24 channels"),
        ("MatMul_6", "keep 12 of 24 channels"),
    ]
    pruned = program.clone()
    found["MatMul_6", "keep 12 of 24 channels"].rewrite(pruned)
    found["MatMul_0", "keep 2 of 4 channels"].rewrite(pruned)
    pruned.verify(like=program)
    assert static_shape(pruned.value("wo")) == (8, 16)
    run_onnx(pruned)
    with pytest.raises(Declined, match="changed"):
        found["MatMul_6", "keep 16 of 24 channels"].rewrite(pruned)


def test_measures_that_need_data_decline_without() -> None:
    program = filled_program(NET)
    context = make_context(program, calibration=[])
    found, declined = proposals(PruneChannels(importance="taylor"), program, context)
    assert not found
    assert "importance 'taylor' needs calibration data" in [d.reason for d in declined]
    found, _ = proposals(PruneChannels(), program, context)
    assert len(found) == 3


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match=r"keep_ratio 1\.5"):
        PruneChannels(keep_ratio=1.5)
    with pytest.raises(InputError, match="importance='l7'"):
        PruneChannels(importance="l7")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="multiple_of=0"):
        PruneChannels(multiple_of=0)
    with pytest.raises(InputError, match="compensate='yes'"):
        PruneChannels(compensate="yes")  # pyright: ignore[reportArgumentType]
