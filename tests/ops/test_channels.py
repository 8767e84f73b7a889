"""Channel rules operator by operator: what they tie; removal through them equals masking."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from optcompiler.channels import ChannelGroup
from optcompiler.ops.axes import row_major
from optcompiler.ops.channels import CHANNEL_RULES
from optcompiler.ops.spec import Channels
from optcompiler.program import Program
from tests.support import filled_program
from tests.test_channel_graph import check_against_mask, graph_of

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'

# Body between a convolution that makes `a` [2, 8, 4, 4] and one that reads `b` [2, C, 4, 4];
# the extra tensors of the body; channels of `b`; channels of the group.
IMAGES = {
    "unary": ("b = Softplus (a)", "", 8, 8),
    "self": ("b = Mul (a, a)", "", 8, 8),
    "vector": ("b = Mul (a, s)", "float[8,1,1] s", 8, 8),
    "scalar": ("b = Div (a, s)", "float s = {2.0}", 8, 8),
    "variadic": ("b = Sum (a, s, t)", "float[1,8,1,1] s, float[1,1,4,4] t", 8, 8),
    "prelu": ("b = PRelu (a, s)", "float[8,1,1] s", 8, 8),
    "where": ("c = Greater (a, s)\n b = Where (c, a, s)", "float[8,1,1] s", 8, 8),
    "dropout": ("b = Dropout (a)", "", 8, 8),
    "cast": ("c = Cast <to = 11> (a)\n b = Cast <to = 1> (c)", "", 8, 8),
    "maxpool": ("b = MaxPool <kernel_shape=[3,3], pads=[1,1,1,1]> (a)", "", 8, 8),
    "avgpool": ("b = AveragePool <kernel_shape=[3,3], pads=[1,1,1,1]> (a)", "", 8, 8),
    "lppool": ("b = LpPool <kernel_shape=[3,3], pads=[1,1,1,1]> (a)", "", 8, 8),
    "squeeze and excite": (
        "p = GlobalAveragePool (a)\n q = Conv (p, s)\n g = Sigmoid (q)\n b = Mul (a, g)",
        "float[8,8,1,1] s", 8, 8,
    ),
    "batchnorm": ("b = BatchNormalization (a, s, t, u, var)",
                  "float[8] s, float[8] t, float[8] u, float[8] var", 8, 8),
    "instancenorm": ("b = InstanceNormalization (a, s, t)", "float[8] s, float[8] t", 8, 8),
    "softmax": ("b = Softmax <axis = 3> (a)", "", 8, 8),
    "cumsum": ("b = CumSum (a, k)", "int64[1] k = {2}", 8, 8),
    "transpose": ("c = Transpose <perm=[0,2,3,1]> (a)\n d = Relu (c)\n"
                  "b = Transpose <perm=[0,3,1,2]> (d)", "", 8, 8),
    "squeeze": ("u = Unsqueeze (a, k)\n b = Squeeze (u, k)", "int64[1] k = {2}", 8, 8),
    "concat self": ("b = Concat <axis = 1> (a, a)", "", 16, 8),
    "concat rows": ("c = Concat <axis = 2> (a, a)\n b = Slice (c, k0, k1, k2)",
                    "int64[1] k0 = {2}, int64[1] k1 = {6}, int64[1] k2 = {2}", 8, 8),
    "split": ("c, d = Split <axis = 1, num_outputs = 2> (a)\n b = Neg (d)", "", 4, 4),
    "pad": ("c = Pad (a, k)\n b = MaxPool <kernel_shape=[3,3]> (c)",
            "int64[8] k = {0,0,1,1,0,0,1,1}", 8, 8),
    "reduce": ("c = ReduceMax (a, k)\n b = Add (a, c)", "int64[2] k = {2, 3}", 8, 8),
    "reduce flat": ("c = ReduceMean <keepdims = 0> (a, k)\n d = Unsqueeze (c, k)\n b = Add (a, d)",
                    "int64[2] k = {2, 3}", 8, 8),
    "resize scales": ("c = Resize <mode=\"linear\"> (a, , k)\n b = MaxPool "
                      "<kernel_shape=[2,2], strides=[2,2]> (c)", "float[4] k = {1, 1, 2, 2}", 8, 8),
    "expand": ("p = GlobalAveragePool (a)\n b = Expand (p, k)", "int64[4] k = {1, 8, 4, 4}", 8, 8),
    "tile": ("p = GlobalMaxPool (a)\n b = Tile (p, k)", "int64[4] k = {1, 1, 4, 4}", 8, 8),
    "depthwise multiplier": ("b = Conv <group = 8> (a, s)", "float[16,1,1,1] s", 16, 8),
    "grouped": ("b = Conv <group = 2> (a, s, t)", "float[4,4,1,1] s, float[4] t", 4, 4),
    "transposed depthwise": ("b = ConvTranspose <group = 8> (a, s, t)",
                             "float[8,2,1,1] s, float[16] t", 16, 8),
    "transposed grouped": ("b = ConvTranspose <group = 2> (a, s, t)",
                           "float[8,3,1,1] s, float[6] t", 6, 4),
    "depth to space": ("c = DepthToSpace <blocksize = 2> (a)\n"
                       "b = MaxPool <kernel_shape=[2,2], strides=[2,2]> (c)", "", 2, 2),
    "space to depth": ("c = SpaceToDepth <blocksize = 2> (a)\n"
                       "b = Resize <mode = \"nearest\"> (c, , k)",
                       "float[4] k = {1, 1, 2, 2}", 32, 8),
    "qdq": ("c = QuantizeLinear <axis = 1> (a, s, z)\n b = DequantizeLinear <axis = 1> (c, s, z)",
            "float[8] s = {1,1,1,1,1,1,1,1}, int8[8] z = {0,0,0,0,0,0,0,0}", 8, 8),
    "qdq per tensor": ("c = QuantizeLinear (a, s, z)\n b = DequantizeLinear (c, s, z)",
                       "float s = {0.1}, uint8 z = {128}", 8, 8),
    "shape": ("c = Shape <start = 2> (a)\n d = ConstantOfShape (c)\n b = Add (a, d)", "", 8, 8),
    "channel attention": (
        "r = Reshape (a, k)\n p = ReduceMean (r, j)\n q = Mul (r, p)\n b = Reshape (q, l)",
        "int64[3] k = {0, 0, -1}, int64[1] j = {2}, int64[4] l = {2, 8, 4, 4}", 8, 8,
    ),
}  # fmt: skip

# As above, with matrices: `a` is [2, 3, 8] and `b` [2, 3, K].
SEQUENCES = {
    "layernorm rows": ("b = LayerNormalization <axis = -1> (a, s)", "float[8] s", 8, None),
    "matmul weight left": (
        "c = Transpose <perm=[0,2,1]> (a)\n d = MatMul (s, c)\n b = Transpose <perm=[0,2,1]> (d)",
        "float[6,8] s", 6, 8,
    ),
    "attention": ("c = Transpose <perm=[0,2,1]> (a)\n d = MatMul (a, c)\n b = MatMul (d, a)",
                  "", 8, 8),
    "gather rows": ("b = Gather <axis = 1> (a, k)", "int64[3] k = {2, 1, 0}", 8, 8),
    "heads": ("c = Reshape (a, k)\n d = Relu (c)\n b = Reshape (d, l)",
              "int64[4] k = {2, 3, 4, 2}, int64[3] l = {2, 3, 8}", 8, 4),
    "merged rows": ("c = Reshape (a, k)\n d = Relu (c)\n b = Reshape (d, l)",
                    "int64[2] k = {-1, 8}, int64[3] l = {2, 3, 8}", 8, 8),
    "add rows": ("b = Add (a, s)", "float[3,8] s", 8, 8),
}  # fmt: skip

PINNING = {
    "softmax": ("b = Softmax <axis = 1> (a)", "", 8),
    "slice": ("b = Slice (a, k0, k1, k2)",
              "int64[1] k0 = {0}, int64[1] k1 = {4}, int64[1] k2 = {1}", 4),
    "pad": ("b = Pad (a, k)", "int64[8] k = {0,1,0,0,0,1,0,0}", 10),
    "tile": ("b = Tile (a, k)", "int64[4] k = {1, 2, 1, 1}", 16),
    "gather": ("b = Gather <axis = 1> (a, k)", "int64[2] k = {0, 3}", 2),
    "reduce": ("c = ReduceMean (a, k)\n b = Add (a, c)", "int64[1] k = {1}", 8),
    "shape": ("c = Shape (a)\n d = ConstantOfShape (c)\n b = Add (a, d)", "", 8),
    "shuffle": ("c = Reshape (a, k)\n d = Transpose <perm = [0,2,1,3,4]> (c)\n b = Reshape (d, l)",
                "int64[5] k = {2, 2, 4, 4, 4}, int64[4] l = {2, 8, 4, 4}", 8),
    "unknown": ("b = Trilu (a)", "", 8),
    "argmax": ("c = ArgMax <axis = 1> (a)\n d = Cast <to = 1> (c)\n b = Add (a, d)", "", 8),
    "flat softmax": ("c = Flatten (a)\n d = Softmax (c)\n b = Reshape (d, k)",
                     "int64[4] k = {2, 8, 4, 4}", 8),
}  # fmt: skip


def image_net(body: str, tensors: str, channels: int) -> Program:
    more = f", {tensors}" if tensors else ""
    return filled_program(
        f"""{HEAD}
        net (float[2,3,4,4] x) => (float[2,5,4,4] y)
        <float[8,3,1,1] w1, float[5,{channels},1,1] w2{more}> {{
          a = Conv (x, w1)
          {body}
          y = Conv (b, w2)
        }}"""
    )


def sequence_net(body: str, tensors: str, channels: int) -> Program:
    more = f", {tensors}" if tensors else ""
    return filled_program(
        f"""{HEAD}
        net (float[2,3,4] x) => (float[2,3,5] y)
        <float[4,8] w1, float[{channels},5] w2{more}> {{
          a = MatMul (x, w1)
          {body}
          y = MatMul (b, w2)
        }}"""
    )


def first_group(program: Program) -> ChannelGroup:
    return graph_of(program).groups[0]


@pytest.mark.parametrize("name", IMAGES)
def test_image_operators(name: str) -> None:
    body, tensors, made, channels = IMAGES[name]
    program = image_net(body, tensors, made)
    group = first_group(program)
    assert group.pinned == ""
    assert group.channels == channels
    check_against_mask(program, group, [0] if channels < 4 else [1, channels - 1])


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence_operators(name: str) -> None:
    body, tensors, made, channels = SEQUENCES[name]
    program = sequence_net(body, tensors, made)
    group = first_group(program)
    assert group.pinned == ""
    if channels is None:
        assert not group.exact
        return
    assert group.exact
    assert group.channels == channels
    if name != "attention":
        check_against_mask(program, group, [1, channels - 1])


@pytest.mark.parametrize("name", PINNING)
def test_pinning_operators(name: str) -> None:
    body, tensors, made = PINNING[name]
    program = image_net(body, tensors, made)
    group = first_group(program)
    assert group.pinned
    assert "single channel" not in group.pinned or name == "shuffle"


def test_group_normalization_loses_whole_groups() -> None:
    program = image_net("b = GroupNormalization <num_groups = 4> (a, s, t)",
                        "float[8] s, float[8] t", 8)  # fmt: skip
    node = program.node("GroupNormalization_0")
    assert node is not None
    node.outputs[0].shape = node.inputs[0].shape  # type: ignore[union-attr]
    group = first_group(program)
    assert group.pinned == ""
    assert group.channels == 4
    rule = CHANNEL_RULES["GroupNormalization"](node)
    assert isinstance(rule, Channels)
    assert rule.repair is not None
    last = rule.couplings[1].target
    rule.repair(program, node, {last: 6})
    assert node.attributes["num_groups"].as_int() == 3


def test_embedding_tables_make_their_hidden_axis() -> None:
    program = filled_program(
        f"""{HEAD}
        net (int64[2,3] x) => (float[2,3,5] y)
        <float[4,8] table, float[8,5] w2> {{
          a = Gather (table, x)
          y = MatMul (a, w2)
        }}"""
    )
    group = first_group(program)
    assert group.producers == ("Gather_0",)
    check_against_mask(program, group, [0, 3])


def test_weights_behind_quantisation_are_followed() -> None:
    program = filled_program(
        f"""{HEAD}
        net (float[2,4] x) => (float[2,5] y)
        <float[4,8] w1, float[8] s = {{1,1,1,1,1,1,1,1}}, float[8,5] w2,
         int8[8] z = {{0,0,0,0,0,0,0,0}}> {{
          q = QuantizeLinear <axis = 1> (w1, s, z)
          d = DequantizeLinear <axis = 1> (q, s, z)
          a = MatMul (x, d)
          y = MatMul (a, w2)
        }}""",
        w1=4 * np.random.default_rng(0).standard_normal((4, 8)),
    )
    group = first_group(program)
    assert group.producers == ("MatMul_0",)
    assert {m.value for m in group.members} == {"w1", "q", "d", "s", "z", "a", "w2"}
    check_against_mask(program, group, [2])


@pytest.mark.parametrize(
    ("old", "new", "runs"),
    [
        ((2, 64, 7, 7), (2, 3136), [([3, 2, 1], [1]), ([0], [0])]),
        (("B", 5, 12, 64), ("B", 5, 768), [([3, 2], [2]), ([1], [1]), ([0], [0])]),
        (("N", 64, 1, 1), (None, 64), [([1], [1])]),
        ((4, 6), (3, 8), [([1, 0], [1, 0])]),
        (("N", 6), ("M", 6), [([1], [1])]),
        ((1, 5), (5,), [([1], [0])]),
    ],
)
def test_reshapes_fall_into_runs(old: tuple, new: tuple, runs: list) -> None:
    assert row_major(old, new) == runs


def test_rules_are_for_operators_of_onnx() -> None:
    known = {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""}
    assert set(CHANNEL_RULES) <= known
