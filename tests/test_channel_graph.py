"""Channel groups of whole programs, and removing channels against masking them."""

from __future__ import annotations

import numpy as np
import pytest

from optcompiler.channels import ChannelGraph, ChannelGroup, remove_channels, unshare_vectors
from optcompiler.errors import Declined
from optcompiler.ops import builtin_table
from optcompiler.program import Program, constant, static_shape
from tests.support import assert_close, filled_program, random_inputs, run_onnx

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'

CHAIN = f"""{HEAD}
chain (float[2,3,8,8] x) => (float[2,5,6,6] y)
<float[8,3,3,3] w1, float[8] b1, float[8] s, float[8] o, float[8] m, float[8] var,
 float[6,8,3,3] w2, float[5,6,1,1] w3, float[5] b3> {{
  c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
  n1 = BatchNormalization (c1, s, o, m, var)
  r1 = Relu (n1)
  c2 = Conv (r1, w2)
  r2 = Sigmoid (c2)
  y = Conv (r2, w3, b3)
}}"""

RESIDUAL = f"""{HEAD}
residual (float[2,3,8,8] x) => (float[2,4] y)
<float[8,3,3,3] w1, float[8,8,3,3] w2, float[8] b2, float[6,8,1,1] w3, float[8,6,1,1] w4,
 float[8,4] wf, float[4] bf> {{
  stem = Conv <pads = [1,1,1,1]> (x, w1)
  a = Conv <pads = [1,1,1,1]> (stem, w2, b2)
  s1 = Add (stem, a)
  t = Conv (s1, w3)
  u = Relu (t)
  b = Conv (u, w4)
  s2 = Add (s1, b)
  p = GlobalAveragePool (s2)
  f = Flatten (p)
  y = Gemm (f, wf, bf)
}}"""

CONCAT = f"""{HEAD}
concat (float[2,3,8,8] x) => (float[2,4,8,8] y)
<float[6,3,1,1] wa, float[4,3,1,1] wb, float[10] s, float[10] o, float[10] m, float[10] var,
 float[4,10,1,1] wc> {{
  a = Conv (x, wa)
  b = Conv (x, wb)
  c = Concat <axis = 1> (a, b)
  n = BatchNormalization (c, s, o, m, var)
  r = Relu (n)
  y = Conv (r, wc)
}}"""

SEPARABLE = f"""{HEAD}
separable (float[2,3,8,8] x) => (float[2,4,8,8] y)
<float[8,3,1,1] w1, float[8,1,3,3] wd, float[8] bd, float[6,8,1,1] w2,
 float[12,1,3,3] wm, float[4,12,1,1] w3,
 float lo = {{0.0}}, float hi = {{6.0}}> {{
  e = Conv (x, w1)
  d = Conv <pads = [1,1,1,1], group = 8> (e, wd, bd)
  q = Clip (d, lo, hi)
  p = Conv (q, w2)
  m = Conv <pads = [1,1,1,1], group = 6> (p, wm)
  y = Conv (m, w3)
}}"""

FLATTEN = f"""{HEAD}
flatten (float[N,3,4,4] x) => (float[N,5] y)
<float[6,3,3,3] w1, float[96,8] wa, float[8] ba, float[5,8] wb> {{
  c = Conv <pads = [1,1,1,1]> (x, w1)
  r = Relu (c)
  f = Flatten (r)
  h = Gemm <alpha = 0.5, beta = 2.0> (f, wa, ba)
  t = Tanh (h)
  y = Gemm <transB = 1> (t, wb)
}}"""

GROUPED = f"""{HEAD}
grouped (float[2,3,6,6] x) => (float[2,4,6,6] y)
<float[8,3,1,1] w1, float[12,4,3,3] wg, float[12] bg, float[4,12,1,1] w3> {{
  a = Conv (x, w1)
  g = Conv <pads = [1,1,1,1], group = 2> (a, wg, bg)
  r = Relu (g)
  y = Conv (r, w3)
}}"""

TRANSPOSED = f"""{HEAD}
transposed (float[2,3,5,5] x) => (float[2,3,11,11] y)
<float[6,3,1,1] w1, float[6,4,3,3] wt, float[4] bt, float[3,4,1,1] w2> {{
  a = Conv (x, w1)
  t = ConvTranspose <strides = [2,2]> (a, wt, bt)
  l = LeakyRelu (t)
  y = Conv (l, w2)
}}"""

SPLIT = f"""{HEAD}
split (float[2,3,6,6] x) => (float[2,4,6,6] y)
<float[10,3,1,1] w1, float[4,5,1,1] wa, float[4,5,1,1] wb, int64[2] sizes = {{5, 5}}> {{
  c = Conv (x, w1)
  a, b = Split <axis = 1> (c, sizes)
  p = Conv (a, wa)
  q = Conv (b, wb)
  y = Add (p, q)
}}"""

GROUP_NORM = f"""{HEAD}
groupnorm (float[2,3,6,6] x) => (float[2,4,6,6] y)
<float[12,3,1,1] w1, float[6] is, float[6] ib, float[12,1,1] s, float[12,1,1] o,
 float[4,12,1,1] w2,
 int64[3] fold = {{0, 6, -1}}, int64[4] unfold = {{0, 12, 6, 6}}> {{
  c = Conv (x, w1)
  f = Reshape (c, fold)
  i = InstanceNormalization (f, is, ib)
  u = Reshape (i, unfold)
  v = Mul (u, s)
  w = Add (v, o)
  y = Conv (w, w2)
}}"""

TRANSFORMER = f"""{HEAD}
transformer (float[B,5,16] x) => (float[B,5,16] y)
<float[16,16] wq, float[16] bq, float[16,16] wk, float[16,16] wv, float[16,16] wo, float[16] bo,
 float[16] lns, float[16] lnb, float[16,24] w1, float[24] b1, float[24,16] w2, float[16] b2,
 float scale = {{0.5}}, int64[4] heads = {{0, 0, 4, 4}}, int64[3] merge = {{0, 0, 16}}> {{
  q0 = MatMul (x, wq)
  q1 = Add (q0, bq)
  q2 = Reshape (q1, heads)
  q = Transpose <perm = [0,2,1,3]> (q2)
  k0 = MatMul (x, wk)
  k2 = Reshape (k0, heads)
  k = Transpose <perm = [0,2,3,1]> (k2)
  v0 = MatMul (x, wv)
  v2 = Reshape (v0, heads)
  v = Transpose <perm = [0,2,1,3]> (v2)
  qk = MatMul (q, k)
  sc = Mul (qk, scale)
  sm = Softmax <axis = -1> (sc)
  av = MatMul (sm, v)
  at = Transpose <perm = [0,2,1,3]> (av)
  am = Reshape (at, merge)
  ao = MatMul (am, wo)
  ab = Add (ao, bo)
  r1 = Add (x, ab)
  ln = LayerNormalization (r1, lns, lnb)
  h0 = MatMul (ln, w1)
  h1 = Add (h0, b1)
  h2 = Gelu (h1)
  h3 = MatMul (h2, w2)
  h4 = Add (h3, b2)
  y = Add (r1, h4)
}}"""

UPSCALE = f"""{HEAD}
upscale (float[1,3,4,4] x) => (float[1,2,8,8] y)
<float[4,3,1,1] w1, float[16,4,1,1] wp, float[2,8,1,1] w2,
 int64[4] sizes = {{1, 4, 8, 8}}, int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}},
 int64[2] cut0 = {{1, 1}}, int64[2] cut1 = {{9, 9}}, int64[2] cuta = {{2, 3}},
 int64[2] mean = {{2, 3}}> {{
  a = Conv (x, w1)
  b = Resize <mode = "nearest"> (a, , , sizes)
  c = Pad (b, pads)
  d = Slice (c, cut0, cut1, cuta)
  e = Conv (a, wp)
  f = DepthToSpace <blocksize = 2, mode = "CRD"> (e)
  g = Concat <axis = 1> (d, f)
  h = ReduceMean <keepdims = 1> (g, mean)
  i = Mul (g, h)
  y = Conv (i, w2)
}}"""

NETS = {
    "chain": CHAIN,
    "residual": RESIDUAL,
    "concat": CONCAT,
    "separable": SEPARABLE,
    "flatten": FLATTEN,
    "grouped": GROUPED,
    "transposed": TRANSPOSED,
    "split": SPLIT,
    "group norm": GROUP_NORM,
    "transformer": TRANSFORMER,
    "upscale": UPSCALE,
}


def graph_of(program: Program) -> ChannelGraph:
    return ChannelGraph(program, builtin_table())


def free_groups(graph: ChannelGraph) -> dict[str, ChannelGroup]:
    return {g.name: g for g in graph.groups if not g.pinned}


def by_output(program: Program, value: str) -> str:
    """The name of the node that makes a value."""
    found = program.value(value)
    assert found is not None
    assert found.producer() is not None
    return str(found.producer().name)


def masked(program: Program, group: ChannelGroup, channels: list[int]) -> Program:
    """A copy in which the consumers' weights for the given channels are zero."""
    copy = program.clone()
    summed = graph_of(copy).summed
    for member in group.members:
        value = copy.value(member.value)
        weight = constant(value)
        if weight is None or (member.value, member.axis) not in summed:
            continue
        weight = weight.copy()
        where = [slice(None)] * weight.ndim
        where[member.axis] = member.indices(channels)
        weight[tuple(where)] = 0
        copy.set_weight(value, weight)
    return copy


def check_against_mask(program: Program, group: ChannelGroup, channels: list[int]) -> Program:
    pruned = program.clone()
    remove_channels(pruned, builtin_table(), group, channels)
    pruned.verify(like=program)
    inputs = random_inputs(program, 3)
    expected = run_onnx(masked(program, group, channels), inputs)
    assert_close(run_onnx(pruned, inputs), expected, 1e-5)
    assert pruned.weight_bytes < program.weight_bytes
    assert [n.name for n in pruned.graph] == [n.name for n in program.graph]
    return pruned


@pytest.mark.parametrize("name", NETS)
def test_removing_equals_masking_the_consumers(name: str) -> None:
    program = filled_program(NETS[name])
    groups = free_groups(graph_of(program))
    assert groups
    rng = np.random.default_rng(1)
    for group in groups.values():
        gone = rng.permutation(group.channels)[: max(1, group.channels // 3)].tolist()
        check_against_mask(program, group, gone)


@pytest.mark.parametrize("name", NETS)
def test_groups_shrink_one_after_another(name: str) -> None:
    program = filled_program(NETS[name])
    expected = program
    for group in free_groups(graph_of(program)).values():
        gone = list(range(0, group.channels, 2))[: group.channels - 1]
        expected = masked(expected, group, gone)
        remove_channels(program, builtin_table(), group, gone)
    inputs = random_inputs(program, 3)
    assert_close(run_onnx(program, inputs), run_onnx(expected, inputs), 1e-5)


def test_chain_and_its_pins() -> None:
    program = filled_program(CHAIN)
    groups = graph_of(program).groups
    names = [by_output(program, v) for v in ("c1", "c2", "y")]
    assert [g.name for g in groups] == names
    first, second, last = groups
    assert (first.channels, second.channels) == (8, 6)
    assert first.producers == (names[0],)
    assert first.consumers == (names[1],)
    assert {m.value for m in first.members} >= {"w1", "b1", "s", "o", "m", "var", "c1", "r1", "w2"}
    assert last.pinned == "reaches output 'y'"
    assert first.exact


def test_residual_branches_are_one_group() -> None:
    program = filled_program(RESIDUAL)
    stem, inner, head = graph_of(program).groups
    assert stem.producers == tuple(by_output(program, v) for v in ("stem", "a", "b"))
    assert stem.consumers == tuple(by_output(program, v) for v in ("a", "t", "y"))
    assert inner.name == by_output(program, "t")
    assert head.pinned


def test_concatenated_branches_are_groups_of_their_own() -> None:
    program = filled_program(CONCAT)
    a, b, _ = graph_of(program).groups
    assert (a.channels, b.channels) == (6, 4)
    both = next(m for m in b.members if m.value == "c")
    assert both.channel_of.tolist() == [-1] * 6 + [0, 1, 2, 3]


def test_flattened_channels_are_blocks() -> None:
    program = filled_program(FLATTEN)
    conv = graph_of(program).groups[0]
    weight = next(m for m in conv.members if m.value == "wa")
    assert weight.indices([1]).tolist() == list(range(16, 32))


def test_depthwise_passes_through_and_loses_whole_groups() -> None:
    program = filled_program(SEPARABLE)
    groups = free_groups(graph_of(program))
    expand = groups[by_output(program, "e")]
    assert expand.consumers == (by_output(program, "p"),)
    pruned = check_against_mask(program, expand, [0, 5])
    node = pruned.node(by_output(program, "d"))
    assert node is not None
    assert node.attributes["group"].as_int() == 6
    project = groups[by_output(program, "p")]
    assert project.channels == 6
    assert next(m for m in project.members if m.value == "wm").indices([1]).tolist() == [2, 3]


def test_grouped_convolutions_shrink_evenly() -> None:
    program = filled_program(GROUPED)
    groups = free_groups(graph_of(program))
    before, after = groups.values()
    assert (before.channels, after.channels) == (4, 6)
    assert next(m for m in after.members if m.value == "wg").indices([2]).tolist() == [2, 8]
    pruned = check_against_mask(program, before, [1])
    assert static_shape(pruned.value("wg")) == (12, 3, 3, 3)


def test_transformer_prunes_neurons_and_whole_heads() -> None:
    program = filled_program(TRANSFORMER)
    graph = graph_of(program)
    groups = free_groups(graph)
    heads, neurons = groups.values()
    assert heads.producers == tuple(by_output(program, v) for v in ("q0", "k0", "v0"))
    assert heads.channels == 4
    assert next(m for m in heads.members if m.value == "wo").indices([1]).tolist() == [4, 5, 6, 7]
    assert neurons.channels == 24
    assert neurons.exact
    pruned = check_against_mask(program, heads, [0, 2])
    assert static_shape(pruned.value("wo")) == (8, 16)
    hidden = next(g for g in graph.groups if g.pinned)
    assert hidden.pinned.startswith("reaches ")
    assert not hidden.exact


def test_shared_weights_are_cut_for_both_users() -> None:
    program = filled_program(
        f"""{HEAD}
        tied (float[2,8] x, float[2,8] z) => (float[2,3] y)
        <float[8,12] w1, float[12,3] w2> {{
          a = MatMul (x, w1)
          b = MatMul (z, w1)
          c = MatMul (a, w2)
          d = MatMul (b, w2)
          y = Add (c, d)
        }}"""
    )
    group = graph_of(program).groups[0]
    assert group.producers == (by_output(program, "a"), by_output(program, "b"))
    assert static_shape(check_against_mask(program, group, [3, 4]).value("w1")) == (8, 10)


def test_equal_vectors_stored_once_tie_nothing() -> None:
    program = filled_program(
        f"""{HEAD}
        zeros (float[2,8] x) => (float[2,3] y)
        <float[8,6] w1, float[6] zero, float[6,6] w2, float[6,3] w3> {{
          a = Gemm (x, w1, zero)
          b = Gemm (a, w2, zero)
          y = Gemm (b, w3)
        }}""",
        zero=np.zeros(6),
    )
    assert len(free_groups(graph_of(program))) == 1
    unshared = program.clone()
    unshare_vectors(unshared)
    first, second = free_groups(graph_of(unshared)).values()
    check_against_mask(unshared, first, [0, 5])
    remove_channels(program, builtin_table(), second, [1])
    assert static_shape(program.value("w2")) == (6, 5)


def test_shared_shape_constants_are_split() -> None:
    program = filled_program(
        f"""{HEAD}
        shared (float[2,4] x) => (float[2,6,2] p, float[2,3] y)
        <float[4,12] w1, float[4,12] w2, float[12,3] w3, int64[3] s = {{2, 6, 2}},
         int64[2] back = {{2, -1}}> {{
          a = MatMul (x, w1)
          p = Reshape (a, s)
          b = MatMul (x, w2)
          q = Reshape (b, s)
          r = Reshape (q, back)
          y = MatMul (r, w3)
        }}"""
    )
    (group,) = free_groups(graph_of(program)).values()
    assert group.channels == 6
    check_against_mask(program, group, [0, 1])


def test_unknown_operators_pin() -> None:
    program = filled_program(
        f"""{HEAD}
        unknown (float[2,4] x) => (float[2,3] y)
        <float[4,4] w1, float[4,3] w2> {{
          a = MatMul (x, w1)
          b = Trilu (a)
          y = MatMul (b, w2)
        }}"""
    )
    group = graph_of(program).groups[0]
    assert "Trilu" in group.pinned
    with pytest.raises(Declined, match="Trilu"):
        remove_channels(program, builtin_table(), group, [0])


def test_unknown_extents_pin_what_they_meet() -> None:
    program = filled_program(
        f"""{HEAD}
        partner (float[2,4] x, float[2,U] z) => (float[2,3] y)
        <float[4,6] w1, float[6,3] w2> {{
          a = MatMul (x, w1)
          b = Add (a, z)
          y = MatMul (b, w2)
        }}"""
    )
    assert graph_of(program).groups[0].pinned == "axis 1 of 'b' meets an unknown extent"


def test_values_of_unknown_shape_pin() -> None:
    program = filled_program(CHAIN)
    hidden = program.value("r1")
    assert hidden is not None
    hidden.shape = None
    assert "'r1'" in graph_of(program).groups[0].pinned


def test_one_channel_stays_and_changed_groups_are_declined() -> None:
    program = filled_program(CHAIN)
    group = graph_of(program).groups[0]
    with pytest.raises(Declined, match="keep one"):
        remove_channels(program.clone(), builtin_table(), group, range(8))
    with pytest.raises(Declined, match="has 8 channels"):
        remove_channels(program.clone(), builtin_table(), group, [8])
    remove_channels(program, builtin_table(), group, [0])
    with pytest.raises(Declined, match="changed"):
        remove_channels(program, builtin_table(), group, [0])


def test_layer_normalisation_couples_but_is_not_exact() -> None:
    program = filled_program(
        f"""{HEAD}
        norm (float[2,4] x) => (float[2,3] y)
        <float[4,8] w1, float[8] s, float[8] b, float[8,3] w2> {{
          a = MatMul (x, w1)
          n = LayerNormalization (a, s, b)
          y = MatMul (n, w2)
        }}"""
    )
    group = graph_of(program).groups[0]
    assert not group.pinned
    assert not group.exact
    remove_channels(program, builtin_table(), group, [2])
    assert static_shape(program.value("s")) == (7,)
    assert static_shape(program.value("n")) == (2, 7)


def random_cnn(rng: np.random.Generator) -> str:
    """A random small CNN: convolutions of several kinds, residual sums, concats, poolings."""
    weights: list[str] = []
    lines: list[str] = []
    live = [("x", 3)]

    def emit(op: str, inputs: list[str], channels: int, attributes: str = "") -> tuple[str, int]:
        name = f"t{len(lines)}"
        lines.append(f"{name} = {op} {attributes} ({', '.join(inputs)})")
        live.append((name, channels))
        return live[-1]

    def weight(shape: str, stem: str = "w") -> str:
        weights.append(f"float[{shape}] {stem}{len(weights)}")
        return weights[-1].split()[1]

    for _ in range(int(rng.integers(8, 15))):
        source, channels = live[int(rng.integers(max(0, len(live) - 3), len(live)))]
        kind = rng.choice(["conv", "depthwise", "grouped", "norm", "act", "add", "concat"])
        if kind == "conv":
            made = int(rng.integers(2, 9)) * 2
            emit("Conv", [source, weight(f"{made},{channels},3,3")], made, "<pads = [1,1,1,1]>")
        elif kind == "depthwise":
            w = weight(f"{channels},1,3,3")
            emit("Conv", [source, w], channels, f"<pads = [1,1,1,1], group = {channels}>")
        elif kind == "grouped" and channels % 2 == 0:
            w, b = weight(f"6,{channels // 2},1,1"), weight("6")
            emit("Conv", [source, w, b], 6, "<group = 2>")
        elif kind == "norm":
            vectors = [weight(str(channels)) for _ in range(3)]
            vectors.append(weight(str(channels), "var"))
            emit("BatchNormalization", [source, *vectors], channels)
        elif kind == "act":
            emit(str(rng.choice(["Relu", "Sigmoid", "HardSwish", "Neg"])), [source], channels)
        elif kind == "add":
            same = [n for n, c in live[1:] if c == channels and n != source]
            if same and source != "x":
                emit("Add", [source, str(rng.choice(same))], channels)
        elif kind == "concat":
            other, extra = live[int(rng.integers(len(live)))]
            emit("Concat", [source, other], channels + extra, "<axis = 1>")
    pooled, channels = emit("GlobalAveragePool", [live[-1][0]], live[-1][1])
    flat, _ = emit("Flatten", [pooled], channels)
    lines.append(f"y = Gemm ({flat}, {weight(f'{channels},3')})")
    body = "\n  ".join(lines)
    return (
        f"{HEAD}\nrandom (float[1,3,6,6] x) => (float[1,3] y)\n"
        f"<{', '.join(weights)}> {{\n  {body}\n}}"
    )


def test_random_networks() -> None:
    rng = np.random.default_rng(0)
    removed = 0
    for seed in range(20):
        program = filled_program(random_cnn(rng), seed)
        program.sweep()
        for group in free_groups(graph_of(program)).values():
            count = int(rng.integers(1, group.channels))
            check_against_mask(program, group, rng.permutation(group.channels)[:count].tolist())
            removed += 1
    assert removed > 20
