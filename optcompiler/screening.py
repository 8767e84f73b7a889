"""What an ONNX protobuf must keep to before anything works on it.

Native code (onnx's checker and shape inference, ONNX Runtime) trusts sizes and recurses; onnx_ir
believes what tensors say of themselves. So sizes, nesting and calls are bounded here, in time
linear in the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import onnx
import onnx_ir as ir
from onnx import TensorProto

from optcompiler.errors import InputError

DEEPEST_NESTING = 30
"""Graphs inside graphs, functions inlined: protobuf reads 100 messages deep, three a graph."""

DEEPEST_CALLS = 100
"""Functions that call functions."""

MOST_NODES = 1_000_000
"""Nodes with every function inlined: ten times the largest models, and 30 doublings fewer."""

MOST_BYTES = 1 << 48
"""Of one tensor: what a processor addresses."""

MOST_DIMENSIONS = 64
"""Of one tensor: numpy's limit."""

_DATA_FIELDS = (
    "raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data",
    "uint64_data",
)  # fmt: skip
_EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum"})
_MOST_DIGITS = 19

FunctionKey = tuple[str, str, str]


def screen(model: onnx.ModelProto, label: str) -> None:
    """Raise `InputError`, which begins with `label`, for a model that no tool should be given."""
    try:
        _check_opsets(model, label)
        _check_functions(model, label)
        for graph in _graphs(model):
            _check_names(graph, label)
            _check_tensors(graph, label)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{label}: a name that is not UTF-8 ({error.object[:20]!r}); export the model again."
        ) from error


# -- operator sets --------------------------------------------------------------------------


def _check_opsets(model: onnx.ModelProto, label: str) -> None:
    if not model.opset_import:
        raise InputError(f"{label}: imports no operator set; export the model again.")
    domains = Counter("" if o.domain == "ai.onnx" else o.domain for o in model.opset_import)
    twice = next((d for d, count in domains.items() if count > 1), None)
    if twice is not None:
        raise InputError(
            f"{label}: imports the operator set {twice or 'ai.onnx'!r} twice; export the model "
            f"again."
        )
    newest = onnx.defs.onnx_opset_version()
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and not 1 <= entry.version <= newest:
            raise InputError(
                f"{label}: operator set {entry.version} of ai.onnx, but onnx {onnx.__version__} "
                f"has 1 to {newest}; export the model for one of those."
            )


# -- functions ------------------------------------------------------------------------------


def _check_functions(model: onnx.ModelProto, label: str) -> None:
    """Bound the depth of calls, and the nesting and number of nodes once they are inlined."""
    functions: dict[FunctionKey, onnx.FunctionProto] = {}
    for function in model.functions:
        if functions.setdefault(_key(function.domain, function.name, function.overload), function)\
                is not function:  # fmt: skip
            raise InputError(
                f"{label}: two functions are called {_spelled(function)!r}; rename one."
            )
    nodes: dict[FunctionKey, int] = {}
    calls: dict[FunctionKey, int] = {}
    nesting: dict[FunctionKey, int] = {}
    for key in _callees_first(functions, label):
        nodes[key], calls[key], nesting[key] = _extent(
            functions[key].node, nodes, calls, nesting, label
        )
    _extent(model.graph.node, nodes, calls, nesting, label)


def _extent(
    body: Sequence[onnx.NodeProto],
    nodes: dict[FunctionKey, int],
    calls: dict[FunctionKey, int],
    nesting: dict[FunctionKey, int],
    label: str,
) -> tuple[int, int, int]:
    """Nodes, depth of calls and nesting of a body whose functions are inlined."""
    total, deepest_calls, deepest = 0, 0, 0
    for node, depth in _nodes(body):
        key = _key(node.domain, node.op_type, node.overload)
        total += nodes.get(key, 1)
        if key in calls:
            deepest_calls = max(deepest_calls, calls[key] + 1)
        deepest = max(deepest, depth + nesting.get(key, 0))
        if deepest > DEEPEST_NESTING:
            raise InputError(
                f"{label}: graphs nested more than {DEEPEST_NESTING} deep at {node.op_type} "
                f"{node.name!r}; make the branches functions of fewer levels."
            )
    if deepest_calls > DEEPEST_CALLS:
        raise _too_deep(label)
    if total > MOST_NODES:
        raise InputError(
            f"{label}: {total} nodes once its functions are inlined, more than {MOST_NODES}; "
            f"cut the model."
        )
    return total, deepest_calls, deepest


def _too_deep(label: str) -> InputError:
    return InputError(
        f"{label}: functions call each other more than {DEEPEST_CALLS} deep; "
        f"inline them before (onnx.inliner)."
    )


def _callees_first(
    functions: dict[FunctionKey, onnx.FunctionProto], label: str
) -> Iterator[FunctionKey]:
    """Keys of functions, each after those that it calls; refuses one that calls itself."""
    done: set[FunctionKey] = set()
    for first in functions:
        path: dict[FunctionKey, Iterator[FunctionKey]] = {}
        nxt: FunctionKey | None = first
        while nxt is not None or path:
            if nxt is not None and nxt not in done:
                if nxt in path:
                    raise InputError(
                        f"{label}: function {_spelled(functions[nxt])!r} calls itself; ONNX has "
                        f"no recursion, so use Loop or Scan."
                    )
                if len(path) > DEEPEST_CALLS:
                    raise _too_deep(label)
                path[nxt] = (
                    key
                    for node, _ in _nodes(functions[nxt].node)
                    if (key := _key(node.domain, node.op_type, node.overload)) in functions
                )
            current = next(reversed(path), None)
            if current is None:
                break
            nxt = next(path[current], None)
            if nxt is None:
                del path[current]
                done.add(current)
                yield current


def _key(domain: str, name: str, overload: str) -> FunctionKey:
    return ("" if domain == "ai.onnx" else domain, name, overload)


def _spelled(function: onnx.FunctionProto) -> str:
    return f"{function.domain}::{function.name}"


# -- walking --------------------------------------------------------------------------------


def _nodes(body: Sequence[onnx.NodeProto]) -> Iterator[tuple[onnx.NodeProto, int]]:
    """Nodes of a body and of the graphs inside it, with how deep they lie."""
    waiting: list[tuple[Sequence[onnx.NodeProto], int]] = [(body, 0)]
    while waiting:
        nodes, depth = waiting.pop()
        for node in nodes:
            yield node, depth
            waiting += [(g.node, depth + 1) for g in _subgraphs(node)]


def _graphs(model: onnx.ModelProto) -> Iterator[Any]:
    """The graph, every function, and every graph inside a node of those."""
    for outer in (model.graph, *model.functions):
        yield outer
        for node, _ in _nodes(outer.node):
            yield from _subgraphs(node)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


# -- names and shapes -----------------------------------------------------------------------


def _check_names(graph: Any, label: str) -> None:
    if not isinstance(graph, onnx.GraphProto):
        return
    for kind, values in (("input", graph.input), ("initializer", graph.initializer),
                         ("output", graph.output)):  # fmt: skip
        names = Counter(v.name for v in values)
        twice = next((n for n, count in names.items() if count > 1), None)
        if twice is not None and kind != "output":
            raise InputError(f"{label}: two {kind}s are called {twice!r}; rename one.")
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.HasField("tensor_type"):
            type_ = value.type.tensor_type
            dims = [d.dim_value for d in type_.shape.dim if d.HasField("dim_value")]
            _check_dims(dims, type_.elem_type, f"{label}: value {value.name!r}")
    for node in graph.node:
        if not node.op_type:
            raise InputError(
                f"{label}: node {node.name!r} names no operator; export the model again."
            )


def _check_dims(dims: Sequence[int], data_type: int, where: str) -> None:
    if len(dims) > MOST_DIMENSIONS:
        raise InputError(
            f"{where} has {len(dims)} dimensions, more than {MOST_DIMENSIONS}; reshape it."
        )
    if any(d < 0 for d in dims):
        raise InputError(f"{where} has the shape {list(dims)}; no dimension may be negative.")
    count = prod(d for d in dims if d)
    bits = 8
    if data_type in TensorProto.DataType.values() and data_type:
        bits = 8 if data_type == TensorProto.STRING else ir.DataType(data_type).bitwidth
    if count * bits > 8 * MOST_BYTES:
        raise InputError(
            f"{where} has the shape {list(dims)}, which no memory holds; fix the shape."
        )


# -- tensors --------------------------------------------------------------------------------


def _check_tensors(graph: Any, label: str) -> None:
    if isinstance(graph, onnx.GraphProto):
        for tensor in graph.initializer:
            _check_tensor(tensor, f"{label}: initializer {tensor.name!r}")
        for sparse in graph.sparse_initializer:
            raise InputError(
                f"{label}: initializer {sparse.values.name!r} is sparse, which nothing here "
                f"reads; store it as a dense one."
            )
    for node in graph.node:
        for attribute in node.attribute:
            where = f"{label}: attribute {attribute.name!r} of {node.op_type} {node.name!r}"
            if attribute.HasField("t"):
                _check_tensor(attribute.t, where)
            for tensor in attribute.tensors:
                _check_tensor(tensor, where)
            if attribute.HasField("sparse_tensor"):
                _check_sparse(attribute.sparse_tensor, where)


def _check_sparse(sparse: onnx.SparseTensorProto, where: str) -> None:
    _check_dims(sparse.dims, sparse.values.data_type, where)
    _check_tensor(sparse.values, where)
    _check_tensor(sparse.indices, where)


def _check_tensor(tensor: onnx.TensorProto, where: str) -> None:
    if tensor.data_type not in TensorProto.DataType.values() or not tensor.data_type:
        raise InputError(
            f"{where} is of the unknown type {tensor.data_type}; export the model again."
        )
    _check_dims(tensor.dims, tensor.data_type, where)
    present = [f for f in _DATA_FIELDS if _holds(tensor, f)]
    if tensor.data_location == TensorProto.EXTERNAL:
        present = ["external data", *present]
    if len(present) > 1:
        raise InputError(
            f"{where} has its values twice, in {present[0]} and in {present[1]}; "
            f"export the model again."
        )
    if tensor.data_location == TensorProto.EXTERNAL:
        _check_entries(tensor, where)
        return
    expected, found = _lengths(tensor, present[0] if present else "")
    if expected != found:
        unit = "bytes" if present == ["raw_data"] else "numbers"
        raise InputError(
            f"{where} cannot be read: type {TensorProto.DataType.Name(tensor.data_type)} and "
            f"shape {list(tensor.dims)} ask for {expected} {unit}, the file has {found}; "
            f"export the model again."
        )


def _holds(tensor: onnx.TensorProto, field: str) -> bool:
    return tensor.HasField("raw_data") if field == "raw_data" else len(getattr(tensor, field)) > 0


def _lengths(tensor: onnx.TensorProto, field: str) -> tuple[int, int]:
    """How many bytes or numbers the field must hold, and how many it does."""
    count = prod(tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        return count, len(tensor.string_data)
    type_ = ir.DataType(tensor.data_type)
    if field == "raw_data":
        return -(-count * type_.bitwidth // 8), len(tensor.raw_data)
    packed = {4: 2, 2: 4}.get(type_.bitwidth, 1)
    numbers = -(-count // packed) * (2 if type_.name.startswith("COMPLEX") else 1)
    right = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    return numbers, len(getattr(tensor, right))


def _check_entries(tensor: onnx.TensorProto, where: str) -> None:
    """The entries that say where external data is."""
    keys = Counter(e.key for e in tensor.external_data)
    odd = next((k for k, count in keys.items() if count > 1 or k not in _EXTERNAL_KEYS), None)
    if odd is not None:
        why = "twice" if odd in _EXTERNAL_KEYS else "which ONNX does not know"
        raise InputError(
            f"{where} has external data with the key {odd[:100]!r}, {why}; export the model again."
        )
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    if not location or "\0" in location or len(location) > 4096:
        raise InputError(
            f"{where} has external data at {location[:100]!r}, which is no path; "
            f"export the model again."
        )
    for key in ("offset", "length"):
        text = entries.get(key, "0")
        if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
            raise InputError(
                f"{where} has external data at {location!r} with the {key} {text[:50]!r}, which "
                f"is no number of bytes; export the model again."
            )
