from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optcompiler.errors import InputError, VerificationError
from optcompiler.program import (
    PASS_KEY,
    Port,
    Program,
    constant,
    consumed,
    node_fingerprint,
    port,
    shape_of,
    static_shape,
    tensor_hash,
)
from tests.support import assert_close, run_onnx

NET = """<ir_version: 10, opset_import: ["" : 20]>
net (float[N,3,4,4] image) => (float[N,2] scores)
<float[2,3,4,4] w = {0.5}, float[2] b = {0.25, -0.25}, int64[2] shape = {-1, 2}> {
  [conv] h = Conv (image, weight, b)
  [relu] r = Relu (h)
  [flat] scores = Reshape (r, shape)
}"""


def net() -> Program:
    text = NET.replace("float[2,3,4,4] w = {0.5}", "").replace("<, ", "<")
    text = text.replace("(float[N,3,4,4] image)", "(float[N,3,4,4] image, float[2,3,4,4] weight)")
    model = ir.from_onnx_text(text)
    weight = model.graph.inputs.pop()
    rng = np.random.default_rng(0)
    weight.const_value = ir.tensor(
        rng.standard_normal((2, 3, 4, 4)).astype(np.float32), name="weight"
    )
    model.graph.register_initializer(weight)
    return Program.from_onnx(model)


def test_ports_and_weights() -> None:
    program = net()
    assert program.inputs == (Port("image", "FLOAT", ("N", 3, 4, 4)),)
    assert program.outputs == (Port("scores", "FLOAT", ("N", 2)),)
    assert not program.inputs[0].static
    assert set(program.weights()) == {"weight", "b", "shape"}
    assert program.weight_bytes == 4 * 96 + 4 * 2 + 8 * 2


def test_text_round_trip() -> None:
    program = net()
    again = Program.from_text(program.to_text())
    assert again.content_hash() == program.content_hash()
    assert_close(run_onnx(again), run_onnx(program), 0)


def test_clone_shares_weights_and_nothing_else() -> None:
    program = net()
    before = program.content_hash()
    copy = program.clone()
    assert copy.weights()["weight"] is program.weights()["weight"]
    copy.set_weight(copy.value("b"), np.zeros(2, np.float32))
    copy.node("relu").op_type = "Sigmoid"
    assert program.content_hash() == before
    added, removed, changed = copy.changes_since(program)
    assert (added, removed, changed) == (("relu",), (), ("b",))


def test_hash_sees_weights_and_structure_and_not_provenance() -> None:
    program, other = net(), net()
    assert program.content_hash() == other.content_hash()
    other.stamp(["conv"], "some-pass")
    assert other.node("conv").metadata_props[PASS_KEY] == "some-pass"
    assert program.content_hash() == other.content_hash()
    weight = constant(other.value("weight")).copy()
    weight[0, 0, 0, 0] += 1e-6
    other.set_weight(other.value("weight"), weight)
    assert program.content_hash() != other.content_hash()


def test_network_view() -> None:
    view = net().network()
    assert view.has_edge("conv", "relu")
    assert view.edges["conv", "relu"]["value"] == "h"
    assert view.has_edge(("weight", "weight"), "conv")
    assert view.has_edge("flat", ("output", "scores"))


def test_fresh_names_and_new_weights() -> None:
    program = net()
    value = program.add_weight("b", np.ones(3, np.float32))
    assert value.name == "b_1"
    assert program.fresh_name("conv") == "conv_1"
    assert program.fresh_name("new") == "new"


def test_verify_rejects_a_changed_interface() -> None:
    program, other = net(), net()
    other.graph.inputs[0].name = "picture"
    with pytest.raises(VerificationError, match=r"interface changed.*picture"):
        other.verify(like=program)


def test_verify_rejects_invalid_onnx() -> None:
    program = net()
    program.node("relu").op_type = "NoSuchOperator"
    with pytest.raises(VerificationError, match="NoSuchOperator"):
        program.verify()


def test_verify_rejects_contradicting_shapes() -> None:
    program = net()
    program.set_weight(program.value("weight"), np.zeros((3, 3, 4, 4), np.float32))
    with pytest.raises(VerificationError, match="not valid ONNX"):
        program.verify()


def test_from_text_refuses_nonsense() -> None:
    with pytest.raises(InputError, match="not ONNX text"):
        Program.from_text("this is no model")


@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_saving_replaces_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr("optcompiler.program.EXTERNAL_ABOVE_BYTES", limit)
    path = tmp_path / "net.onnx"
    one, two = net(), net()
    two.set_weight(two.graph.initializers["weight"], np.full((2, 3, 4, 4), 2, np.float32))
    (tmp_path / "net.onnx.data").write_text("not ours")
    for program in (one, two, two):
        program.save(path)
        again = Program.from_onnx(path)
        assert again.content_hash() == program.content_hash()
        assert len(list(tmp_path.iterdir())) == (2 if limit else 3)
    again.set_weight(again.graph.initializers["b"], np.ones(2, np.float32))
    expected = again.content_hash()
    again.save(path)
    assert Program.from_onnx(path).content_hash() == expected


CONTROL = """<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
net (float[N,4] x, bool c) => (float[N,4] y)
<float[4] k = {1, 2, 3, 4}> {
  [mul] m = Mul (x, k)
  [if] b = If (c) <
    then_branch = t () => (float[N,4] p) { [inner] p = Add (m, k) },
    else_branch = e () => (float[N,4] q) { [one] r = Neg (x) [two] q = Neg (r) }
  >
  [soft] y = Softmax <axis = 1> (b)
}"""


def control() -> Program:
    return Program.from_text(CONTROL)


def one_function() -> Program:
    """A call of a model-local function of two nodes."""
    graph = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
        net (float[2] x) => (float[2] y) { [call] y = own.twice <rate = 0.5> (x) }
        <domain: "own", opset_import: ["" : 20]>
        twice <rate> (v) => (w) { [add] s = Add (v, v) [elu] w = Elu <alpha: float = @rate> (s) }
    """)
    return Program(graph)


# -- ports ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("port", "text", "static"),
    [
        (Port("a", "FLOAT", (2, "N")), "a: float[2, N]", False),
        (Port("a", "INT64", (2, 3)), "a: int64[2, 3]", True),
        (Port("a", "BOOL", ()), "a: bool[]", True),
        (Port("a", "FLOAT", (), "sequence"), "a: sequence of float", False),
        (Port("a", "FLOAT", (), "optional tensor"), "a: optional tensor of float", False),
    ],
)
def test_ports_in_words(port: Port, text: str, static: bool) -> None:
    assert str(port) == text
    assert port.static is static


def test_ports_of_values() -> None:
    tensor, sequence = ir.TensorType(ir.DataType.FLOAT), ir.SequenceType
    assert port(ir.val("a", type=sequence(tensor))) == Port("a", "FLOAT", (), "sequence")
    assert port(ir.val("a", type=ir.OptionalType(tensor))) == Port(
        "a", "FLOAT", (), "optional tensor"
    )
    assert port(ir.val("a", type=ir.OptionalType(sequence(tensor)))) == Port(
        "a", "FLOAT", (), "optional sequence"
    )
    assert port(ir.Value(name=None)) == Port("", "UNDEFINED", ())
    value = ir.val("a", dtype=ir.DataType.INT8, shape=ir.Shape([2, "N", None]))
    assert port(value) == Port("a", "INT8", (2, "N", "?"))
    assert shape_of(ir.val("a", dtype=ir.DataType.INT8)) == ()


def test_static_shapes_and_constants() -> None:
    program = control()
    assert static_shape(program.value("k")) == (4,)
    assert static_shape(program.value("m")) is None
    assert static_shape(ir.val("a")) is None
    assert constant(program.value("k")).tolist() == [1, 2, 3, 4]
    assert constant(program.value("m")) is None
    assert constant(None) is None


# -- looking ----------------------------------------------------------------------------------


def test_nodes_and_values_are_found_by_name() -> None:
    program = control()
    for name in ("x", "c", "k", "m", "b", "y"):
        assert program.value(name).name == name
    for name in ("mul", "if", "soft"):
        assert program.node(name).name == name
    assert program.node("inner") is None
    assert program.node("m") is None
    assert program.value("mul") is None
    assert program.opset == 20


def test_names_follow_edits() -> None:
    program = control()
    node, value = program.node("mul"), program.value("m")
    node.name, value.name = "times", "n"
    assert (program.node("times"), program.value("n")) == (node, value)
    assert program.node("mul") is None
    assert program.value("m") is None
    fresh = ir.node("Neg", [value], name="neg")
    fresh.outputs[0].name = "minus"
    program.graph.append(fresh)
    assert (program.node("neg"), program.value("minus")) == (fresh, fresh.outputs[0])
    program.graph.remove(fresh)
    assert program.node("neg") is None
    assert program.value("minus") is None


def test_all_nodes_are_those_of_subgraphs_and_functions() -> None:
    names = {n.name for n in control().all_nodes()}
    assert names == {"mul", "if", "soft", "inner", "one", "two"}
    assert {n.name for n in one_function().all_nodes()} == {"call", "add", "elu"}


def test_consumed_values_include_what_subgraphs_capture() -> None:
    program = control()
    assert sorted(v.name for v in consumed(program.node("if"))) == ["c", "k", "m", "x"]
    assert [v.name for v in consumed(program.node("mul"))] == ["x", "k"]
    absent = ir.node("Clip", [program.value("x"), None, program.value("k")])
    assert [v.name for v in consumed(absent)] == ["x", "k"]


def test_network_view_of_everything() -> None:
    view = control().network()
    assert set(view.nodes) == {
        ("input", "x"), ("input", "c"), ("weight", "k"), "mul", "if", "soft", ("output", "y"),
    }  # fmt: skip
    assert {(a, b): d["value"] for a, b, d in view.edges(data=True)} == {
        (("input", "x"), "mul"): "x", (("weight", "k"), "mul"): "k", (("input", "x"), "if"): "x",
        (("input", "c"), "if"): "c", (("weight", "k"), "if"): "k", ("mul", "if"): "m",
        ("if", "soft"): "b", ("soft", ("output", "y")): "y",
    }  # fmt: skip
    assert view.nodes["soft"] == {"op_type": "Softmax", "domain": ""}


def test_in_words() -> None:
    assert repr(control()) == (
        "Program((x: float[N, 4], c: bool[]) -> (y: float[N, 4]), 3 nodes, 16 weight bytes)"
    )


# -- identity ---------------------------------------------------------------------------------


def test_structure_line_by_line() -> None:
    assert list(control().structure()) == [
        "opset [('', 20), ('own', 1)]",
        "in x: float[N, 4]",
        "in c: bool[]",
        "out y: float[N, 4]",
        "mul: m = ::Mul:(x,k) ",
        "if: b = ::If:(c) else_branch={one: r = ::Neg:(x) |two: q = ::Neg:(r) };"
        "then_branch={inner: p = ::Add:(m,k) }",
        "soft: y = ::Softmax:(b) axis=1",
    ]
    assert list(one_function().structure()) == [
        "opset [('', 20), ('own', 1)]",
        "in x: float[2]",
        "out y: float[2]",
        "call: y = own::twice:(x) rate=0.5",
        "function ('own', 'twice', '') ['v']",
        "add: s = ::Add:(v,v) ",
        "elu: w = ::Elu:(s) alpha=@rate",
        "returns ['w']",
    ]


def test_fingerprints_of_absent_operands_and_tensors() -> None:
    x = ir.val("x")
    node = ir.node("Clip", [x, None, x], name="clip")
    node.outputs[0].name = "y"
    assert node_fingerprint(node) == "clip: y = ::Clip:(x,,x) "

    def held(*values: float) -> str:
        tensor = ir.tensor(np.array(values, np.float32))
        return node_fingerprint(ir.node("Constant", [], {"value": tensor}, name="c"))

    assert held(1, 2) == held(1, 2) != held(1, 3)


def test_tensors_hash_by_type_shape_and_bytes() -> None:
    one = np.array([[1, 2]], np.float32)
    hashes = {
        tensor_hash(ir.tensor(a))
        for a in (one, one.reshape(2, 1), one.view(np.int32), one + 1, one.copy())
    }
    assert len(hashes) == 4
    texts = [ir.StringTensor([t.encode() for t in ts], shape=ir.Shape([2]))
             for ts in (("a", "b"), ("ab", ""), ("a", "b"))]  # fmt: skip
    assert tensor_hash(texts[0]) == tensor_hash(texts[2]) != tensor_hash(texts[1])
    known = ir.tensor(one)
    assert tensor_hash(known) == tensor_hash(known)
    known.meta["optcompiler.sha256"] = "kept"
    assert tensor_hash(known) == "kept"


def test_hash_sees_interface_operands_and_functions() -> None:
    found = {control().content_hash(), one_function().content_hash()}
    changed = control()
    changed.graph.outputs[0].name = "z"
    found.add(changed.content_hash())
    other = one_function()
    next(iter(other.functions.values()))[0].op_type = "Mul"
    found.add(other.content_hash())
    renamed = control()
    renamed.value("k").name = "k2"
    found.add(renamed.content_hash())
    assert len(found) == 5


def test_changes_name_nodes_and_weights() -> None:
    before = control()
    after = before.clone()
    assert after.changes_since(before) == ((), (), ())
    after.node("soft").attributes["axis"] = ir.AttrInt64("axis", 0)
    fresh = ir.node("Neg", [after.value("x")], name="neg")
    after.graph.append(fresh)
    after.add_weight("w", np.zeros(3, np.float32))
    assert after.changes_since(before) == (("soft", "neg"), (), ("w",))
    assert before.changes_since(after) == (("soft",), ("neg",), ())


def test_the_first_maker_is_remembered() -> None:
    program = control()
    program.stamp(["mul"], "first")
    program.stamp(["mul", "soft", "unknown"], "second")
    makers = {n.name: n.metadata_props.get(PASS_KEY) for n in program.graph}
    assert makers == {"mul": "first", "if": None, "soft": "second"}


# -- copies -----------------------------------------------------------------------------------


def test_clones_have_types_of_their_own() -> None:
    program = control()
    program.value("m").type = ir.TensorType(ir.DataType.FLOAT, denotation="IMAGE")
    sequence = ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))
    program.value("b").type = sequence
    copy = program.clone()
    assert copy.value("m").type.denotation == "IMAGE"
    assert copy.value("b").type == sequence
    assert copy.value("b").type is not sequence
    for name in ("x", "k", "m", "y"):
        copy.value(name).dtype = ir.DataType.DOUBLE
        assert program.value(name).dtype == ir.DataType.FLOAT
    branch = copy.node("if").attributes["then_branch"].as_graph()
    branch.outputs[0].dtype = ir.DataType.DOUBLE
    ours = program.node("if").attributes["then_branch"].as_graph()
    assert ours.outputs[0].dtype == ir.DataType.FLOAT


def test_inlined_programs_have_no_functions_and_unique_names() -> None:
    program = one_function()
    inlined = program.inlined()
    assert not inlined.functions
    assert [n.op_type for n in inlined.graph] == ["Add", "Elu"]
    assert inlined.graph[1].attributes["alpha"].as_float() == 0.5
    assert len({n.name for n in inlined.graph}) == 2
    assert len(program.functions) == 1


def test_files_are_self_contained(tmp_path: Path) -> None:
    program = net()
    ir.save(program.model, tmp_path / "outside.onnx", external_data="outside.bin",
            size_threshold_bytes=0)  # fmt: skip
    outside = Program(ir.load(tmp_path / "outside.onnx"))
    assert any(isinstance(t, ir.ExternalTensor) for t in outside.weights().values())
    (tmp_path / "inside").mkdir()
    outside.save(tmp_path / "inside" / "net.onnx")
    assert [p.name for p in (tmp_path / "inside").iterdir()] == ["net.onnx"]
    again = Program.from_onnx(tmp_path / "inside" / "net.onnx")
    assert again.content_hash() == program.content_hash()
    proto = outside.to_proto()
    assert {i.name: len(i.raw_data) for i in proto.graph.initializer} == {
        "weight": 384, "b": 8, "shape": 16,
    }  # fmt: skip
    assert all(isinstance(t, ir.ExternalTensor) for t in outside.weights().values())


# -- editing ----------------------------------------------------------------------------------


def test_added_weights_are_initializers() -> None:
    program = control()
    value = program.add_weight("w", np.ones((2, 3), np.float16))
    assert program.graph.initializers["w"] is value
    assert (value.dtype, value.shape, value.const_value.name) == (
        ir.DataType.FLOAT16, ir.Shape([2, 3]), "w",
    )  # fmt: skip
    tensor = ir.tensor(np.zeros(2, np.int64), name="other")
    second = program.add_weight("w", tensor)
    assert (second.name, tensor.name, second.const_value) == ("w_1", "w_1", tensor)
    program.verify()


def test_weights_take_new_contents() -> None:
    program = control()
    value = program.value("k")
    program.set_weight(value, np.ones((1, 4), np.float64))
    assert (value.dtype, value.shape) == (ir.DataType.DOUBLE, ir.Shape([1, 4]))
    assert value.const_value.name == "k"
    assert constant(value).tolist() == [[1, 1, 1, 1]]


def test_results_can_be_held_as_constants() -> None:
    program = control()
    tensor = ir.tensor(np.zeros((3, 4), np.float32))
    held = program.hold(program.value("m"), tensor)
    assert held is program.graph.initializers["m"]
    assert tensor.name == "m"
    assert (held.dtype, held.shape) == (ir.DataType.FLOAT, ir.Shape([3, 4]))
    assert program.node("mul") is None
    assert "m" in {v.name for v in consumed(program.node("if"))}
    out = program.hold(program.value("y"), ir.tensor(np.ones((3, 4), np.float32)))
    assert program.graph.outputs[0] is out
    assert [n.name for n in program.graph] == ["if"]


def test_fresh_names_are_given_once() -> None:
    program = control()
    assert [program.fresh_name("m") for _ in range(3)] == ["m_1", "m_2", "m_3"]
    assert [program.fresh_name(s) for s in ("x", "k", "y", "mul", "new", "new")] == [
        "x_1", "k_1", "y_1", "mul_1", "new", "new_1",
    ]  # fmt: skip
    program.node("soft").name = "hard"
    assert program.fresh_name("soft") == "soft"
    program.graph.register_initializer(
        ir.val("late", const_value=ir.tensor(np.zeros(1), name="late"))
    )
    assert program.fresh_name("late") == "late_1"


def test_discarding_takes_what_only_the_node_used() -> None:
    program = Program.from_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        net (float[2] x) => (float[2] y) <float[2] k = {1, 2}, float[2] l = {3, 4}> {
          [a] p = Mul (x, k)
          [b] q = Add (p, l)
          [c] r = Neg (q)
          [y] y = Add (p, x)
        }"""
    )
    program.discard(program.node("b"))
    assert len(program.graph) == 4
    program.discard(program.node("c"))
    assert [n.name for n in program.graph] == ["a", "y"]
    assert set(program.weights()) == {"k"}
    program.discard(program.node("y"), program.node("a"))
    assert [n.name for n in program.graph] == ["a", "y"]
    program.forget(program.value("k"))
    assert set(program.weights()) == {"k"}
    program.verify()


def test_sweeping_looks_everywhere() -> None:
    program = one_function()
    program.add_weight("unused", np.zeros(2))
    stray = ir.node("Neg", [program.value("x")], name="stray")
    program.graph.append(stray)
    program.sweep()
    assert [n.name for n in program.graph] == ["call"]
    assert not program.weights()
    assert len(program.functions) == 1
    program.graph.outputs[0] = program.graph.inputs[0]
    program.sweep()
    assert not program.functions


def test_shapes_are_inferred_anew() -> None:
    program = net()
    program.set_weight(program.value("weight"), np.zeros((2, 3, 2, 2), np.float32))
    program.value("r").dtype = ir.DataType.FLOAT
    program.infer_shapes()
    assert shape_of(program.value("h")) == ("N", 2, 3, 3)
    assert shape_of(program.value("r")) == ("N", 2, 3, 3)
    assert shape_of(program.value("scores")) == ("N", 2)
    program.value("r").type = None
    program.infer_shapes()
    assert program.value("r").dtype == ir.DataType.FLOAT
    program.set_weight(program.value("weight"), np.zeros((2, 3, 2, 2), np.float64))
    with pytest.raises(VerificationError, match="shape inference failed: "):
        program.infer_shapes()


# -- verification -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "", "conv"])
def test_verify_wants_names_of_their_own(name: str | None) -> None:
    program = net()
    program.node("relu").name = name
    with pytest.raises(VerificationError, match="nodes without a name, or two with the same name"):
        program.verify()


def test_verify_compares_declared_and_held_weights() -> None:
    program = net()
    program.value("b").const_value = ir.tensor(np.zeros(3, np.float32), name="b")
    with pytest.raises(VerificationError) as caught:
        program.verify()
    assert str(caught.value) == ("initializer 'b' is declared FLOAT[2] but holds FLOAT[3].")
    program.value("b").const_value = ir.tensor(np.zeros(2, np.float64), name="b")
    with pytest.raises(VerificationError, match=r"'b' is declared FLOAT\[2\] but holds DOUBLE"):
        program.verify()


def test_verify_compares_inputs_and_outputs() -> None:
    program = net()
    program.verify()
    program.verify(like=net())
    other = net()
    other.graph.outputs[0].name = "votes"
    with pytest.raises(VerificationError) as caught:
        other.verify(like=program)
    assert str(caught.value) == (
        "the interface changed: was (image: float[N, 3, 4, 4]) -> (scores: float[N, 2]), is now "
        "(image: float[N, 3, 4, 4]) -> (votes: float[N, 2])."
    )


def test_verify_checks_types_and_shapes_strictly() -> None:
    program = net()
    program.value("h").shape = ir.Shape(["N", 5, 1, 1])
    with pytest.raises(VerificationError, match="not valid ONNX: ") as caught:
        program.verify()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 420


def test_verify_reads_shapes_from_small_constants_and_copies_no_large_ones() -> None:
    program = Program.from_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        net (float[4,1024] x) => (float[2,2048] y) <int64[2] s = {2, 2048}> {
          [add] z = Neg (x)
          [reshape] y = Reshape (z, s)
        }"""
    )
    weight = program.add_weight("w", np.zeros(1024, np.float32))
    node = program.node("add")
    node.op_type = "Add"
    node.resize_inputs(2)
    node.replace_input_with(1, weight)
    program.verify()
    program.set_weight(program.value("s"), np.array([2, 2047]))
    with pytest.raises(VerificationError, match="not valid ONNX"):
        program.verify()


def test_a_column_times_a_row_of_constants_has_a_shape():
    """onnx follows the values of both and takes them for vectors, which it then cannot multiply."""
    program = Program.from_text("""
<ir_version: 10, opset_import: ["": 20]>
agraph (float[n, 3] x) => (float[n, 4] y)
<int64[3, 1] column = {1, 2, 3}, int64[1] first = {0}> {
  row = Constant <value = int64[4] {0, 1, 2, 3}> ()
  line = Unsqueeze (row, first)
  flat = Constant <value = int64[3] {1, 2, 3}> ()
  last = Constant <value = int64[1] {1}> ()
  upright = Unsqueeze (flat, last)
  products = Mul (upright, line)
  weights = Cast <to = 1> (products)
  y = MatMul (x, weights)
}
""")
    program.infer_shapes()
    [products] = [v for n in program.graph for v in n.outputs if v.name == "products"]
    assert products.shape == ir.Shape([3, 4])
