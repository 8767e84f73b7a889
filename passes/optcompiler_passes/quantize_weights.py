"""Weights of 4 or 8 bits beside activations in float, multiplied as they are stored."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optcompiler import evidence
from optcompiler.errors import InputError
from optcompiler.program import SOURCE_KEY, Program, constant
from optcompiler.quantization import QuantizationScheme, weight_scales
from optcompiler.rewriting import Candidate, Decline, Declined, Pass, PassContext, Stage
from optcompiler_passes._blocks import (
    BLOCKED_SINCE,
    LEAST_WEIGHTS,
    blocks_of,
    insert_blocks,
    insert_channels,
)
from optcompiler_passes._qdq import Editor, dequantizer, laid_out
from optcompiler_passes.cast_bf16 import LIKE_NOW, raise_opset

BITS = {"int4": 4, "w8": 8}
"""Of a weight, by precision."""


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Quantise constant weights to 4 bits in blocks along the axis summed over, or 8 per channel.

    Before:
        y = MatMul (x, w)

    After, with 4 bits (the weight stays float, so that it can still be tuned; `s` is
    [K / block_size, N]):
        w_quantized = QuantizeLinear <axis=0, block_size=32> (w, s, 0)
        w_dequantized = DequantizeLinear <axis=0, block_size=32> (w_quantized, s, 0)
        y = MatMul (x, w_dequantized)

    Rules:
    1. A site is a node whose type is among the target's `stored_weight_ops`, with a constant
       [K, N] weight (a Gemm's may be transposed) of `least_weights` elements or more: smaller ones
       stay in caches, where there is little to gain.
    2. With precision "int4" levels are symmetric (INT4). A block's scale is, of the largest
       magnitude over 7 times factors in [0.5, 1], the one whose error is least, then that of least
       squares for the levels found, if it is better. Scales are rounded to half floats, which take
       two bytes.
    3. With `symmetric=False` blocks have zero points (UINT4): of those that put 16 levels between
       the ends of the block times factors in [0.6, 1], and what rule 2 finds, the one whose error
       is least; the scale is fitted to the levels as there.
    4. With precision "w8" weights are INT8, symmetric with a scale for each column.
    5. Activations stay in float, and so does what else reads the weight.
    6. For 4 bits the program is raised to operator set 21 from 20 on, which changes the meaning of
       no operator.

    `block_size` elements of K share a scale; `skip` holds globs of node names or source paths that
    stay float.
    """

    name: ClassVar[str] = "quantize-weights"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    after: ClassVar[tuple[str, ...]] = ("cast-bf16", "insert-qdq")
    summary: ClassVar[str] = "weights of 4 or 8 bits beside activations in float"
    time_limit_s: ClassVar[float] = math.inf

    block_size: int = 32
    symmetric: bool = True
    least_weights: int = LEAST_WEIGHTS
    skip: tuple[str, ...] = ()

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate | Decline]:
        if self.block_size < 16 or self.block_size & (self.block_size - 1):
            raise InputError(
                f"quantize-weights: block_size={self.block_size}; take a power of two from 16 on."
            )
        refusal = _refusal(program, context)
        if refusal is not None:
            yield Decline("program", refusal)
            return
        offered = [p for p in BITS if p in context.precisions]
        if program.opset < LIKE_NOW:
            offered = [p for p in offered if BITS[p] == 8]
        for node in program.graph:
            if node.domain != "" or node.op_type not in context.capabilities.stored_weight_ops:
                continue
            name = str(node.name)
            reason = self._skipped(node) or _reason(node)
            weight = None if reason else laid_out(node.inputs[1])
            if weight is not None and weight.size < self.least_weights:
                reason = f"its weight has {weight.size} elements, fewer than {self.least_weights}"
            if reason:
                yield Decline(name, reason, (name,))
                continue
            for precision in offered:
                rewrite = Quantize(name, BITS[precision], self.block_size, self.symmetric)
                yield Candidate(
                    name, precision, rewrite, exact=False, nodes=(name,),
                    details={"scheme": str(rewrite.scheme(0)), **_evidence(rewrite, node, weight)},
                )  # fmt: skip

    def _skipped(self, node: ir.Node) -> str:
        names = (str(node.name), node.metadata_props.get(SOURCE_KEY, ""))
        for pattern in self.skip:
            if any(name and fnmatch.fnmatchcase(name, pattern) for name in names):
                return f"skipped by {pattern!r}"
        return ""


def _refusal(program: Program, context: PassContext) -> str | None:
    if not context.capabilities.stored_weight_ops:
        return f"target {context.target.backend} multiplies no weights as they are stored"
    wanted = context.precisions & set(BITS)
    if not wanted:
        has = ", ".join(sorted(context.precisions))
        return f"precision int4 is not among those allowed, nor is w8: {has}"
    if not context.calibration:
        return "no calibration data to measure damage on; pass calibration=batches"
    if program.opset < LIKE_NOW and "w8" not in wanted:
        return f"blocks need operator set {BLOCKED_SINCE}, and the program is of {program.opset}"
    return None


def _reason(node: ir.Node) -> str:
    """Why the node is no site; "" for one."""
    data, weight = node.inputs[:2]
    if data is None or weight is None:
        return "it lacks an operand"
    for value in (data, weight, node.outputs[0]):
        if value.dtype != ir.DataType.FLOAT:
            kind = value.dtype.name.lower() if value.dtype else "unknown"
            return f"{value.name!r} is {kind}, not float"
    if any(dequantizer(v) is not None for v in node.inputs[:2]):
        return "already quantised"
    if constant(data) is not None:
        return f"its operand {data.name!r} is a constant where data is expected"
    matrix = laid_out(weight)
    if matrix is None or matrix.ndim != 2:
        return f"its weight {weight.name!r} is not a constant matrix"
    return ""


def _summed(node: ir.Node) -> int:
    """The axis of the weight that is summed over."""
    return 1 if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) else 0


def _evidence(rewrite: Quantize, node: ir.Node, array: np.ndarray | None) -> dict[str, Any]:
    value, scheme = node.inputs[1], rewrite.scheme(_summed(node))
    if value is None or array is None or not np.isfinite(array).all():
        return {}
    zeros = None
    if scheme.block:
        scales, zeros = blocks_of(value, array, scheme)
    else:
        scales = weight_scales(array, scheme.dtype, scheme.axis)
    return {evidence.WEIGHT: evidence.weight(array, scales, scheme, zeros)}


@dataclass(frozen=True)
class Quantize:
    """The rewrite of one site."""

    site: str
    bits: int
    block_size: int
    symmetric: bool

    def scheme(self, summed: int) -> QuantizationScheme:
        """How the levels of a matrix are spread that is summed over along that axis."""
        if self.bits == 8:
            return QuantizationScheme("INT8", 1 - summed)
        dtype = "INT4" if self.symmetric else "UINT4"
        return QuantizationScheme(dtype, summed, self.block_size, self.symmetric)

    def __call__(self, program: Program) -> None:
        editor = Editor(program)
        node = editor.nodes.get(self.site)
        reason = "it is gone" if node is None else _reason(node)
        if node is None or reason:
            raise Declined(f"{self.site!r}: {reason}.")
        value = node.inputs[1]
        assert value is not None
        scheme = self.scheme(_summed(node))
        if scheme.block:
            raise_opset(program, BLOCKED_SINCE)
            insert_blocks(editor, node, value, scheme)
        else:
            insert_channels(editor, node, value, scheme)
