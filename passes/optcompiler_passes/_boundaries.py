"""Values that teacher and student have in common and that every path passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import networkx as nx
import onnx_ir as ir
import torch
from torch import fx

from optcompiler.damage import nmse
from optcompiler.executor import to_torch
from optcompiler.program import Program, constant, shape_of
from optcompiler.rewriting import PassContext
from optcompiler_passes._likeness import likeness
from optcompiler_passes._rescaling import is_rescaled
from optcompiler_passes._samples import Samples

Tensor = torch.Tensor


def boundaries(student: Program, teacher: Program) -> list[str]:
    """Values of both programs, of the same float shape, that every path from some input passes.

    Values whose channels `equalize` scaled are left out: the teacher's are others.
    """
    like = likeness(teacher)
    view = student.network()
    view.remove_nodes_from([n for n in view if isinstance(n, tuple) and n[0] == "weight"])
    sink = ("sink", "")
    for value in student.graph.outputs:
        view.add_edge(("output", value.name), sink)
    above: Mapping[object, object] = nx.immediate_dominators(view.reverse(copy=False), sink)
    passed: set[object] = set()
    for value in student.graph.inputs:
        step: object = ("input", value.name)
        while step in above and above[step] != step and step != sink:
            step = above[step]
            passed.add(step)
    found: list[str] = []
    for node in student.graph:
        if node.name not in passed or len(node.outputs) != 1:
            continue
        value = node.outputs[0]
        if value.is_graph_output() or value.dtype != ir.DataType.FLOAT or is_rescaled(value):
            continue
        if shape_of(value) and like(value):
            found.append(str(value.name))
    return found


def spread_out(names: Sequence[str], most: int = 16) -> list[str]:
    """At most so many of the names, evenly spread, the last among them."""
    stride = max(1, math.ceil(len(names) / most))
    return list(names[::-1][::stride][::-1])


def comparable(
    program: Program,
    context: PassContext,
    names: list[str],
    inputs: Sequence[Tensor],
    device: torch.device,
) -> list[str]:
    """Those values that mean the same in both programs: an exact pass may reuse a name."""
    if not names:
        return names
    count = len(program.outputs)
    with torch.no_grad():
        pair = [
            module_of(p, context, names, False, device)(*inputs)[count:]
            for p in (context.teacher, program)
        ]
    return [n for n, t, s in zip(names, *pair, strict=True) if nmse(t, s) < 1.0]


def batch_free(program: Program) -> Program:
    """A copy whose Reshape and Expand keep the first axis where they are given its size."""
    copy = program.clone()
    for node in tuple(copy.graph):
        if node.domain != "" or node.op_type not in ("Reshape", "Expand"):
            continue
        data, shape = node.inputs[0], constant(node.inputs[1])
        first = shape_of(data)[:1] if data is not None else ()
        if shape is None or not shape.size or first != (int(shape[0]),):
            continue
        if node.op_type == "Reshape" and node.attributes.get_int("allowzero", 0):
            continue
        freed = shape.copy()
        freed[0] = 0 if node.op_type == "Reshape" else 1
        node.replace_input_with(1, copy.add_weight(f"{node.name}_shape", freed))
    return copy


def batch_size(program: Program, teacher: fx.GraphModule, samples: Samples, wanted: int) -> int:
    """`wanted`, or the batch size that the program is fixed to when it takes no other."""
    fixed = [p.shape[0] for p in program.inputs if p.shape]
    sizes = {d for d in fixed if isinstance(d, int)}
    if not sizes or sizes == {wanted}:
        return wanted
    size = max(sizes)
    if samples.joined is None:
        return wanted
    rows = (torch.arange(wanted) % samples.joined[0].shape[0]).to(samples.joined[0].device)
    inputs = [t[rows] for t in samples.joined]
    with torch.no_grad():
        try:
            # A GraphModule that is called prints what it raises.
            whole = teacher.forward(*inputs)
            parts = teacher.forward(*[t[:size] for t in inputs])
        except (RuntimeError, ValueError):
            return size
    for w, p in zip(whole, parts, strict=True):
        if w.ndim == 0 or w.shape[0] != wanted or w.shape[1:] != p.shape[1:]:
            return size
        if not torch.allclose(w[:size], p, rtol=1e-3, atol=1e-4, equal_nan=True):
            return size
    return wanted


def module_of(
    program: Program,
    context: PassContext,
    names: Sequence[str],
    trainable: bool,
    device: torch.device,
) -> fx.GraphModule:
    module = to_torch(program, context.ops, extra_outputs=names, trainable=trainable)
    return module.to(device)
