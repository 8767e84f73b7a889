"""Binding a call's arguments to arrays, and putting outputs back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from optcompiler.errors import InputError
from optcompiler.program import Port, Program
from optcompiler.signature import Parameter, Signature, Tree, as_array

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Answer:
    logits: object
    hidden: object = None


def tensor(index: int) -> Tree:
    return Tree("tensor", index)


TWO = Signature(
    parameters=(
        Parameter("ids", tensor(0)),
        Parameter("mask", tensor(1)),
        Parameter("k", Tree("constant", value=3)),
        Parameter("scale", tensor(2), positional=False),
    ),
    result=tensor(0),
    inputs=(
        Port("ids", "INT64", ("batch", 4)),
        Port("mask", "BOOL", ("batch", 4)),
        Port("scale", "FLOAT", ()),
    ),
    outputs=(Port("y", "FLOAT", ("batch",)),),
)
IDS = np.zeros((2, 4), np.int64)
MASK = np.ones((2, 4), np.bool_)


def test_arguments_bind_by_position_and_name():
    bound = TWO.bind((IDS,), {"mask": MASK, "scale": 2.0})
    assert list(bound) == ["ids", "mask", "scale"]
    assert bound["ids"] is IDS
    assert bound["scale"].dtype == np.float32
    assert bound["scale"].shape == ()


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((IDS,), {"scale": 1.0}, "argument 'mask' is missing; the model takes ids, mask, k, scale"),
        ((IDS, MASK, 3, 1.0), {}, "4 positional arguments given, at most 3 expected"),
        ((IDS, MASK), {"scale": 1.0, "labels": IDS}, "unknown argument 'labels'"),
        ((IDS, MASK), {"scale": 1.0, "ids": IDS}, "'ids' is given twice"),
        ((IDS, MASK, 4), {"scale": 1.0}, "'k' was fixed to 3 when the model was traced, 4 given"),
        ((IDS.astype("i4"), MASK), {"scale": 1.0}, "'ids' has dtype int32, int64 expected"),
        ((IDS[0], MASK), {"scale": 1.0}, r"'ids' has shape \[4\] \(1 dimensions\)"),
        ((IDS[:, :3], MASK), {"scale": 1.0}, r"ids: int64\[batch, 4\] expected: dimension 1 is 3"),
        ((IDS, MASK[:1]), {"scale": 1.0}, "dimension 'batch' is 1 here and 2 in 'ids'"),
        ((IDS, [True]), {"scale": 1.0}, "'mask' is a list"),
        ((IDS, MASK), {"scale": "much"}, "'scale' is a str"),
        ((IDS, 1), {"scale": 1.0}, "'mask' is a int"),
    ],
)
def test_what_does_not_fit_is_named(args, kwargs, match):
    with pytest.raises(InputError, match=match):
        TWO.bind(args, kwargs)


def test_torch_tensors_bind_without_a_copy_and_strided_ones_become_contiguous():
    signature = Signature.of_program(relu("FLOAT"))
    x = torch.randn(2, 3, requires_grad=True)
    bound = signature.bind((x,), {})["x"]
    assert bound.__array_interface__["data"][0] == x.data_ptr()
    strided = signature.bind((torch.randn(3, 2).T,), {})["x"]
    assert strided.flags.c_contiguous
    big_endian = np.ones((2, 3), ">f4")
    assert signature.bind((big_endian,), {})["x"].dtype == np.float32
    with pytest.raises(InputError, match="no numpy form"):
        signature.bind((torch.ones(2, 3).to_sparse(),), {})


def relu(dtype: str) -> Program:
    return Program.from_text(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g ({dtype.lower()}[2, 3] x) => ({dtype.lower()}[2, 3] y) {{ y = Relu (x) }}
    """)


def test_bfloat16_passes_both_ways():
    signature = Signature.of_program(relu("BFLOAT16"))
    x = torch.randn(2, 3).bfloat16()
    bound = signature.bind((x,), {})
    (y,) = signature.restore([bound["x"]], like_torch=True)
    assert y.dtype == torch.bfloat16
    assert torch.equal(x, y)


def test_an_onnx_program_takes_position_or_name_and_returns_a_tuple():
    signature = Signature.of_program(relu("FLOAT"))
    x = np.ones((2, 3), np.float32)
    assert signature.bind((x,), {}).keys() == signature.bind((), {"x": x}).keys() == {"x"}
    assert signature.restore([x], like_torch=False)[0] is x


def test_nested_arguments_are_checked_against_their_structure():
    tree = Tree(
        "dict",
        keys=("image", "points"),
        items=(tensor(0), Tree("list", items=(tensor(1), Tree("tuple", items=(tensor(2),))))),
    )
    ports = tuple(Port(n, "FLOAT", (2,)) for n in "abc")
    signature = Signature((Parameter("batch", tree),), tensor(0), ports, ports[:1])
    x = np.zeros(2, np.float32)
    bound = signature.bind(({"points": [x, (x,)], "image": x},), {})
    assert list(bound) == ["a", "b", "c"]
    for value, match in [
        ({"image": x}, "add points"),
        ({"image": x, "points": [x, (x,)], "more": x}, "leave out more"),
        (x, r"'batch' is float32\[2\], a dict expected"),
        ({"image": x, "points": x}, r"'batch\[points\]' is float32\[2\], a list expected"),
        ({"image": x, "points": [x, x, x]}, "has 3 items, 2 expected"),
        ({"image": x, "points": [x, x]}, r"\[points\]\[1\]' is float32"),
    ]:
        with pytest.raises(InputError, match=match):
            signature.bind((value,), {})


def test_objects_bind_by_field_or_key():
    tree = Tree("object", items=(tensor(0),), keys=("logits",), type=f"{__name__}:Answer")
    ports = (Port("a", "FLOAT", ()),)
    signature = Signature((Parameter("answer", tree),), tensor(0), ports, ports)
    x = np.float32(1)
    assert signature.bind((Answer(x),), {})["a"] == 1
    assert signature.bind(({"logits": x},), {})["a"] == 1
    with pytest.raises(InputError, match="without the field 'logits'"):
        signature.bind((3,), {})


def test_results_come_back_in_the_structure_they_had():
    tree = Tree(
        "dict",
        keys=("y", 7, "none", "pair", "answer", "n"),
        items=(
            tensor(0),
            Tree("list", items=(tensor(0), tensor(1))),
            Tree("constant"),
            Tree(
                "namedtuple", (-1), None, (tensor(1), tensor(0)), Pair._fields, f"{__name__}:Pair"
            ),
            Tree("object", items=(tensor(0),), keys=("logits",), type=f"{__name__}:Answer"),
            Tree("scalar", 2),
        ),
    )
    a, b, n = np.zeros(2), np.ones(1), np.array(5)
    signature = Signature((), tree, (), ())
    result = signature.restore([a, b, n], like_torch=False)
    assert list(result) == ["y", 7, "none", "pair", "answer", "n"]
    assert result["y"] is a
    assert result[7] == [a, b]
    assert result["none"] is None
    assert isinstance(result["pair"], Pair)
    assert result["pair"].first is b
    assert isinstance(result["answer"], Answer)
    assert result["answer"].logits is a
    assert result["n"] == 5
    assert isinstance(signature.restore([a, b, n], like_torch=True)["y"], torch.Tensor)


@pytest.mark.parametrize(
    "type_", ["not_loaded_anywhere:Answer", f"{__name__}:Nobody", "json:dumps"]
)
def test_classes_that_are_not_loaded_become_dicts(type_):
    tree = Tree("object", items=(tensor(0),), keys=("logits",), type=type_)
    assert Signature((), tree, (), ()).restore([np.ones(1)], like_torch=False) == {"logits": 1}


def test_json_round_trip():
    tree = Tree(
        "namedtuple", items=(tensor(0), Tree("constant", value="a")), keys=("a", "b"), type="m:P"
    )
    signature = Signature((*TWO.parameters, Parameter("t", tree)), tree, TWO.inputs, TWO.outputs)
    assert Signature.from_json(json.loads(json.dumps(signature.to_json()))) == signature
    with pytest.raises(InputError, match="not a signature"):
        Signature.from_json({"parameters": []})


def test_python_numbers_do_not_lose_their_kind():
    assert as_array(3, Port("n", "INT64", ())).dtype == np.int64
    assert as_array(3, Port("n", "FLOAT", ())).dtype == np.float32
    with pytest.raises(InputError, match="float64, int64 expected"):
        as_array(3.5, Port("n", "INT64", ()))


def test_calls_and_onnx_models_need_no_torch():
    code = """
import sys
import numpy as np
import optcompiler.calibration, optcompiler.sources
from optcompiler.frontend import import_model
from optcompiler.program import Program
text = '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Relu (x) }'
signature = import_model(Program.from_text(text).to_proto()).signature
bound = signature.bind((np.zeros(2, np.float32),), {})
signature.restore(list(bound.values()), False)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_result_names_no_class_that_does_something() -> None:
    """A manifest may name any class that is loaded; only records are made of it."""
    items = [{"kind": "constant", "value": "true"}, {"kind": "constant", "value": True}]
    result = {"kind": "object", "type": "subprocess:Popen", "keys": ["args", "shell"],
              "items": items}  # fmt: skip
    json = {"parameters": [], "result": result, "inputs": [], "outputs": []}
    restored = Signature.from_json(json).restore([], like_torch=False)
    assert restored == {"args": "true", "shell": True}


def test_bounds_are_kept_and_held() -> None:
    ports = (Port("x", "FLOAT", ("n", 2)), Port("z", "FLOAT", ("n",)))
    plain = Signature((), Tree("tuple"), ports, ())
    assert "bounds" not in plain.to_json()
    json = replace(
        plain, parameters=(Parameter("x", Tree("tensor", 0)), Parameter("z", Tree("tensor", 1))),
        bounds=(("n", 2, 4),),
    ).to_json()  # fmt: skip
    signature = Signature.from_json(json)
    assert signature.bounds == (("n", 2, 4),)

    def given(n: int) -> dict[str, np.ndarray]:
        return signature.check({"x": np.zeros((n, 2), np.float32), "z": np.zeros(n, np.float32)})

    assert given(2).keys() == {"x", "z"}
    for n in (1, 5):
        with pytest.raises(InputError, match=f"input 'x' has n {n}, 2 to 4 expected"):
            given(n)
    for wrong in ([["n", 1]], [["n", "a", 2]], 3):
        with pytest.raises(InputError, match="not a signature"):
            Signature.from_json(json | {"bounds": wrong})
