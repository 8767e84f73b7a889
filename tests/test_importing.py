"""ONNX in: normal form, names, versions, external data, and every way a file can be bad."""

from __future__ import annotations

import os

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, parser

from optcompiler.binding import bind
from optcompiler.errors import InputError
from optcompiler.importing import program_from_onnx, source_path
from optcompiler.program import PASS_KEY, SOURCE_KEY, Program
from optcompiler.reading import not_finite
from tests.support import run_onnx

MLP = """
<ir_version: 8, opset_import: ["" : {opset}]>
g (float[N, 4] x) => (float[N, 2] y)
<float[4, 2] w = {{1, 2, 3, 4, 5, 6, 7, 8}}>
{{
    two = Constant <value_float = 2.0> ()
    h = MatMul (x, w)
    y = Mul (h, two)
}}
"""


def mlp(opset: int = 20) -> onnx.ModelProto:
    return parser.parse_model(MLP.format(opset=opset))


def wide_model(rows: int = 600) -> onnx.ModelProto:
    """A model with one weight of `rows` times four bytes."""
    weight = numpy_helper.from_array(np.arange(rows, dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_constants_become_initializers_and_nodes_get_names():
    program = program_from_onnx(mlp())
    assert [(n.name, n.op_type) for n in program.graph] == [
        ("MatMul_0", "MatMul"),
        ("Mul_0", "Mul"),
    ]
    assert program.weights().keys() == {"w", "two"}
    assert str(program.outputs[0]) == "y: float[N, 2]"


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 18, 19])
def test_old_opsets_are_upgraded_and_compute_the_same(opset):
    program = program_from_onnx(mlp(opset))
    assert program.opset == 20
    x = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(run_onnx(program, {"x": x})[0], [[32, 40]] * 3)


def test_reduce_axes_become_an_input_when_upgraded():
    program = Program.from_text("""
        <ir_version: 7, opset_import: ["" : 11]>
        g (float[2, 3] x) => (float[2, 1] y) { y = ReduceMean <axes = [1]> (x) }
    """)
    assert program.opset == 20
    node = next(n for n in program.graph if n.op_type == "ReduceMean")
    assert "axes" not in node.attributes
    assert len(node.inputs) == 2


def test_upgrading_keeps_big_weights_and_names():
    proto = wide_model()
    proto.opset_import[0].version = 13
    proto.graph.node[0].name = "a/b c"
    program = program_from_onnx(proto)
    assert program.opset == 20
    assert next(iter(program.graph)).name == "a/b c"
    np.testing.assert_array_equal(program.weights()["w"].numpy(), np.arange(600))


def test_newer_opsets_are_kept_with_an_ir_version_that_fits():
    assert program_from_onnx(mlp(21)).opset == 21
    assert program_from_onnx(mlp(21)).model.ir_version == 10
    assert program_from_onnx(mlp(23)).model.ir_version == 11


def test_names_are_kept_whatever_they_hold_and_made_unique():
    proto = mlp()
    proto.graph.initializer[0].name = "w/ü '\"%s"
    proto.graph.node[1].input[1] = "w/ü '\"%s"
    proto.graph.node[1].name = proto.graph.node[2].name = "same; name"
    program = program_from_onnx(proto)
    assert "w/ü '\"%s" in program.weights()
    assert [n.name for n in program.graph] == ["same; name", "same; name_0"]
    assert run_onnx(program)[0].shape == (2, 2)


def test_branches_with_equal_names_become_unique():
    program = Program.from_text("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (bool c, float[2] x) => (float[2] y) {
            y = If (c) <
                then_branch = a () => (float[2] t) { n = Neg (x)  t = Neg (n) },
                else_branch = b () => (float[2] t) { n = Abs (x)  t = Abs (n) }
            >
        }
    """)
    values = [v.name for n in program.graph.all_nodes() for v in n.outputs]
    nodes = [n.name for n in program.graph.all_nodes()]
    assert len(set(values)) == len(values) == 5
    assert len(set(nodes)) == 5
    inputs = {"c": np.array(True), "x": np.array([1, -2], np.float32)}
    np.testing.assert_array_equal(run_onnx(program, inputs)[0], [1, -2])


def test_every_output_has_a_node_of_its_own():
    proto = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[2] x) => (float[2] x, float[2] c, float[2] w, float[2] y, float[2] y)
        <float[2] w = {1, 2}> {
            c = Constant <value = float[2] {3, 4}> ()
            y = Add (x, c)
        }
    """)
    program = program_from_onnx(proto)
    assert [p.name for p in program.outputs] == ["x_value", "c", "w", "y", "y_value"]
    assert [p.name for p in program.inputs] == ["x"]
    found = run_onnx(program, {"x": np.array([1, 1], np.float32)})
    np.testing.assert_array_equal(found, [[1, 1], [3, 4], [1, 2], [4, 5], [4, 5]])


def test_initializers_listed_as_inputs_are_no_inputs():
    proto = mlp()
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 2]))
    assert [p.name for p in program_from_onnx(proto).inputs] == ["x"]


def test_foreign_functions_are_inlined_and_fused_regions_kept():
    text = """
        <ir_version: 10, opset_import: ["" : 20, "{domain}" : 1]>
        g (float[2] x) => (float[2] y) {{ y = {domain}.twice (x) }}
        <domain: "{domain}", opset_import: ["" : 20]>
        twice (a) => (b) {{ b = Add (a, a) }}
    """
    foreign = Program.from_text(text.format(domain="mine"))
    assert [n.op_type for n in foreign.graph] == ["Add"]
    assert not foreign.functions
    assert foreign.outputs[0].name == "y"
    fused = Program.from_text(text.format(domain="optcompiler.fused"))
    assert [n.op_type for n in fused.graph] == ["twice"]
    assert len(fused.functions) == 1


def test_metadata_of_exporters_goes_but_the_source_module_stays():
    proto = mlp()
    proto.doc_string = "words"
    node = proto.graph.node[1]
    node.doc_string = "more words"
    for key, value in {
        "pkg.torch.onnx.name_scopes": "['', 'layer1', 'layer1.0.conv1', 'conv2d']",
        "pkg.torch.onnx.stack_trace": "File /home/me/secret.py",
        PASS_KEY: "insert-qdq",
    }.items():
        entry = node.metadata_props.add()
        entry.key, entry.value = key, value
    program = program_from_onnx(proto)
    found = next(iter(program.graph))
    assert found.metadata_props == {SOURCE_KEY: "layer1.0.conv1", PASS_KEY: "insert-qdq"}
    assert not found.doc_string
    assert not program.model.doc_string
    again = program_from_onnx(program.to_proto())
    assert next(iter(again.graph)).metadata_props == found.metadata_props


@pytest.mark.parametrize(
    "scopes",
    ["garbage(", "[1, 2]", "['', 'conv2d']", "['_empty_nn_module_stack_from_metadata_hook', 'x']"],
)
def test_scopes_that_name_no_module_give_no_source(scopes):
    node = ir.Node("", "Relu", [], metadata_props={"pkg.torch.onnx.name_scopes": scopes})
    assert source_path(node) == ""


def test_casts_to_the_type_of_another_value_become_casts():
    program = Program.from_text("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (int64[2] x, float[2] l) => (float[2] y) { y = CastLike (x, l) }
    """)
    (node,) = program.graph
    assert (node.op_type, node.attributes["to"].as_int()) == ("Cast", TensorProto.FLOAT)
    assert program.outputs[0].name == "y"


def test_shapes_that_the_file_leaves_open_are_inferred():
    proto = mlp()
    del proto.graph.output[0].type.tensor_type.shape.dim[1]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    assert str(program_from_onnx(proto).outputs[0]) == "y: float[N, 2]"


def test_arguments_are_not_changed():
    proto = mlp(13)
    before = proto.SerializeToString(deterministic=True)
    program_from_onnx(proto)
    assert proto.SerializeToString(deterministic=True) == before
    model = ir.from_proto(proto)
    text = ir.to_onnx_text(model)
    program = program_from_onnx(model)
    program.add_weight("w", np.zeros(2, np.float32))
    assert ir.to_onnx_text(model) == text


def test_importing_twice_gives_the_same_program():
    program = program_from_onnx(mlp())
    assert program_from_onnx(program.model).content_hash() == program.content_hash()
    assert program_from_onnx(mlp()).content_hash() == program.content_hash()


# -- external data --------------------------------------------------------------------------


def save_external(tmp_path, location: str = "w.data") -> str:
    path = tmp_path / "model.onnx"
    ir.save(ir.from_proto(wide_model()), path, external_data="w.data")
    proto = onnx.load(path, load_external_data=False)
    entry = next(e for e in proto.graph.initializer[0].external_data if e.key == "location")
    entry.value = location
    path.write_bytes(proto.SerializeToString())
    return str(path)


def test_external_data_stays_memory_mapped(tmp_path, monkeypatch):
    save_external(tmp_path)
    monkeypatch.chdir(tmp_path)
    program = program_from_onnx("model.onnx")
    tensor = program.weights()["w"]
    assert isinstance(tensor, ir.ExternalTensor)
    np.testing.assert_array_equal(tensor.numpy(), np.arange(600))
    assert run_onnx(program)[0].shape == (600,)


def test_external_data_is_found_from_any_directory_and_goes_into_what_is_written(tmp_path):
    proto = mlp()
    path = tmp_path / "small.onnx"
    ir.save(ir.from_proto(proto), path, external_data="small.data", size_threshold_bytes=0)
    small = program_from_onnx(path)  # checked as a protobuf in memory, where no path is known
    big = program_from_onnx(save_external(tmp_path))
    away = tmp_path / "away"
    away.mkdir()
    big.save(away / "big.onnx")
    mapped = big.weights()["w"].numpy()  # a view of the file, which writing must not close
    for program in (small, big, program_from_onnx(away / "big.onnx")):
        written = program.to_proto()
        assert all(not t.external_data for t in written.graph.initializer)
        onnx.checker.check_model(written, full_check=True)
    np.testing.assert_array_equal(mapped, np.arange(600))


def test_external_data_that_leaves_the_directory_is_refused(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    save_external(tmp_path)
    for location in ("../w.data", str(tmp_path / "w.data"), "link.data"):
        if location == "link.data":
            os.symlink(tmp_path / "w.data", inside / "link.data")
        with pytest.raises(InputError, match="outside the model's directory"):
            program_from_onnx(save_external(inside, location))


def test_external_data_that_is_missing_truncated_or_hard_linked_is_refused(tmp_path):
    path = save_external(tmp_path)
    os.link(tmp_path / "w.data", tmp_path / "other")
    with pytest.raises(InputError, match="hard links"):
        program_from_onnx(path)
    os.remove(tmp_path / "other")
    os.truncate(tmp_path / "w.data", 100)
    with pytest.raises(InputError, match="of 100; copy the data file again"):
        program_from_onnx(path)
    os.remove(tmp_path / "w.data")
    with pytest.raises(InputError, match="no such file; put the data beside"):
        program_from_onnx(path)


def test_external_data_of_a_protobuf_has_no_directory(tmp_path):
    proto = onnx.load(save_external(tmp_path), load_external_data=False)
    with pytest.raises(InputError, match="give the path of the file"):
        program_from_onnx(proto)


# -- bad input ------------------------------------------------------------------------------


def test_files_that_are_no_models(tmp_path):
    def refused(content: bytes | None, match: str) -> None:
        path = tmp_path / "m.onnx"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=match) as caught:
            program_from_onnx(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2

    refused(None, "no such file")
    refused(b"", "is empty")
    refused(b"\xff\xfe garbage that is no protobuf", "not an ONNX file")
    refused(wide_model().SerializeToString()[:-700], "truncated")
    refused(b"PK\x03\x04", "not an ONNX file|no ONNX graph")
    with pytest.raises(InputError, match="cannot be read"):
        program_from_onnx(tmp_path)
    with pytest.raises(InputError, match="a int is not an ONNX model"):
        program_from_onnx(3)


def test_invalid_models_are_refused_with_the_checker_s_reason():
    unknown = mlp()
    unknown.graph.node[1].op_type = "NoSuchOperator"
    with pytest.raises(InputError, match="NoSuchOperator"):
        program_from_onnx(unknown)
    mismatch = mlp()
    mismatch.graph.initializer[0].dims[0], mismatch.graph.initializer[0].dims[1] = 2, 4
    with pytest.raises(InputError, match="shape inference failed"):
        program_from_onnx(mismatch)
    dangling = mlp()
    dangling.graph.node[1].input[0] = "nobody"
    with pytest.raises(InputError, match="nobody"):
        program_from_onnx(dangling)
    with pytest.raises(InputError, match="no ONNX graph"):
        program_from_onnx(onnx.ModelProto())


def test_a_weight_with_too_few_bytes_is_refused():
    proto = wide_model()
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-8]
    with pytest.raises(InputError, match="initializer 'w' cannot be read"):
        program_from_onnx(proto)


def test_weights_that_are_not_finite_are_refused_and_masks_are_not():
    def with_weight(values: list[float]) -> onnx.ModelProto:
        proto = wide_model(4)
        array = np.array(values, np.float32)
        proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w"))
        return proto

    with pytest.raises(InputError, match="'w' holds 2 NaN or infinite values of 4"):
        program_from_onnx(with_weight([0.5, np.nan, np.inf, 1]))
    with pytest.raises(InputError, match="holds 1 NaN"):
        program_from_onnx(with_weight([0, 0, np.nan, 0]))
    program_from_onnx(with_weight([0, -np.inf, 0, 1]))


def test_not_finite_sees_low_precision_floats():
    bfloat16 = ir.DataType.BFLOAT16.numpy()
    assert not_finite(np.array([1.5, np.nan], bfloat16)) == 1
    assert not_finite(np.array([1.5, 2], np.float16)) == 0


def test_inputs_that_are_no_tensors_are_ports_of_their_own_kind():
    sequence = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (seq(float[2]) s, int64 i) => (float[2] y) { y = SequenceAt (s, i) }
    """)
    program = program_from_onnx(sequence)
    assert [str(p) for p in program.inputs] == ["s: sequence of float", "i: int64[]"]
    rankless = mlp()
    rankless.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(InputError, match="input 'x' has no shape"):
        program_from_onnx(rankless)


def test_scan_of_opset_8_keeps_its_batch_dimension():
    program = program_from_onnx(
        parser.parse_model("""
            <ir_version: 3, opset_import: ["" : 8]>
            g (float[1,2] initial, float[1,3,2] x) => (float[1,2] y, float[1,3,2] z) {
                y, z = Scan ("", initial, x) <num_scan_inputs: int = 1,
                    body: graph = body (float[2] s, float[2] n) => (float[2] t, float[2] o) {
                        t = Add (s, n)  o = Identity (t) }>
            }
        """)
    )
    assert program.opset == 8
    assert program.inputs[1].shape == (1, 3, 2)


def test_defaults_that_inference_over_a_function_body_misses_are_stated():
    program = program_from_onnx(
        parser.parse_model("""
            <ir_version: 7, opset_import: ["" : 13]>
            g (float[3,3,3,1] x) => (float[3,3,3,1] y) { y = MeanVarianceNormalization (x) }
        """)
    )
    [node] = program.graph
    assert list(node.attributes["axes"].as_ints()) == [0, 2, 3]


def test_slopes_of_prelu_before_opset_7_keep_to_the_channels():
    program = program_from_onnx(
        parser.parse_model("""
            <ir_version: 3, opset_import: ["" : 6]>
            g (float[1,3,2,2] x) => (float[1,3,2,2] y) <float[3] slope = {1, 2, 3}>
            { y = PRelu (x, slope) }
        """)
    )
    [got] = run_onnx(program, {"x": np.full((1, 3, 2, 2), -1, np.float32)})
    np.testing.assert_array_equal(got[0, :, 0, 0], [-1, -2, -3])


POOLS = """
<ir_version: 7, opset_import: ["" : {opset}]>
g (float[1, 2, {high}, 22] x) => (float[{y}] y)
<{noted}>
{{
    p = MaxPool <kernel_shape = [2, 2], strides = [3, 3], pads = [1, 1, 1, 1], ceil_mode = 1> (x)
    r = Relu (p)
    y = AveragePool <kernel_shape = [3, 2], strides = [2, 2], pads = [1, 0, 1, 1], ceil_mode = 1>
        (r)
}}
"""


@pytest.mark.parametrize("opset", [11, 18, 20, 22])
@pytest.mark.parametrize(
    ("y", "noted"),
    [
        ("1, 2, h, w", ""),
        ("1, 2, 5, 4", "float[1, 2, 9, 8] p"),
        ("1, 2, 6, 5", "float[1, 2, 9, 9] p"),
    ],
    ids=["unstated", "right", "as older inference has it"],
)
def test_a_window_that_would_start_in_the_padding_is_none(opset: int, y: str, noted: str):
    text = POOLS.format(opset=opset, y=y, noted=noted, high=25)
    if opset == 22 and noted.endswith("9] p"):
        with pytest.raises(InputError, match="fix the model"):
            Program.from_text(text)
        return
    program = Program.from_text(text)
    assert program.outputs[0].shape == (1, 2, 5, 4)
    x = np.random.default_rng(0).standard_normal((1, 2, 25, 22)).astype(np.float32)
    session = onnxruntime.InferenceSession(parser.parse_model(text).SerializeToString())
    expected = session.run(None, {"x": x})
    np.testing.assert_allclose(run_onnx(program, {"x": x})[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(program.to_torch()(torch.tensor(x))[0], expected[0], rtol=1e-6)


def test_a_pooling_of_unknown_size_gets_the_right_one_when_it_is_bound():
    program = Program.from_text(POOLS.format(opset=18, y="1, 2, h, w", noted="", high="H"))
    assert bind(program, {"H": 25}).outputs[0].shape == (1, 2, 5, 4)


def test_a_pooling_whose_windows_all_start_inside_keeps_the_version():
    text = POOLS.format(opset=18, y="1, 2, h, w", noted="", high=25)
    for old, new in (
        ("strides = [3, 3]", "strides = [1, 1]"),
        ("pads = [1, 0, 1, 1]", "pads = [1, 1, 1, 0]"),
    ):
        text = text.replace(old, new)
    assert Program.from_text(text).opset == 20
