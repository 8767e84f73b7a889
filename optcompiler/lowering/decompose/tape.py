"""A way to write ONNX nodes as expressions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from optcompiler.lowering.expand import Expansion

VERSION = 20
"""The operator set that decompositions are written in."""

Operand = ir.Value | np.ndarray | None


class Tape:
    """Collects nodes; arrays among the operands become constants."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def __call__(self, op_type: str, *operands: Operand, **attributes: Any) -> ir.Value:
        return self.several(op_type, 1, *operands, **attributes)[0]

    def several(
        self, op_type: str, outputs: int, *operands: Operand, **attributes: Any
    ) -> Sequence[ir.Value]:
        """A node of several outputs."""
        inputs = [self.constant(o) if isinstance(o, np.ndarray) else o for o in operands]
        given = {k: v for k, v in attributes.items() if v is not None}
        node = ir.node(
            op_type, inputs, given, num_outputs=outputs, version=VERSION
        )  # fmt: skip
        self.nodes.append(node)
        return node.outputs

    def constant(self, array: np.ndarray) -> ir.Value:
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(array))])
        self.nodes.append(node)
        return node.outputs[0]

    def reshape(self, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        return self("Reshape", x, ints(*shape), allowzero=1)

    def part(self, x: ir.Value, axis: int, start: int, stop: int) -> ir.Value:
        """Elements from `start` to `stop` along an axis."""
        return self("Slice", x, ints(start), ints(stop), ints(axis))

    def done(self, *results: ir.Value) -> Expansion:
        return self.nodes, results


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def typed(value: Any, like: ir.Value) -> np.ndarray:
    """A constant of the element type of `like`."""
    assert like.dtype is not None
    return np.asarray(value).astype(like.dtype.numpy())
