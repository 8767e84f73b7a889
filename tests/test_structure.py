"""The arrows of the design, held: who may import whom, what is public, what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import optcompiler
from optcompiler import hookspecs

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "optcompiler": ROOT / "optcompiler",
    "optcompiler_passes": ROOT / "passes" / "optcompiler_passes",
    "optcompiler_cpu": ROOT / "plugins" / "optcompiler_cpu",
    "optcompiler_cuda": ROOT / "plugins" / "optcompiler_cuda",
    "optcompiler_onnxruntime": ROOT / "plugins" / "optcompiler_onnxruntime",
}


def imported(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_towards_the_core_and_never_sideways(package: str) -> None:
    allowed = {package, "optcompiler"}
    for path in PACKAGES[package].rglob("*.py"):
        ours = {n for n in imported(path) if n.startswith("optcompiler")}
        assert ours <= allowed, f"{path.relative_to(ROOT)} imports {ours - allowed}"


def test_core_names_no_pass_and_no_backend() -> None:
    registry = optcompiler.Registry()
    names = {*registry.passes, *registry.backends} - {"cpu", "cuda", "onnxruntime"}
    names |= {f"optcompiler_{b}" for b in registry.backends} | {"optcompiler_passes"}
    hooks = {n for n in vars(hookspecs) if n.startswith("optcompiler_")}
    for path in PACKAGES["optcompiler"].rglob("*.py"):
        tree = ast.parse(path.read_text())
        prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) in prose or node.value in hooks:
                    continue
                assert node.value not in names, f"{path.name}:{node.lineno} names {node.value!r}"


def test_no_init_beside_the_packages() -> None:
    assert not (ROOT / "passes" / "__init__.py").exists()
    assert not (ROOT / "plugins" / "__init__.py").exists()


def test_public_names() -> None:
    assert sorted(optcompiler.__all__) == [
        "Backend", "Budget", "Candidate", "Capabilities", "Compiled", "Decline", "Declined",
        "GateError", "Kernel", "Ledger", "OptcompilerError", "Pass", "PassContext", "Program",
        "Registry", "Runner", "Stage", "Target", "__version__", "augment", "compile", "hookimpl",
        "load", "select", "synthetic",
    ]  # fmt: skip
    for name in optcompiler.__all__:
        assert getattr(optcompiler, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = optcompiler.nothing


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_importing_and_listing_loads_neither_torch_nor_onnxruntime() -> None:
    code = """
import sys, optcompiler
assert not {"torch", "onnx", "onnxruntime"} & set(sys.modules), "import optcompiler"
registry = optcompiler.Registry()
registry.describe()
print(sorted({"torch", "onnxruntime", "triton"} & set(sys.modules)))
"""
    assert run_python(code) == "[]"


def test_every_hook_is_documented() -> None:
    page = (ROOT / "docs" / "hooks.md").read_text()
    for name in vars(hookspecs):
        if name.startswith("optcompiler_"):
            assert f"`{name}`" in page, f"docs/hooks.md does not describe {name}"
            assert vars(hookspecs)[name].__doc__
