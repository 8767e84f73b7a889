"""What a program may ask for before anything heavy is loaded, inferred or run for it."""

from __future__ import annotations

import os
from collections.abc import Collection
from math import prod

import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from optcompiler.errors import InputError, UnsupportedOperatorError
from optcompiler.program import FUSED_DOMAIN, Program, constant, port, static_shape

MOST_SHAPE_ELEMENTS = 1 << 16
"""Of a tensor that shape inference follows: it keeps a record of each element."""

STANDARD_DOMAINS = frozenset(
    {"", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training", "ai.onnx.training",
     FUSED_DOMAIN}
)  # fmt: skip
MOST_TRIPS = 1 << 40
"""Of a Loop whose condition never changes: weeks of the shortest body."""

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, None)
_RANK_BOUND = 64


def refuse_what_cannot_run(program: Program, domains: Collection[str]) -> None:
    """Refuse a program that no plan could make runnable here.

    `domains` are those that plugins declare operators of. Raises `UnsupportedOperatorError` for an
    operator of any other that is not ONNX's own, `InputError` for a value larger than the memory
    and for a Loop that never ends.
    """
    memory = memory_bytes()
    for value in program.graph.inputs:
        _refuse_large(value, "input", memory)
    for node in program.all_nodes():
        if node.domain not in STANDARD_DOMAINS and node.domain not in domains:
            raise UnsupportedOperatorError(
                f"operator {node.domain}::{node.op_type} of node {node.name!r} is not standard "
                f"ONNX and no plugin declares it; replace it, or install the plugin that does."
            )
        if node.op_type == "Loop" and not node.domain and _is_endless(node):
            raise InputError(
                f"Loop {node.name!r} never ends: its condition stays true for more than "
                f"{MOST_TRIPS} iterations; give it a trip count."
            )
        for value in node.outputs:
            _refuse_large(value, f"{node.op_type} {node.name!r} gives", memory)


def _refuse_large(value: ir.Value, what: str, memory: int) -> None:
    shape = static_shape(value)
    if shape is None or value.dtype is None or value.dtype == ir.DataType.STRING:
        return
    size = int(prod(shape) * value.dtype.itemsize)
    if size > memory:
        raise InputError(
            f"{what} {port(value)}: {size} bytes, more than this machine's memory of {memory}; "
            f"use smaller sizes."
        )


def _is_endless(loop: ir.Node) -> bool:
    trips, condition = loop.inputs[0], loop.inputs[1] if len(loop.inputs) > 1 else None
    if trips is not None:
        bound = constant(trips)
        if bound is None or bound.size != 1 or int(bound.reshape(-1)[0]) <= MOST_TRIPS:
            return False
    if condition is not None and not _is_true(condition):
        return False
    body = loop.attributes["body"].as_graph()
    kept, start = body.outputs[0], body.inputs[1]
    while kept is not start and (producer := kept.producer()) is not None:
        value = producer.inputs[0] if producer.op_type == "Identity" else None
        if value is None:
            break
        kept = value
    return kept is start or _is_true(kept)


def _is_true(value: ir.Value) -> bool:
    known = constant(value)
    return known is not None and known.size == 1 and bool(known.reshape(-1)[0])


def memory_bytes() -> int:
    """Physical memory; 2**63 - 1 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return (1 << 63) - 1


def refuse_growing_shapes(model: ir.Model, label: str) -> None:
    """Refuse integer vectors that Concat after Concat makes huge: inference would spell them out.

    Raises `InputError` naming the node.
    """
    if _large_concat(model.graph, typed=False) is None:
        return
    typed = model.clone()
    ir_passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(typed)
    node = _large_concat(typed.graph, typed=True)
    if node is not None:
        raise InputError(
            f"{label}: Concat {node.name!r} makes a shape of more than {MOST_SHAPE_ELEMENTS} "
            f"elements; cut the model."
        )


def _large_concat(graph: ir.Graph, typed: bool) -> ir.Node | None:
    """A Concat that may join more integers than inference should follow."""
    most: dict[ir.Value | None, int] = {None: 0}
    for node in graph:
        reads = [most[v] if v in most else _elements(v) for v in node.inputs]
        joined = sum(reads) if node.op_type == "Concat" else max(reads, default=0)
        if node.op_type == "Shape":
            joined = _RANK_BOUND
        for value in node.outputs:
            most[value] = joined if not typed or value.dtype in _INTEGERS else 0
        if node.op_type == "Concat" and most[node.outputs[0]] > MOST_SHAPE_ELEMENTS:
            return node
    return None


def _elements(value: ir.Value | None) -> int:
    tensor = value.const_value if value is not None else None
    if tensor is None or tensor.dtype not in _INTEGERS or len(tensor.shape) > 1:
        return 0
    return tensor.size
