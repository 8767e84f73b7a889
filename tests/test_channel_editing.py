"""Taking channels out: what is looked up and refused, what their constants leave behind."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from optcompiler.channels import (
    ChannelGraph,
    ChannelGroup,
    absorb,
    absorb_obstacle,
    remove_channels,
    reroute,
    same_group,
    unshare_vectors,
)
from optcompiler.errors import Declined
from optcompiler.ops import builtin_table
from optcompiler.program import Program, constant, static_shape
from tests.support import assert_close, filled_program, random_inputs, run_onnx

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'

MLP = f"""{HEAD}
mlp (float[2,4] x) => (float[2,3] y)
<float[4,6] w1, float[6] b1, float[6,5] w2, float[5,3] w3> {{
  [first] a = Gemm (x, w1, b1)
  [act] r = Relu (a)
  [second] b = MatMul (r, w2)
  [third] y = MatMul (b, w3)
}}"""


def graph_of(program: Program) -> ChannelGraph:
    return ChannelGraph(program, builtin_table())


def group_of(program: Program, name: str) -> ChannelGroup:
    group = graph_of(program).group(name)
    assert group is not None
    return group


def node_of(program: Program, name: str) -> ir.Node:
    node = program.node(name)
    assert node is not None
    return node


# -- looking up -------------------------------------------------------------------------------


def test_groups_by_name() -> None:
    graph = graph_of(filled_program(MLP))
    assert [g.name for g in graph.groups] == ["first", "second", "third"]
    assert (
        [graph.group(n).signature for n in ("first", "second")]
        == [  # type: ignore[union-attr]
            g.signature for g in graph.groups[:2]
        ]
    )
    assert graph.group("act") is None
    assert graph.group("first#2") is None
    first = graph.groups[0]
    assert (first.rows, first.exact, first.pinned) == (1, True, "")
    assert {(m.value, m.axis) for m in first.members} == {
        ("w1", 1), ("b1", 0), ("a", 1), ("r", 1), ("w2", 0),
    }  # fmt: skip


def test_several_groups_of_one_node_are_numbered() -> None:
    program = filled_program(
        f"""{HEAD}
        net (float[2,4] x) => (float[2,3] y, float[2,3] z)
        <float[4,6] w1, float[2,3] w2, float[4,3] w3, int64[2] k = {{2, 4}}> {{
          [one] a = MatMul (x, w1)
          [cut] p, q = Split <axis = 1> (a, k)
          [two] y = MatMul (p, w2)
          [three] z = MatMul (q, w3)
        }}"""
    )
    graph = graph_of(program)
    assert [(g.name, g.channels) for g in graph.groups[:2]] == [("one", 2), ("one#2", 4)]
    second = graph.group("one#2")
    assert second is not None
    assert second.consumers == ("three",)
    assert second.signature != graph.groups[0].signature
    weight = second.member(program.value("w1"), 1)
    assert weight is not None
    assert weight.channel_of.tolist() == [-1, -1, 0, 1, 2, 3]
    assert weight.indices([3, 1]).tolist() == [3, 5]
    assert second.member(program.value("w1"), 0) is None
    assert second.member(None, 1) is None


def test_what_a_consumer_reads_of_a_group() -> None:
    program = filled_program(MLP)
    graph = graph_of(program)
    first, second, _ = graph.groups
    read = graph.consumed(first, node_of(program, "second"))
    assert read is not None
    assert (read.value, read.axis) == ("r", 1)
    assert graph.consumed(second, node_of(program, "second")) is None
    assert graph.consumed(first, node_of(program, "act")) is None
    assert graph.consumed(first, node_of(program, "third")) is None


def test_heads_take_several_rows() -> None:
    program = filled_program(
        f"""{HEAD}
        net (float[2,5,4] x) => (float[2,5,3] y)
        <float[4,6] w1, float[6,3] w2, int64[4] k = {{0, 0, 2, 3}}, int64[3] l = {{0, 0, 6}}> {{
          [one] a = MatMul (x, w1)
          [part] b = Reshape (a, k)
          [join] c = Reshape (b, l)
          [two] y = MatMul (c, w2)
        }}"""
    )
    group = group_of(program, "one")
    assert (group.channels, group.rows) == (2, 3)
    remove_channels(program, builtin_table(), group, [0])
    assert static_shape(program.value("w2")) == (3, 3)
    assert constant(node_of(program, "part").inputs[1]).tolist() == [0, 0, 1, 3]


def test_why_a_group_is_pinned() -> None:
    """The interface first, then what operators fix, then that nothing would be left."""
    program = filled_program(
        f"""{HEAD}
        net (float[2,4] x) => (float[2,3] y, float[2,1] z)
        <float[4,6] w1, float[6,3] w2, float[4,1] w3, float[1,1] w4> {{
          [one] a = MatMul (x, w1)
          [odd] b = Trilu (a)
          [two] y = MatMul (b, w2)
          [slim] c = MatMul (x, w3)
          [out] z = MatMul (c, w4)
        }}"""
    )
    pinned = {g.name: g.pinned for g in graph_of(program).groups}
    assert pinned == {
        "one": "Trilu 'odd' states no channels",
        "two": "reaches output 'y'",
        "slim": "it is a single channel",
        "out": "reaches output 'z'",
    }
    hidden = program.value("b")
    assert hidden is not None
    hidden.shape = None
    assert group_of(program, "one").pinned == "Trilu 'odd' has 'b' of unknown shape"


def test_couplings_that_do_not_fit_tie_nothing() -> None:
    """A bias of one element serves all channels; it is fixed by its node and pins nothing else."""
    program = filled_program(
        f"""{HEAD}
        net (float[2,4] x) => (float[2,3] y) <float[4,6] w1, float[1] b1, float[6,3] w2> {{
          [one] a = MatMul (x, w1)
          [add] b = Add (a, b1)
          [two] y = MatMul (b, w2)
        }}"""
    )
    group = group_of(program, "one")
    assert group.pinned == ""
    assert "b1" not in {m.value for m in group.members}
    remove_channels(program, builtin_table(), group, [5])
    assert static_shape(program.value("b1")) == (1,)


# -- refusing ---------------------------------------------------------------------------------


def test_what_cannot_be_removed_is_said() -> None:
    program = filled_program(MLP)
    before = program.content_hash()
    graph = graph_of(program)
    first, _, last = graph.groups
    for group, channels, said in (
        (last, [0], "channels of 'third' cannot shrink: reaches output 'y'."),
        (first, [6], "'first' has 6 channels, asked for [6]."),
        (first, [-1, 2], "'first' has 6 channels, asked for [-1, 2]."),
        (first, [5, 4, 3, 2, 1, 0, 0], "all 6 channels of 'first' would go; keep one."),
    ):
        with pytest.raises(Declined) as caught:
            graph.remove(group, channels)
        assert str(caught.value) == said
    assert program.content_hash() == before


def test_repeated_channels_are_removed_once() -> None:
    program = filled_program(MLP)
    weight = constant(program.value("w2"))
    assert weight is not None
    graph = graph_of(program)
    graph.remove(graph.groups[0], [4, 1, 4])
    assert static_shape(program.value("w1")) == (4, 4)
    assert static_shape(program.value("a")) == (2, 4)
    np.testing.assert_array_equal(constant(program.value("w2")), weight[[0, 2, 3, 5]])


def test_removing_nothing_changes_nothing() -> None:
    program = filled_program(MLP)
    before = program.content_hash()
    graph = graph_of(program)
    graph.remove(graph.groups[0], [])
    assert program.content_hash() == before


def test_groups_are_recognised_in_a_later_state() -> None:
    program = filled_program(MLP)
    group = group_of(program, "first")
    assert same_group(graph_of(program.clone()), group).signature == group.signature
    remove_channels(program, builtin_table(), group, [0])
    with pytest.raises(Declined) as caught:
        same_group(graph_of(program), group)
    assert str(caught.value) == (
        "the channel group 'first' changed: it had 6 channels made by first, and has 5 by first."
    )
    node_of(program, "first").name = "other"
    with pytest.raises(Declined, match="the channel group 'first' is gone"):
        same_group(graph_of(program), group)


# -- vectors stored once ----------------------------------------------------------------------


def test_only_shared_floating_vectors_get_copies() -> None:
    program = filled_program(
        f"""{HEAD}
        net (float[2,4] x) => (float[2,4] y)
        <float[4] v, float[1,4] r, float[4,4] w, float s = {{2.0}}, int64[2] k = {{2, 4}}> {{
          [a] a = Add (x, v)
          [b] b = Add (a, v)
          [c] c = Mul (b, v)
          [d] d = Add (c, r)
          [e] e = MatMul (d, w)
          [f] f = MatMul (e, w)
          [g] g = Mul (f, s)
          [h] h = Mul (g, s)
          [i] i = Reshape (h, k)
          [j] y = Reshape (i, k)
        }}"""
    )
    expected = run_onnx(program)
    unshare_vectors(program)
    read = {n.name: n.inputs[1].name for n in program.graph}  # type: ignore[union-attr]
    assert read == {
        "a": "v", "b": "v_1", "c": "v_2", "d": "r", "e": "w", "f": "w", "g": "s", "h": "s",
        "i": "k", "j": "k",
    }  # fmt: skip
    assert_close(run_onnx(program), expected, 0)


# -- constants left behind --------------------------------------------------------------------


def read_by(node: str, tensors: str, width: int = 4, out: str = "2,3") -> Program:
    """A consumer `n` of [2, width] inputs."""
    return filled_program(
        f"{HEAD}\nnet (float[2,{width}] x) => (float[{out}] y) <{tensors}> {{ {node} }}"
    )


CONSUMERS = {
    "gemm": read_by("[n] y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b)", "float[4,3] w, float[3] b"),
    "gemm transposed": read_by("[n] y = Gemm <transB = 1> (x, w, b)", "float[3,4] w, float[3] b"),
    "gemm without bias": read_by("[n] y = Gemm <alpha = 2.0, beta = 0.5> (x, w)", "float[4,3] w"),
    "gemm that ignores its bias": read_by(
        "[n] y = Gemm <beta = 0.0> (x, w, b)", "float[4,3] w, float[3] b"
    ),
    "gemm of a shared bias": read_by(
        "[n] z = Gemm (x, w, b)\n[other] y = Add (z, b)", "float[4,3] w, float[3] b"
    ),
    "matmul and add": read_by(
        "[n] z = MatMul (x, w)\n[add] y = Add (b, z)", "float[4,3] w, float[3] b"
    ),
    "matmul and another": read_by("[n] z = MatMul (x, w)\n[r] y = Relu (z)", "float[4,3] w"),
    "matmul read twice": read_by("[n] z = MatMul (x, w)\n[add] y = Add (z, z)", "float[4,3] w"),
    "matmul and a deep add": read_by(
        "[n] z = MatMul (x, w)\n[add] y = Add (z, b)", "float[4,3] w, float[1,2,3] b", 4, "1,2,3"
    ),
    "matmul and a computed add": read_by(
        "[n] z = MatMul (x, w)\n[r] q = Neg (z)\n[add] y = Add (z, q)", "float[4,3] w"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSUMERS)
def test_a_constant_input_goes_into_the_bias(name: str) -> None:
    """With inputs 1 and 3 set to 0, the node gives what it gave for their constants."""
    program = CONSUMERS[name].clone()
    constants = np.array([0.0, 1.5, 0.0, -2.0])
    inputs = random_inputs(program, 3)
    inputs["x"][:, [1, 3]] = constants[[1, 3]]
    expected = run_onnx(program, inputs)
    node = node_of(program, "n")
    assert absorb_obstacle(node) == ""
    weight = constant(node.inputs[1])
    assert weight is not None
    weight = weight.copy()
    absorb(program, node, constants)
    program.verify()
    np.testing.assert_array_equal(constant(node.inputs[1]), weight)
    inputs["x"][:, [1, 3]] = 0
    assert_close(run_onnx(program, inputs), expected, 1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_constant_image_channel_goes_into_the_bias(groups: int, bias: bool) -> None:
    program = filled_program(
        f"{HEAD}\nnet (float[2,4,5,5] x) => (float[2,6,3,3] y) "
        f"<float[6,{4 // groups},3,3] w{', float[6] b' if bias else ''}> "
        f"{{ [n] y = Conv <group = {groups}> (x, w{', b' if bias else ''}) }}"
    )
    constants = np.array([0.0, 1.5, -0.5, 0.0])
    inputs = random_inputs(program, 3)
    inputs["x"][:, [1, 2]] = constants[None, [1, 2], None, None]
    expected = run_onnx(program, inputs)
    absorb(program, node_of(program, "n"), constants)
    inputs["x"][:, [1, 2]] = 0
    assert_close(run_onnx(program, inputs), expected, 1e-5)
    assert len(node_of(program, "n").inputs) == 3


def test_biases_keep_their_names_and_users() -> None:
    program = CONSUMERS["gemm of a shared bias"].clone()
    shared = constant(program.value("b"))
    absorb(program, node_of(program, "n"), np.ones(4))
    assert node_of(program, "n").inputs[2].name == "n.bias"  # type: ignore[union-attr]
    np.testing.assert_array_equal(constant(program.value("b")), shared)
    alone = CONSUMERS["gemm"].clone()
    absorb(alone, node_of(alone, "n"), np.ones(4))
    assert node_of(alone, "n").inputs[2].name == "b"  # type: ignore[union-attr]
    added = CONSUMERS["matmul and another"].clone()
    absorb(added, node_of(added, "n"), np.ones(4))
    assert [n.name for n in added.graph] == ["n", "n.add", "r"]
    assert [v.name for v in node_of(added, "n.add").inputs if v] == ["z", "n.bias"]
    assert node_of(added, "n.add").outputs[0].name == "z.biased"
    assert node_of(added, "n.add").outputs[0].shape == node_of(added, "n").outputs[0].shape
    assert node_of(added, "n.add").outputs[0].dtype == ir.DataType.FLOAT


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (read_by("[n] y = Relu (x)", "", 3), "Relu 'n' has no bias to hold a constant"),
        (read_by("[n] y = Add (x, b)", "float[3] b", 3), "Add 'n' has no bias to hold a constant"),
        (read_by("[n] y = MatMul (x, w)", "float[4,3] w"), "MatMul 'n' has no place for a bias"),
        (read_by("[t] z = Transpose (x)\n[n] y = Gemm <transA = 1> (z, w)", "float[4,3] w"),
         "Gemm 'n' transposes its input"),
        (read_by("[q] v = Neg (w)\n[n] y = Gemm (x, v)", "float[4,3] w"),
         "Gemm 'n' has a weight or a bias that is computed"),
        (read_by("[q] v = Neg (b)\n[n] y = Gemm (x, w, v)", "float[4,3] w, float[3] b"),
         "Gemm 'n' has a weight or a bias that is computed"),
        (read_by("[n] z = MatMul (x, w)\n[r] y = Relu (z)", "float[5,4,3] w", 4, "5,2,3"),
         "MatMul 'n' has no place for a bias"),
    ],
)  # fmt: skip
def test_where_no_constant_can_go(program: Program, said: str) -> None:
    node = node_of(program, "n")
    assert absorb_obstacle(node) == said
    with pytest.raises(Declined) as caught:
        absorb(program, node, np.ones(4))
    assert str(caught.value) == f"{said}."


def test_leaving_channels_can_be_made_up_for() -> None:
    """Channel 2 of `first` always gives 0.75: without it, `second` gets that as a bias."""
    program = filled_program(MLP)
    weight, bias = constant(program.value("w1")), constant(program.value("b1"))
    assert weight is not None
    assert bias is not None
    weight, bias = weight.copy(), bias.copy()
    weight[:, 2], bias[2] = 0, 0.75
    program.set_weight(program.value("w1"), weight)  # type: ignore[arg-type]
    program.set_weight(program.value("b1"), bias)  # type: ignore[arg-type]
    expected = run_onnx(program)
    seen: list[ChannelGroup] = []

    def make_up(graph: ChannelGraph, group: ChannelGroup) -> dict[str, np.ndarray]:
        seen.append(group)
        return {"second": np.array([9, 9, 0.75, 9, 9, 9])}

    remove_channels(program, builtin_table(), group_of(program, "first"), [2], make_up)
    assert [g.name for g in seen] == ["first"]
    assert static_shape(program.value("w2")) == (5, 5)
    assert_close(run_onnx(program), expected, 1e-5)
    before = len(program.graph)
    zeros = {"second": np.array([0, 1.0, 1.0, 1.0, 1.0])}
    group = group_of(program, "first")
    remove_channels(program, builtin_table(), group, [0], lambda *_: zeros)
    assert len(program.graph) == before


# -- channels that stand in for others --------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_staying_channels_stand_in_for_leaving_ones(transposed: bool) -> None:
    shape, attributes = ("3,4", "<transB = 1>") if transposed else ("4,3", "")
    program = read_by(f"[n] y = Gemm {attributes} (x, w)", f"float[{shape}] w")
    mixing = np.array([[0.5, -1.0], [2.0, 0.25]])
    inputs = random_inputs(program, 1)
    inputs["x"][:, [1, 3]] = inputs["x"][:, [0, 2]] @ mixing.T.astype(np.float32)
    expected = run_onnx(program, inputs)
    assert reroute(program, node_of(program, "n"), np.array([1, 3]), np.array([0, 2]), mixing)
    inputs["x"][:, [1, 3]] = 0
    assert_close(run_onnx(program, inputs), expected, 1e-5)
    assert constant(program.value("w")).dtype == np.float32  # type: ignore[union-attr]


def test_image_channels_stand_in_too() -> None:
    program = filled_program(
        f"{HEAD}\nnet (float[1,3,4,4] x) => (float[1,2,2,2] y) <float[2,3,3,3] w> "
        "{ [n] y = Conv (x, w) }"
    )
    inputs = random_inputs(program, 1)
    inputs["x"][:, 2] = 0.5 * inputs["x"][:, 0]
    expected = run_onnx(program, inputs)
    assert reroute(program, node_of(program, "n"), np.array([2]), np.array([0]), np.array([[0.5]]))
    inputs["x"][:, 2] = 0
    assert_close(run_onnx(program, inputs), expected, 1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "net (float[1,4,4,4] x) => (float[1,2,2,2] y) <float[2,2,3,3] w> "
        "{ [n] y = Conv <group = 2> (x, w) }",
        "net (float[2,3] x) => (float[2,3] y) <float[3,3] w> "
        "{ [n] z = MatMul (x, w) [o] y = MatMul (z, w) }",
        "net (float[2,3] x, float[3,3] w) => (float[2,3] y) { [n] y = MatMul (x, w) }",
    ],
)
def test_shared_computed_and_grouped_weights_are_not_rerouted(text: str) -> None:
    program = filled_program(f"{HEAD}\n{text}")
    before = program.content_hash()
    assert not reroute(program, node_of(program, "n"), np.array([1]), np.array([0]), np.eye(1))
    assert program.content_hash() == before
