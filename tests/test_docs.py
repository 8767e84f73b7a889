"""What the pages show works: code compiles, the example pass runs, names and options exist."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest

import optcompiler
from optcompiler.cli import main
from optcompiler.program import Program
from tests.support import apply_all, op_types, proposals, random_inputs, run_onnx

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def spans(page: Path) -> list[str]:
    """Code between single backticks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `optcompiler …` command line: shell blocks, indented code, backticks."""
    indented = re.findall(r"^ {4}(\S.*)$", page.read_text(), re.MULTILINE)
    shell = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    for line in (*shell, *indented, *spans(page)):
        words = line.partition("#")[0].split()
        if words[:1] == ["optcompiler"] and len(words) > 1:
            yield words[1:]


def options_of(command: click.Command) -> set[str]:
    context = click.Context(command)
    return {o for p in command.get_params(context) for o in (*p.opts, *p.secondary_opts)}


@pages
def test_python_is_python(page: Path) -> None:
    for number, code in enumerate(blocks(page, "python")):
        compile(code, f"{page.name}, block {number}", "exec")


@pages
def test_names_and_keywords_exist(page: Path) -> None:
    """`oc.NAME` and the keywords of `oc.NAME(...)`, in blocks and between backticks."""
    trees = [ast.parse(code) for code in blocks(page, "python")]
    for span in spans(page):
        if span.startswith("oc."):
            trees.append(ast.parse(span))
    for node in (n for tree in trees for n in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optcompiler."):
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "optcompiler":
            assert {a.name for a in node.names} <= set(optcompiler.__all__)
        called = node.func if isinstance(node, ast.Call) else node
        if not isinstance(called, ast.Attribute) or not isinstance(called.value, ast.Name):
            continue
        if called.value.id != "oc":
            continue
        assert called.attr in optcompiler.__all__, f"oc.{called.attr}"
        if isinstance(node, ast.Call):
            signature = inspect.signature(getattr(optcompiler, called.attr))
            signature.bind_partial(**{k.arg: None for k in node.keywords if k.arg})


@pages
def test_commands_and_their_options_exist(page: Path) -> None:
    assert isinstance(main, click.Group)
    for words in commands(page):
        options = {w.partition("=")[0] for w in words if w.startswith("-") and w != "-"}
        if words[0].startswith("-"):
            assert options <= options_of(main), words
            continue
        assert words[0] in main.commands, words
        assert options <= options_of(main.commands[words[0]]) | {"--help", "-h"}, words
    every = {o for c in main.commands.values() for o in options_of(c)} | options_of(main)
    loose = {s.split()[0] for s in spans(page) if s.startswith("--")}
    assert loose <= every


def test_the_pages_show_commands_at_all() -> None:
    shown = {words[0] for page in PAGES for words in commands(page)}
    assert {"compile", "explain", "passes", "plugins", "device"} <= shown


# -- the example pass of docs/hooks.md --------------------------------------------------------

NET = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[2,4] x) => (float[2,3] h, float[2,3] p)
<float[4,3] w = {0.5,-1,1.5,2,-0.5,1,0.25,0.75,-1.25,-2,1,0.5}, float[3] k = {1,2,3}> {
    [gemm] a = MatMul (x, w)
    [gate] s = Sigmoid (a)
    [scale] h = Mul (s, k)
    [head] p = Sigmoid (a)
}
"""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    (code,) = (b for b in blocks(ROOT / "docs" / "hooks.md", "python") if "HardSigmoid" in b)
    module = types.ModuleType("hooks_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "docs/hooks.md", "exec"), vars(module))
    return module


def test_the_example_pass_registers(example: types.ModuleType) -> None:
    registry = optcompiler.Registry(load=[], extra=[example])
    found = registry.pass_class("hard-sigmoid")
    assert found is example.HardSigmoid
    assert dataclasses.is_dataclass(found)


def test_the_example_pass_rewrites(example: types.ModuleType) -> None:
    program = Program.from_text(NET)
    candidates, declines = proposals(example.HardSigmoid(), program)
    assert [(c.site, c.choice, c.exact) for c in candidates] == [("gate", "hard", False)]
    assert [(d.site, d.reason) for d in declines] == [
        ("head", "its output is a probability that leaves the model")
    ]
    after, patches = apply_all(example.HardSigmoid(slope=0.2), program)
    after.verify(like=program)
    assert len(patches) == 1
    assert op_types(program) == ["MatMul", "Sigmoid", "Mul", "Sigmoid"]
    assert op_types(after) == ["MatMul", "HardSigmoid", "Mul", "Sigmoid"]

    inputs = random_inputs(program)
    a = inputs["x"] @ program.weights()["w"].numpy()
    hard, head = run_onnx(after, inputs)
    expected = np.clip(0.2 * a + 0.5, 0, 1) * [1, 2, 3]
    np.testing.assert_allclose(hard, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(head, run_onnx(program, inputs)[1])


# -- the calibration sources of docs/guide.md --------------------------------------------------


def test_the_sources_of_the_guide_calibrate() -> None:
    (code,) = (b for b in blocks(ROOT / "docs" / "guide.md", "python") if "from_few" in b)
    exec(compile(code, "docs/guide.md", "exec"), {})
