"""optcompiler: a trained model and an accuracy budget in, the fastest artifact for a target out.

Importing the package imports neither torch nor onnx: names load what they need when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optcompiler._version import __version__
from optcompiler.hookspecs import hookimpl

if TYPE_CHECKING:
    from optcompiler.augmenting import augment
    from optcompiler.backend import Backend, Capabilities, Kernel, Runner
    from optcompiler.budget import Budget
    from optcompiler.compiled import Compiled, load
    from optcompiler.compiler import compile
    from optcompiler.errors import Declined, GateError, OptcompilerError
    from optcompiler.ledger import Ledger
    from optcompiler.plugins import Registry
    from optcompiler.program import Program
    from optcompiler.rewriting import Candidate, Decline, Pass, PassContext, Stage
    from optcompiler.selecting import select
    from optcompiler.synthesizing import synthetic
    from optcompiler.target import Target

_HOMES = {
    "Backend": "backend",
    "Budget": "budget",
    "Candidate": "rewriting",
    "Capabilities": "backend",
    "Compiled": "compiled",
    "Decline": "rewriting",
    "Declined": "errors",
    "GateError": "errors",
    "Kernel": "backend",
    "Ledger": "ledger",
    "OptcompilerError": "errors",
    "Pass": "rewriting",
    "PassContext": "rewriting",
    "Program": "program",
    "Registry": "plugins",
    "Runner": "backend",
    "Stage": "rewriting",
    "Target": "target",
    "augment": "augmenting",
    "compile": "compiler",
    "load": "compiled",
    "select": "selecting",
    "synthetic": "synthesizing",
}

__all__ = [
    "Backend", "Budget", "Candidate", "Capabilities", "Compiled", "Decline", "Declined",
    "GateError", "Kernel", "Ledger", "OptcompilerError", "Pass", "PassContext", "Program",
    "Registry", "Runner", "Stage", "Target", "__version__", "augment", "compile", "hookimpl",
    "load", "select", "synthetic",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'optcompiler' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"optcompiler.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
