"""`torch.onnx.export` with its tables kept: it builds them for every model, most of its time."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch._export import utils as export_utils
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _registration

from optcompiler.frontend_operators import complex_translations, translations

_ALIASES = frozenset({
    "divide", "true_divide", "multiply", "subtract", "greater", "greater_equal", "less",
    "less_equal", "not_equal",
})  # fmt: skip

# decomposing changes tables of torch for its duration, and so does this module
_lock = threading.RLock()


def to_onnx(exported: ExportedProgram) -> Any:
    """Convert `exported` in memory (a torch.onnx.ONNXProgram), with `translations` preferred."""
    with _lock, _kept_tables():
        return torch.onnx.export(exported, dynamo=True, optimize=False, verbose=False)


@contextlib.contextmanager
def _kept_tables() -> Generator[None]:
    registry_type: Any = _registration.ONNXRegistry
    found = vars(registry_type)["from_torchlib"]
    build: Callable[..., Any] = registry_type.from_torchlib
    utils: Any = export_utils
    query: Callable[[], None] = utils._materialize_cpp_cia_ops
    # a copy for each export, since what the exporter does with it is its own affair
    kept = staticmethod(lambda **options: _copied(_registry(build, **options)))
    registry_type.from_torchlib = kept
    # asks the dispatcher once per namespace for all operators, which do not change meanwhile
    utils._materialize_cpp_cia_ops = functools.cache(query)
    try:
        yield
    finally:
        registry_type.from_torchlib = found
        utils._materialize_cpp_cia_ops = query


@functools.cache
def _registry(build: Callable[..., Any], **options: Any) -> Any:
    registry = build(**options)
    for target, function in translations().items():
        registry.register_op(target, function)
    for target, function in complex_translations().items():
        registry.register_op(target, function, is_complex=True)
    for name in [n for n in registry.functions if _is_alias(n)]:
        del registry.functions[name]
    return registry


def _is_alias(name: Any) -> bool:
    """Whether torch decomposes the operator to its proper name, the one whose types it promotes."""
    packet = name.partition("::")[2].partition(".")[0] if isinstance(name, str) else ""
    return packet in _ALIASES


def _copied(registry: Any) -> Any:
    copied = copy.copy(registry)
    copied.functions = {name: list(found) for name, found in registry.functions.items()}
    return copied
