"""Constants that a contraction reads as they are stored: integers with scales, and half floats."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

HALVES = frozenset({"FLOAT16", "BFLOAT16"})
"""Floats of two bytes, which stand for themselves."""

_MOVED = frozenset({"Transpose", "Identity"})
"""What may stand between a constant and the contraction that reads it."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A constant `(levels - zero_point) * scale`; half floats have neither.

    `scale` (float32) and `zero_point` (int32) have as many axes as `levels`, of length 1 where they
    do not vary; along `axis`, if `block` is not 0, one stands for `block` levels.
    """

    levels: np.ndarray
    scale: np.ndarray | None = None
    zero_point: np.ndarray | None = None
    axis: int = 0
    block: int = 0

    def permuted(self, order: tuple[int, ...]) -> Stored:
        def turn(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array.transpose(order)

        return replace(
            self, levels=self.levels.transpose(order), scale=turn(self.scale),
            zero_point=turn(self.zero_point), axis=order.index(self.axis),
        )  # fmt: skip

    def floats(self) -> np.ndarray:
        """The constant in float32."""
        values = self.levels.astype(np.float32)
        if self.zero_point is not None:
            values -= self._spread(self.zero_point)
        return values if self.scale is None else values * self._spread(self.scale)

    def _spread(self, parameter: np.ndarray) -> np.ndarray:
        if not self.block:
            return parameter
        whole = np.repeat(parameter, self.block, self.axis)
        return np.take(whole, np.arange(self.levels.shape[self.axis]), self.axis)


def dequantised(values: list[np.ndarray | None], axis: int, block: int) -> Stored:
    """What a DequantizeLinear of constants (levels, scale and maybe a zero point) stands for."""
    levels, scale, *rest = values
    assert levels is not None
    assert scale is not None
    axis %= max(levels.ndim, 1)

    def aligned(parameter: np.ndarray, dtype: type) -> np.ndarray:
        array = parameter.astype(dtype)
        if block:
            return array
        wide = [-1 if i == axis and array.size > 1 else 1 for i in range(levels.ndim)]
        return array.reshape(wide)

    zero = rest[0] if rest else None
    return Stored(
        levels, aligned(scale, np.float32), None if zero is None else aligned(zero, np.int32),
        axis, block,
    )  # fmt: skip


def stored_by(
    node: ir.Node,
    values: list[np.ndarray | None],
    known: Mapping[ir.Value, Stored],
    attributes: Mapping[str, object],
    types: Collection[str],
) -> Stored | None:
    """What a node of constants computes, if contractions alone read it, from one of `types`.

    That is a DequantizeLinear in blocks or of integers of less than a byte, a Cast of half floats,
    and a transposition of their result. Integers of bytes in channels stay a DequantizeLinear.
    """
    source = node.inputs[0] if node.inputs else None
    if node.domain != "" or source is None or not read_by_contractions(node.outputs[0]):
        return None
    if source in known and node.op_type in _MOVED:
        found = known[source]
        rank = found.levels.ndim
        perm = attributes.get("perm") or range(rank - 1, -1, -1)
        assert isinstance(perm, (list, tuple, range))
        return found if node.op_type == "Identity" else found.permuted(tuple(perm))
    levels = values[0] if values else None
    if levels is None or source.dtype is None or source.dtype.name not in types:
        return None
    if node.op_type == "DequantizeLinear":
        block, axis = attributes.get("block_size") or 0, attributes.get("axis", 1)
        assert isinstance(block, int)
        assert isinstance(axis, int)
        return dequantised(values, axis, block)
    if node.op_type == "Cast" and source.dtype.name in HALVES:
        return Stored(levels) if node.outputs[0].dtype == ir.DataType.FLOAT else None
    return None


def read_by_contractions(value: ir.Value) -> bool:
    """Whether contractions alone read `value`, as their second operand, or what moves it."""
    uses = value.uses()
    return bool(uses) and not value.is_graph_output() and all(
        use.node.graph is value.graph
        and use.node.domain == ""
        and (
            (use.node.op_type in {"MatMul", "Gemm"} and use.idx == 1)
            or (use.node.op_type == "Conv" and use.idx == 1)
            or (use.node.op_type in _MOVED and read_by_contractions(use.node.outputs[0]))
        )
        for use in uses
    )  # fmt: skip
