"""Pickles, TorchScript, and .pt2 archives that hold more than a program or lie about it.

The archives are written member by member, as torch.export.save lays them out, so that making one
needs no torch. Whatever would run leaves the file `owned`, which the runner would see.
"""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.corpus import Make, add, item

Members = dict[str, bytes]


PICKLE = b"\x80\x02cposix\nsystem\n(X\x0b\x00\x00\x00touch ownedtR."
"""Unpickled, it runs a command."""


def zipped(
    members: Mapping[str, bytes], *, top: str = "model/", how: int = zipfile.ZIP_STORED
) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(top + name), data, how)
    return stream.getvalue()


# -- a program as torch.export saves it -----------------------------------------------------


def _tensor(*sizes: int) -> dict[str, Any]:
    strides = [int(np.prod(sizes[i + 1 :])) for i in range(len(sizes))]
    return {
        "dtype": 7, "sizes": [{"as_int": s} for s in sizes], "requires_grad": False,
        "device": {"type": "cpu", "index": None}, "strides": [{"as_int": s} for s in strides],
        "storage_offset": {"as_int": 0}, "layout": 7,
    }  # fmt: skip


def _named(name: str) -> dict[str, Any]:
    return {"as_tensor": {"name": name}}


_LEAF = {"type": None, "context": None, "children_spec": []}
_DICT = {"type": "builtins.dict", "context": "[]", "children_spec": []}


def _tuple(*children: object) -> dict[str, Any]:
    return {"type": "builtins.tuple", "context": "null", "children_spec": list(children)}


def _tree(outer: object) -> str:
    return json.dumps([1, outer])


PROGRAM: dict[str, Any] = {
    "graph_module": {
        "graph": {
            "inputs": [_named("b_w"), _named("x")],
            "outputs": [_named("add")],
            "nodes": [
                {
                    "target": "torch.ops.aten.add.Tensor",
                    "inputs": [
                        {"name": "self", "arg": _named("x"), "kind": 1},
                        {"name": "other", "arg": _named("b_w"), "kind": 1},
                    ],
                    "outputs": [_named("add")],
                    "metadata": {"stack_trace": "", "nn_module_stack": "L__self__,,M"},
                    "is_hop_single_tensor_return": None,
                    "name": "add",
                }
            ],
            "tensor_values": {"b_w": _tensor(4), "x": _tensor(2, 4), "add": _tensor(2, 4)},
            "sym_int_values": {}, "sym_bool_values": {}, "is_single_tensor_return": False,
            "custom_obj_values": {}, "sym_float_values": {},
        },
        "signature": {
            "input_specs": [
                {"buffer": {"arg": {"name": "b_w"}, "buffer_name": "w", "persistent": True}},
                {"user_input": {"arg": _named("x")}},
            ],
            "output_specs": [{"user_output": {"arg": _named("add")}}],
        },
        "module_call_graph": [
            {
                "fqn": "",
                "signature": {
                    "inputs": [_named("x")], "outputs": [_named("add")],
                    "in_spec": _tree(_tuple(_tuple(_LEAF), _DICT)), "out_spec": _tree(_LEAF),
                    "forward_arg_names": ["x"],
                },
            }
        ],
        "metadata": {}, "treespec_namedtuple_fields": {},
    },
    "opset_version": {"aten": 10}, "range_constraints": {},
    "schema_version": {"major": 8, "minor": 15}, "verifiers": ["TRAINING"],
    "torch_version": "2.13.0", "guards_code": [],
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "config": {
        "w": {"path_name": "weight_0", "is_param": False, "use_pickle": False,
              "tensor_meta": _tensor(4)}
    }
}  # fmt: skip

_EXAMPLES = (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x08tQK\x00K\x02K\x04\x86K\x04K\x01\x86\x89"
    b"ccollections\nOrderedDict\n)RtR\x85}\x86."
)
"""What torch.save writes of ((float tensor [2, 4],), {})."""


def examples(pickled: bytes = _EXAMPLES, **more: bytes) -> bytes:
    plain = {"data.pkl": pickled, "byteorder": b"little", "data/0": bytes(32), "version": b"3\n"}
    return zipped(plain | more, top="archive/")


def members(**changes: bytes) -> Members:
    """Members of a good archive, with changes and additions."""
    whole: Members = {
        "data/weights/weight_0": np.ones(4, np.float32).tobytes(),
        "data/weights/model_weights_config.json": json.dumps(CONFIG).encode(),
        "data/constants/model_constants_config.json": b'{"config": {}}',
        "models/model.json": json.dumps(PROGRAM).encode(),
        "data/sample_inputs/model.pt": examples(),
        "archive_format": b"pt2",
        "archive_version": b"0",
        ".data/version": b"6\n",
        "byteorder": b"little",
    }
    return whole | changes


def of_bytes(data: bytes, name: str = "model.pt2", *, command: str = "compile") -> Make:
    def make(folder: Path) -> list[str]:
        (folder / name).write_bytes(data)
        return [command, str(folder / name)]

    return make


def changed(change: Callable[[Any], object], base: Mapping[str, Any] = PROGRAM) -> bytes:
    """JSON of a program after `change` was let at a copy of it."""
    copy = deepcopy(dict(base))
    change(copy)
    return json.dumps(copy).encode()


def with_program(change: Callable[[Any], object]) -> bytes:
    return zipped(members(**{"models/model.json": changed(change)}))


def with_weights(change: Callable[[Any], object]) -> bytes:
    config = changed(change, CONFIG)
    return zipped(members(**{"data/weights/model_weights_config.json": config}))


# -- refused by their names or first bytes --------------------------------------------------

for suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl"):
    add(f"pickle{suffix}", of_bytes(PICKLE, f"model{suffix}"), says="run code",
        fresh=suffix == ".pt")  # fmt: skip
add("pickle-named-pt2", of_bytes(PICKLE), says="runs code", fresh=True)
add("pickle-named-onnx", of_bytes(PICKLE, "model.onnx"), says="not an ONNX file")
_SAVED = {"data.pkl": PICKLE, "byteorder": b"little", "version": b"3\n", "data/0": bytes(16)}
add("pickle-zip-named-pt", of_bytes(zipped(_SAVED, top="archive/"), "model.pt"), says="run code")
add("pickle-zip-named-pt2", of_bytes(zipped(_SAVED, top="archive/")), says="run code", fresh=True)
add("pickle-zip-named-onnx", of_bytes(zipped(_SAVED), "model.onnx"), says="not an ONNX file")
_SCRIPT = {"constants.pkl": PICKLE, "data.pkl": PICKLE, "code/__torch__.py": b"import os\n"}
add("torchscript-named-pt", of_bytes(zipped(_SCRIPT), "model.pt"), says="run code")
add("torchscript-named-pt2", of_bytes(zipped(_SCRIPT)), says="TorchScript", fresh=True)
_OLD = {"version": b"2.7", "serialized_exported_program.json": b"{}",
        "serialized_state_dict.pt": PICKLE}  # fmt: skip
add("archive-of-torch-2.7", of_bytes(zipped(_OLD, top="")), says="pt2")

# -- the zip file ---------------------------------------------------------------------------

GOOD = zipped(members())
add("archive-empty", of_bytes(b""), says="empty")
add("archive-garbage", of_bytes(np.random.default_rng(0).bytes(4096)))
add("archive-truncated", of_bytes(GOOD[: len(GOOD) // 2]))
add("archive-without-end", of_bytes(GOOD[:-1]))
add("archive-with-comment", of_bytes(GOOD[:-2] + b"\4\0note"))
add("archive-appended", of_bytes(GOOD + b"PK\5\6" + bytes(18)))
add("archive-prepended", of_bytes(zipped(members(), top="other/")[:100] + GOOD))
add("archive-inspect-pickle", of_bytes(zipped(_SAVED), command="inspect"), says="run code")

_ZEROS = bytes(1 << 26)
_BOMB = members(**{"data/weights/weight_0": _ZEROS})
add("archive-zip-bomb", of_bytes(zipped(_BOMB, how=zipfile.ZIP_DEFLATED)), says="compressed",
    fresh=True)  # fmt: skip
add("archive-zip-bomb-nested", of_bytes(zipped(members(
    **{"data/sample_inputs/model.pt": zipped({"data.pkl": _ZEROS}, how=zipfile.ZIP_DEFLATED)}
))), says="compressed")  # fmt: skip


def _lying_sizes() -> bytes:
    """Every member's size in the directory is 2 ** 31, over the same few bytes."""
    data = bytearray(GOOD)
    at = data.find(b"PK\1\2")
    while at >= 0:
        data[at + 20 : at + 28] = struct.pack("<II", 1 << 31, 1 << 31)
        at = data.find(b"PK\1\2", at + 4)
    return bytes(data)


add("archive-lying-sizes", of_bytes(_lying_sizes()), says="overlap")
_COUNTED = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 65535, 65535, 0xFFFFFFFF, 0xFFFFFFFF, 0)
add("archive-lying-count", of_bytes(GOOD[:-22] + _COUNTED))

for name, member in (
    ("parent", "../../owned"), ("absolute", "/tmp/owned"), ("backslash", "..\\owned"),
    ("drive", "C:owned"), ("dots", "a/./b"),
):  # fmt: skip
    add(f"archive-member-{name}", of_bytes(zipped(members(**{member: b"x"}))), says="plain path")
add("archive-member-absolute-only", of_bytes(zipped({"/etc/owned": b"x"}, top="")))


def _linked(folder: Path) -> list[str]:
    with zipfile.ZipFile(folder / "model.pt2", "w") as archive:
        for name, data in members().items():
            entry = zipfile.ZipInfo(f"model/{name}")
            if name.endswith("weight_0"):
                entry.external_attr = (stat.S_IFLNK | 0o777) << 16
                data = b"/etc/passwd"
            archive.writestr(entry, data)
    return ["compile", str(folder / "model.pt2")]


add("archive-member-symlink", _linked, says="symbolic link")


@item("archive-member-twice", says="twice")
def _twice(folder: Path) -> list[str]:
    with warnings.catch_warnings(), zipfile.ZipFile(folder / "model.pt2", "w") as archive:
        warnings.simplefilter("ignore")
        for name, data in [*members().items(), ("models/model.json", b"{}")]:
            archive.writestr(zipfile.ZipInfo(f"model/{name}"), data)
    return ["compile", str(folder / "model.pt2")]


add("archive-fifo", lambda f: (os.mkfifo(f / "m.pt2"), ["compile", str(f / "m.pt2")])[1],
    says="pipe")  # fmt: skip
add("archive-missing", lambda f: ["compile", str(f / "nothing.pt2")], says="no such file")
add("archive-two-folders", of_bytes(zipped(members(), top="") + b""), says="")

# -- members that run -----------------------------------------------------------------------

add("archive-compiled-code", of_bytes(zipped(members(
    **{"data/aotinductor/model/lib.so": b"\x7fELF"}))), says="compiled code",
    fresh=True)  # fmt: skip
add("archive-extra-pickle", of_bytes(zipped(members(**{"more.pkl": PICKLE}))), says="pickle")
add("archive-legacy-weights", of_bytes(zipped(members(**{"data/weights/model.pt": PICKLE}))),
    says="model.pt")  # fmt: skip
add("archive-pickled-weight", of_bytes(with_weights(
    lambda c: c["config"]["w"].update(use_pickle=True))), says="pickled", fresh=True)  # fmt: skip
for kind in ("opaque_obj_0", "custom_obj_0"):
    config = {"config": {"o": {"path_name": kind, "is_param": False, "use_pickle": True,
                               "tensor_meta": None}}}  # fmt: skip
    add(
        f"archive-{kind[:6]}-constant",
        of_bytes(zipped(members(**{
            f"data/constants/{kind}": PICKLE,
            "data/constants/model_constants_config.json": json.dumps(config).encode(),
        }))),
        says="pickled",
    )  # fmt: skip
add("archive-examples-run", of_bytes(zipped(members(
    **{"data/sample_inputs/model.pt": examples(PICKLE)}))), says="only tensors",
    fresh=True)  # fmt: skip
add("archive-examples-plain-pickle", of_bytes(zipped(members(
    **{"data/sample_inputs/model.pt": PICKLE}))), says="runs code")  # fmt: skip
_BYTEARRAY = b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R."
add("archive-examples-bomb", of_bytes(zipped(members(
    **{"data/sample_inputs/model.pt": examples(_BYTEARRAY)}))), says="only tensors")  # fmt: skip


# -- a program that lies --------------------------------------------------------------------


def _graph(program: Any) -> Any:
    return program["graph_module"]["graph"]


def _node(program: Any) -> Any:
    return _graph(program)["nodes"][0]


def _named_input(text: str) -> Callable[[Any], object]:
    return lambda p: _graph(p)["inputs"][1]["as_tensor"].update(name=text)


def _sized_by(text: str) -> Callable[[Any], object]:
    size = {"as_expr": {"expr_str": text, "hint": {"as_int": 2}}}
    return lambda p: _graph(p)["tensor_values"]["x"]["sizes"].__setitem__(0, size)


def _tree_of(spec: str) -> Callable[[Any], object]:
    call = lambda p: p["graph_module"]["module_call_graph"][0]["signature"]  # noqa: E731
    return lambda p: call(p).update(in_spec=spec)


_OS = "__import__('os').system('touch owned')"
_ENUM = _tree({**_DICT, "context": json.dumps([{"__enum__": True, "fqn": "os:x", "name": "x"}])})
_FACTORY = _tree({"type": "collections.defaultdict", "children_spec": [], "context": json.dumps(
    {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
)})  # fmt: skip
for name, change, words in (
    ("expression", _sized_by(_OS), "expression"),
    ("expression-of-attributes", _sized_by("s0.__class__.__mro__"), "expression"),
    ("expression-bomb", _sized_by("9**9**9**9"), "expression"),
    ("expression-endless", _sized_by("(" * 100_000), "expression"),
    ("operator-os", lambda p: _node(p).update(target="torch.os.system"), "torch.os.system"),
    ("operator-import", lambda p: _node(p).update(target="torch.ops.import_module"), "import"),
    ("operator-library", lambda p: _node(p).update(target="torch.ops.load_library"), "library"),
    ("operator-file", lambda p: _node(p).update(target="torch.ops.aten.from_file.default"),
     "from_file"),
    ("operator-dunder", lambda p: _node(p).update(target="torch.ops.aten.__class__"), "__class__"),
    ("operator-call", lambda p: _node(p).update(target="_operator.call"), "_operator.call"),
    ("operator-extension", lambda p: _node(p).update(target="#x:y"), "#x:y"),
    ("operator-argument", lambda p: _node(p)["inputs"][0].update(
        arg={"as_operator": "torch.hub.load"}), "torch.hub.load"),
    ("name-is-code", _named_input(f"x={_OS}"), "plain name"),
    ("name-newline", _named_input("x\nimport os"), "plain name"),
    ("argument-is-code", lambda p: _node(p)["inputs"][1].update(name=f"a={_OS}, b", kind=2),
     "plain name"),
    ("buffer-is-code", lambda p: p["graph_module"]["signature"]["input_specs"][0]["buffer"].update(
        buffer_name=f'w"), {_OS}, ("'), "plain name"),
    ("tree-enum", _tree_of(_ENUM), "tree"),
    ("tree-factory", _tree_of(_FACTORY), "tree"),
    ("tree-deep", _tree_of("[" * 100_000), "tree"),
    ("keyword-is-code", _tree_of(_tree(_tuple(_tuple(), {**_DICT, "context": json.dumps([_OS])}))),
     "tree"),
    ("forward-argument-is-code", lambda p: p["graph_module"]["module_call_graph"][0][
        "signature"].update(forward_arg_names=[f"x={_OS}"]), "plain name"),
):  # fmt: skip
    add(f"program-{name}", of_bytes(with_program(change)), says=words,
        fresh=name in ("expression", "operator-os", "name-is-code"))  # fmt: skip

for name, data in (
    ("none", b"null"), ("list", b"[]"), ("not-json", b"{"), ("deep", b"[" * 100_000),
    ("key-twice", b'{"graph_module": {}, "graph_module": {}}'), ("not-utf8", b'"\xff\xfe"'),
):  # fmt: skip
    add(f"program-{name}", of_bytes(zipped(members(**{"models/model.json": data}))))
for gone in ("models/model.json", "data/weights/model_weights_config.json",
             "data/sample_inputs/model.pt", "archive_format"):  # fmt: skip
    add(f"archive-without-{Path(gone).name}", of_bytes(
        zipped({k: v for k, v in members().items() if k != gone})))  # fmt: skip


def _meta(**changes: object) -> bytes:
    return with_weights(lambda c: c["config"]["w"]["tensor_meta"].update(changes))


for name, data in (
    ("too-long", _meta(sizes=[{"as_int": 5}])),
    ("huge", _meta(sizes=[{"as_int": 1 << 40}], strides=[{"as_int": 0}])),
    ("negative", _meta(sizes=[{"as_int": -4}])),
    ("offset-huge", _meta(storage_offset={"as_int": 1 << 62})),
    ("offset-negative", _meta(storage_offset={"as_int": -1})),
    ("strides-negative", _meta(strides=[{"as_int": -1}])),
    ("ranks", _meta(strides=[])),
    ("text", _meta(sizes="many")),
    ("elsewhere", with_weights(lambda c: c["config"]["w"].update(path_name="weight_9"))),
    ("outside", with_weights(lambda c: c["config"]["w"].update(path_name="weight_/../../x"))),
    ("no-config", with_weights(lambda c: c.clear())),
):  # fmt: skip
    add(f"archive-weight-{name}", of_bytes(data), says="data/weights" if name in ("text",) else "")
