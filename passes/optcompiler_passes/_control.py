"""Loops that are known to run no iteration. (A constant If is inlined by constant folding.)"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optcompiler.program import Program, constant, static_shape
from optcompiler_passes._regions import is_op


def without_iterations(program: Program, node: ir.Node) -> None:
    """A Loop of a constant trip count of 0, or a condition that is false: its carried values come
    out as they went in, and scan outputs are empty."""
    if not is_op(node, "Loop") or not _never_runs(node):
        return
    body, carried = node.attributes["body"].as_graph(), node.inputs[2:]
    scanned = body.outputs[1 + len(carried) :]
    looks = [(static_shape(v), v.dtype) for v in scanned]
    if any(v is None for v in carried) or any(s is None or t is None for s, t in looks):
        return
    results = [v for v in carried if v is not None]
    for output, (shape, dtype) in zip(node.outputs[len(carried) :], looks, strict=True):
        assert shape is not None
        assert dtype is not None
        empty = np.zeros((0, *shape), dtype.numpy())
        results.append(program.add_weight(f"{output.name}_empty", ir.Tensor(empty, dtype)))
    assert node.graph is not None
    passed: list[ir.Node] = []
    for index, (output, value) in enumerate(zip(node.outputs, results, strict=True)):
        made = ir.Value(name=output.name, type=output.type, shape=output.shape)
        name = f"{node.name}_{index}"
        passed.append(ir.Node("", "Identity", [value], outputs=[made], name=name))
    fresh = [n.outputs[0] for n in passed]
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], passed, list(node.outputs), fresh
    )


def _never_runs(node: ir.Node) -> bool:
    trips, keep = (constant(v) for v in (*node.inputs, None, None)[:2])
    none = trips is not None and trips.size == 1 and trips.item() <= 0
    return none or (keep is not None and keep.size == 1 and not keep.item())
