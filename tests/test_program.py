from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from optcompiler.errors import InputError, VerificationError
from optcompiler.program import PASS_KEY, Port, Program, constant
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
