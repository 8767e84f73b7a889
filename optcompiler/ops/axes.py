"""Reading what channel rules need: extents, constant operands, and which axes line up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from optcompiler.ops.spec import Axis, Coupling

if TYPE_CHECKING:
    from optcompiler.program import Program

Dims = tuple[int | str | None, ...]
Extents = Mapping[Axis, int]
Repair = Callable[["Program", ir.Node, Extents], None]

WEIGHT_CHAIN = ("Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Transpose")

SYMBOL_BASE = 1 << 61


def dims(value: ir.Value | None) -> Dims | None:
    """Extents: ints, names of symbolic dimensions, None where unknown; None for no shape."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def is_weight(value: ir.Value | None) -> bool:
    """Whether the value is an initializer, or one seen through casts, QDQ and layout changes."""
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is None or node.op_type not in WEIGHT_CHAIN:
            return False
        value = node.inputs[0]
    return value is not None


def operand(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def integers(node: ir.Node, index: int, attribute: str) -> tuple[int, ...] | None:
    """Constant integers given as an input or, in older operator sets, as an attribute."""
    value = operand(node, index)
    if value is not None:
        if value.const_value is None:
            return None
        return tuple(int(i) for i in value.const_value.numpy().reshape(-1))
    held = node.attributes.get(attribute)
    return tuple(held.as_ints()) if held is not None else ()


def aligned(value: ir.Value, out: ir.Value) -> tuple[Coupling, ...] | None:
    """Couplings of axes that numpy broadcasting lines up, those stretched from extent 1 left out.

    An axis that faces an unknown extent is coupled to it all the same, which pins it.
    """
    mine, whole = dims(value), dims(out)
    if mine is None or whole is None or len(mine) > len(whole):
        return None
    lead = len(whole) - len(mine)
    return tuple(
        Coupling(Axis(value, axis), Axis(out, lead + axis))
        for axis, extent in enumerate(mine)
        if extent == whole[lead + axis]
        or isinstance(extent, int) != isinstance(whole[lead + axis], int)
    )


def along(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def opset_of(node: ir.Node) -> int:
    """The version of the default operator set that the node follows."""
    if node.version is not None:
        return node.version
    return node.graph.opset_imports.get("", 1) if node.graph is not None else 1


def put_integers(program: Program, node: ir.Node, index: int, values: np.ndarray) -> None:
    """Replace the constant integers at an input; other users of the initializer keep theirs."""
    value = node.inputs[index]
    assert value is not None
    if len(tuple(value.uses())) == 1:
        program.set_weight(value, values)
    else:
        node.replace_input_with(index, program.add_weight(f"{value.name}", values))


def row_major(old: Dims, new: Dims) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of a reshape that hold the same elements, innermost first; extents 1 left out.

    Works from the right, where equal products mean equal positions, and stops at the first
    extent that is unknown.
    """
    symbols = {s: i for i, s in enumerate(sorted({d for d in (*old, *new) if isinstance(d, str)}))}

    def size(extent: int | str) -> int:
        return SYMBOL_BASE + 2 * symbols[extent] + 1 if isinstance(extent, str) else extent

    runs: list[tuple[list[int], list[int]]] = []
    i, j = len(old), len(new)
    while i and j:
        ins: list[int] = []
        outs: list[int] = []
        left = right = 1
        while not ins or not outs or left != right:
            take_in = not ins or (bool(outs) and left < right)
            if (take_in and not i) or (not take_in and not j):
                return runs
            i, j = (i - 1, j) if take_in else (i, j - 1)
            extent = old[i] if take_in else new[j]
            if extent is None or extent == 0:
                return runs
            if take_in:
                ins.append(i)
                left *= size(extent)
            else:
                outs.append(j)
                right *= size(extent)
        runs.append(([k for k in ins if old[k] != 1], [k for k in outs if new[k] != 1]))
    return runs


def spread(source: Axis, target: Axis, groups: int, count: int) -> list[Coupling]:
    """The first `count` channels of `source`, each tied to its place in every group of `target`."""
    return [Coupling(source, target, target_offset=g * count, count=count) for g in range(groups)]
