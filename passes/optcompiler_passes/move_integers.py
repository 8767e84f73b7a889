"""move-integers: reshape, transpose and pool quantised tensors as integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optcompiler.errors import Declined
from optcompiler.program import Program, constant
from optcompiler.rewriting import Candidate, Decline, Pass, PassContext, Stage
from optcompiler_passes._folding import fold_readers
from optcompiler_passes._regions import DEQUANTIZE, QUANTIZE, is_op

MOVES = (
    "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice",
    "SpaceToDepth", "Squeeze", "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip
"""Operators that only pick elements of their first operand; MaxPool picks by an order that
dequantisation keeps."""


@dataclass(frozen=True)
class MoveIntegers(Pass):
    """Take away the pairs around operators that only pick elements.

        r = DequantizeLinear(q, s, z)
        t = Transpose(r)                       p = Transpose(q)
        p = QuantizeLinear(t, s, z)     →

    1. The operator is one of `MOVES` or a Concat; every data operand comes from DequantizeLinear
       and every reader is QuantizeLinear, all with the same constant scale and zero point for the
       whole tensor and of one type. Quantising what was just dequantised gives the same integers.
       Where all operands are constants, so is the result.
    2. The result takes the name of the integers that QuantizeLinear made.

    Declines a site whose scales differ, with both.
    """

    name: ClassVar[str] = "move-integers"
    stage: ClassVar[Stage] = Stage.FUSE
    summary: ClassVar[str] = (
        "Reshape, transpose, pool and concatenate quantised tensors as integers."
    )
    after: ClassVar[tuple[str, ...]] = ("pack-weights",)

    def propose(self, program: Program, context: PassContext) -> Iterator[Candidate | Decline]:
        sites: list[str] = []
        for node in program.graph:
            found = _match(node)
            if isinstance(found, str):
                yield Decline(str(node.name), found, (str(node.name),))
            elif found is not None:
                sites.append(str(node.name))
        if sites:
            yield Candidate(
                site="program",
                choice="move integers",
                rewrite=move,
                exact=True,
                nodes=tuple(sites),
                note=f"{len(sites)} nodes work on integers",
            )


def move(program: Program) -> None:
    """Rewrite every site; raises `Declined` when there is none."""
    changed = False
    for node in list(program.graph):
        quantizers = _match(node)
        if isinstance(quantizers, list):
            _rewrite(program, node, quantizers)
            changed = True
    if not changed:
        raise Declined("no operator stands between equal pairs.")
    fold_readers(program)
    program.sweep()


def _match(node: ir.Node) -> list[ir.Node] | str | None:
    """The QuantizeLinear nodes after a site; why a near miss is none; None for other nodes."""
    if is_op(node, "Concat"):
        data = list(node.inputs)
    elif is_op(node, *MOVES):
        data = list(node.inputs[:1])
    else:
        return None
    result = node.outputs[0]
    readers = list(dict.fromkeys(n for n, _ in result.uses()))
    if result.is_graph_output() or not readers or not all(is_op(n, QUANTIZE) for n in readers):
        return None
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return None
    producers = [v.producer() if v is not None else None for v in data]
    pairs = [p for p in producers if p is not None and is_op(p, DEQUANTIZE)]
    if len(pairs) != len(data):
        return None
    grids = [_grid(n, n.inputs[0]) for n in pairs] + [_grid(n, n.outputs[0]) for n in readers]
    if None in grids:
        return "a scale is not constant, or not one number for the whole tensor."
    distinct = list(dict.fromkeys(grids))
    if len(distinct) > 1:
        texts = [f"{g[0].lower()} scale {g[1]:g} zero point {g[2]}" for g in distinct if g]
        return f"its pairs differ: {'; '.join(texts)}."
    return readers


def _grid(node: ir.Node, integers: ir.Value | None) -> tuple[str, float, int] | None:
    """Type, scale and zero point of a Q or DQ node whose parameters are scalar constants."""
    scale = constant(node.inputs[1])
    zero_value = node.inputs[2] if len(node.inputs) > 2 else None
    zero = constant(zero_value) if zero_value is not None else np.zeros(())
    if scale is None or zero is None or scale.size != 1 or zero.size != 1:
        return None
    if integers is None or integers.dtype is None:
        return None
    return integers.dtype.name, float(scale.reshape(())), int(zero.reshape(()))


def _rewrite(program: Program, node: ir.Node, quantizers: list[ir.Node]) -> None:
    for index, value in enumerate(node.inputs if is_op(node, "Concat") else node.inputs[:1]):
        producer = value.producer() if value is not None else None
        assert producer is not None
        node.replace_input_with(index, producer.inputs[0])
    kept = quantizers[0].outputs[0]
    result = node.outputs[0]
    name, type_ = kept.name, kept.type
    for quantize in quantizers:
        ir.convenience.replace_all_uses_with(
            quantize.outputs[0], result, replace_graph_outputs=True
        )
        program.graph.remove(quantize, safe=True)
    result.name, result.type = name, type_
