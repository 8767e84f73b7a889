"""Names in a model are data: whatever they hold, emitted C and Triton stay what they were."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from optcompiler.lowering import lower
from optcompiler.program import Program
from optcompiler.target import Target
from optcompiler_cpu.backend import CpuBackend
from optcompiler_cuda.emit import emit
from tests.support import assert_close, run_onnx

NAMES = (
    '"; system("touch owned"); "',
    "*/ int owned; /*",
    "// owned \\",
    "`touch owned`",
    "$(touch owned)",
    "owned\n#define int char\n",
    "owned\r\nint owned;",
    "owned\\",
    "owned??/",
    '"""\nimport owned\n"""',
    "''' + owned + '''",
    "{owned} %s %n @TABLES@ @",
    "../../owned",
    "ówned\u202e\U0001f600",
    "owned\x01\x1b[31m",
    "-owned",
)
SAFE = "plain"


def program(names: tuple[str, ...]) -> Program:
    """Each name is a node's, a value's and a weight's, and the first an input's and an output's."""
    shape = (3, 8)
    x, y = names[0] + "x", names[0] + "y"
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    at = x
    rng = np.random.default_rng(0)
    for i, name in enumerate(names):
        last = i == len(names) - 1
        weights.append(
            onnx.numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32), f"{name}w")
        )
        after = y if last else f"{name}v"
        nodes.append(onnx.helper.make_node("MatMul", [at, f"{name}w"], [f"{name}m"], f"{name}a"))
        nodes.append(onnx.helper.make_node("Softmax", [f"{name}m"], [after], f"{name}b"))
        at = after
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, names[0], [info(x, 1, shape)], [info(y, 1, shape)], weights, doc_string=names[0]
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    return Program.from_onnx(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10))


def words(text: str) -> str:
    """C text without its string literals."""
    return re.sub(r'"(\\.|[^"\\\n])*"', '""', text)


@pytest.mark.parametrize("first", NAMES)
def test_no_name_reaches_the_code(first: str, tmp_path: Path) -> None:
    """The code says the same as for names that are plain."""
    names = (first, *(n for n in NAMES if n != first))
    plain = tuple(f"{SAFE}{i}" for i in range(len(names)))
    source, tame = emit(lower(program(names))), emit(lower(program(plain)))
    assert source.source == tame.source
    ast.parse(source.source)
    source.schedule.write(tmp_path)
    assert any(
        first in text for text in strings(json.loads((tmp_path / "schedule.json").read_text()))
    )


def strings(data: object) -> list[str]:
    if isinstance(data, dict):
        return [s for k, v in data.items() for s in (*strings(k), *strings(v))]
    if isinstance(data, list):
        return [s for v in data for s in strings(v)]
    return [data] if isinstance(data, str) else []


def test_c_code_is_that_of_plain_names(tmp_path: Path) -> None:
    plain = tuple(f"{SAFE}{i}" for i in range(len(NAMES)))
    texts: list[dict[str, str]] = []
    for place, names in (("odd", NAMES), ("plain", plain)):
        directory = tmp_path / place
        directory.mkdir()
        source, backend = program(names), CpuBackend()
        info = backend.lower(source, Target("cpu", isa="portable"), directory)
        runner = backend.load(directory, info, threads=1)
        x = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
        inputs = {source.inputs[0].name: x}
        assert_close(runner.run(inputs), run_onnx(source, inputs))
        runner.close()
        texts.append({f.name: f.read_text() for f in directory.rglob("*.[ch]")})
    odd, tame = texts
    assert odd.keys() == tame.keys()
    for name, text in odd.items():
        assert words(text) == words(tame[name])
        assert "??" not in text.replace("??/ */", "")
    assert not list(tmp_path.rglob("owned*"))
    assert not Path("owned").exists()
