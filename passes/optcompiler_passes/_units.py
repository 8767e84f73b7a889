"""Programs in units: consecutive parts of teacher and student that end in the same values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from optcompiler.program import Program, constant, consumed
from optcompiler.shrinking import extract
from optcompiler_passes._boundaries import boundaries


@dataclass(frozen=True)
class Unit:
    """A part of both programs. Each takes values of earlier units and inputs by name, and gives
    what later units read, `ends` among it: the values in which the two are compared."""

    ends: tuple[str, ...]
    student: Program
    teacher: Program


def units_of(student: Program, teacher: Program, most_weights: int) -> list[Unit]:
    """Units in order, each with about `most_weights` quantised weights and at least one.

    They end at boundaries; the last one at the outputs. A part between two boundaries is never
    divided, so a residual block stays whole.
    """
    outputs = tuple(p.name for p in student.outputs)
    ends = [(name,) for name in boundaries(student, teacher) if name not in outputs]
    parts = _parts(student, [*ends, outputs])
    ends, parts = _joined(student, [*ends, outputs], parts, most_weights)
    others = _parts(teacher, ends)
    return [
        Unit(end, extract(student, mine), extract(teacher, its))
        for end, mine, its in zip(ends, parts, others, strict=True)
    ]


def _parts(program: Program, ends: Sequence[tuple[str, ...]]) -> list[list[str]]:
    """Names of the nodes that each end needs and none before it did; the rest goes to the last."""
    makers = {v.name: n for n in program.graph for v in n.outputs}
    taken: set[ir.Node] = set()
    found: list[list[str]] = []
    for end in ends:
        mine: set[ir.Node] = set()
        waiting = [makers[name] for name in end if name in makers]
        while waiting:
            node = waiting.pop()
            if node in taken or node in mine:
                continue
            mine.add(node)
            makers_of = (v.producer() for v in consumed(node))
            waiting += [n for n in makers_of if n is not None]
        taken |= mine
        found.append([str(n.name) for n in program.graph if n in mine])
    return found


def _joined(
    program: Program, ends: list[tuple[str, ...]], parts: list[list[str]], most: int
) -> tuple[list[tuple[str, ...]], list[list[str]]]:
    """Neighbours put together as long as they hold no more than `most` quantised weights."""
    quantised = {str(n.name) for n in program.graph if is_weight_quantizer(n)}
    kept_ends: list[tuple[str, ...]] = []
    kept: list[list[str]] = []
    counts: list[int] = []
    for end, part in zip(ends, parts, strict=True):
        count = sum(name in quantised for name in part)
        if kept and (counts[-1] + count <= most or 0 in (counts[-1], count)):
            kept[-1], counts[-1], kept_ends[-1] = kept[-1] + part, counts[-1] + count, end
        else:
            kept.append(part)
            counts.append(count)
            kept_ends.append(end)
    return kept_ends, kept


def is_weight_quantizer(node: ir.Node) -> bool:
    """Whether a node quantises an initializer."""
    return node.op_type == "QuantizeLinear" and constant(node.inputs[0]) is not None
