"""Which pointwise nodes become part of a step: those after its root, and what only they read."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

import onnx_ir as ir

from optcompiler.lowering.ir import Buffer, View, product, row_major

if TYPE_CHECKING:
    from optcompiler.lowering.build import Builder

LOOKAHEAD = 32
"""Pointwise nodes that a region may try to take in."""

SAME_ORDER = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Operators whose result has their operand's elements in the same order, under another shape."""

_LAZY = frozenset({
    "QuantizeLinear", "DequantizeLinear", "Cast", "BitCast", "Identity", "Dropout",
})  # fmt: skip
"""Pointwise operators that are integers in memory, or inlined where they are read."""


def readers(value: ir.Value) -> set[ir.Node]:
    return {use.node for use in value.uses()}


def following(
    low: Builder, root: ir.Node, pointwise: Callable[[ir.Node], bool], reshapes: bool = False
) -> tuple[list[ir.Node], ir.Value]:
    """Pointwise nodes that follow `root`'s first output and end in one value, and that value.

    The largest set, within a look-ahead, of which nothing but the last value is read outside; so
    every other operand of the set is computable before it. With `reshapes`, operators that only
    give the elements another shape may stand inside; the last node is none.
    """
    start = root.outputs[0]
    inside: dict[ir.Value, set[ir.Node]] = {start: readers(start)}
    taken: list[ir.Node] = []
    best: tuple[list[ir.Node], ir.Value] = ([], start)
    queue: list[tuple[int, ir.Node]] = []
    seen: set[ir.Node] = set()

    def offer(value: ir.Value) -> None:
        for node in readers(value):
            if node in seen or node not in low.order or len(node.outputs) != 1:
                continue
            if node.op_type in SAME_ORDER and node.domain == "":
                fits = reshapes and node.inputs[0] is value
            else:
                fits = (
                    pointwise(node)
                    and low.shape(node.outputs[0]) == low.shape(value)
                    and _expressible(low, node, low.shape(start), inside)
                )
            if fits:
                seen.add(node)
                heapq.heappush(queue, (low.order[node], node))

    offer(start)
    while queue and len(taken) < LOOKAHEAD:
        _, node = heapq.heappop(queue)
        result = node.outputs[0]
        taken.append(node)
        inside[result] = readers(result)
        done = set(taken)
        loose = [v for v, users in inside.items() if v in low.outputs or not users <= done]
        # Integers go to memory: whoever reads them dequantises, or computes in integers.
        widens = node.op_type == "DequantizeLinear" and result not in low.outputs
        if loose in ([], [result]) and not widens and node.op_type not in SAME_ORDER:
            best = (list(taken), result)
        if result in low.outputs:
            break
        offer(result)
    return best


def absorbed(
    low: Builder,
    root: ir.Node,
    nodes: Iterable[ir.Node],
    pointwise: Callable[[ir.Node], bool],
) -> list[ir.Node]:
    """Pointwise nodes that nothing but the region reads.

    Those that an operand's own step will take in are left to it. Types are the root's and BOOL, so
    that no vector kernel becomes a scalar one.
    """
    start = root.outputs[0]
    members = {root, *nodes}
    kinds = {low.flat.dtype(start), "BOOL"}
    shapes = {low.shape(start), *(low.shape(n.outputs[0]) for n in members)}
    room = LOOKAHEAD - len(members) + 1
    found: set[ir.Node] = set()
    queue: list[tuple[int, ir.Node]] = []

    def offer(node: ir.Node) -> None:
        for value in node.inputs:
            made = value.producer() if value is not None else None
            if made is not None and made in low.order and made not in members:
                heapq.heappush(queue, (-low.order[made], made))

    for node in members - {root}:
        offer(node)
    while queue and len(found) < room:
        _, node = heapq.heappop(queue)
        values = [*node.inputs, *node.outputs]
        if (
            node not in found
            and len(node.outputs) == 1
            and node.op_type not in _LAZY
            and pointwise(node)
            and node.outputs[0] not in low.outputs
            and readers(node.outputs[0]) <= members | found
            and low.shape(node.outputs[0]) in shapes
            and all(v is None or low.flat.dtype(v) in kinds for v in values)
            and _expressible(low, node, low.shape(start), ())
        ):
            found.add(node)
            offer(node)

    def ready(node: ir.Node, value: ir.Value | None) -> bool:
        made = value.producer() if value is not None else None
        if made is None or value is None or value in low.exprs or low.flat.is_constant(value):
            return True
        return made in members | found or node not in following(low, made, pointwise)[0]

    while True:
        kept = {
            n
            for n in found
            if readers(n.outputs[0]) <= members | found and all(ready(n, v) for v in n.inputs)
        }
        if kept == found:
            return sorted(found, key=low.order.__getitem__)
        found = kept


def _expressible(
    low: Builder, node: ir.Node, space: tuple[int, ...], inside: Collection[ir.Value]
) -> bool:
    """Whether a node of another shape than the step's can read its operands at the step's index."""
    shape = low.shape(node.outputs[0])
    if shape == space:
        return True
    others = [low.shape(v) for v in node.inputs if v is not None and v not in inside]
    if node.op_type in {"QuantizeLinear", "DequantizeLinear", "BatchNormalization"}:
        return all(size == shape or product(size) == 1 for size in others)
    memory = Buffer(-1, "FLOAT", product(shape), "temp", "")
    return all(
        View(memory, size, row_major(size)).broadcast(shape).reshape(space) is not None
        for size in others
    )
