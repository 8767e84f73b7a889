"""Weights of 4 bits beside activations in float, where the target multiplies them as stored."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from optcompiler.errors import InputError
from optcompiler.program import SOURCE_KEY, Program, constant
from optcompiler.rewriting import Candidate, Decline, Declined, Pass, PassContext, Stage
from optcompiler_passes._blocks import BLOCKED_SINCE, LEAST_WEIGHTS, insert_blocks
from optcompiler_passes._qdq import Editor, dequantizer, laid_out
from optcompiler_passes.cast_bf16 import LIKE_NOW, raise_opset


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Quantise constant weights to 4 bits, in blocks along the axis that is summed over.

    Before:
        y = MatMul (x, w)

    After (the weight stays float, so that it can still be tuned; `s` is [K / block_size, N]):
        w_quantized = QuantizeLinear <axis=0, block_size=32> (w, s, 0)
        w_dequantized = DequantizeLinear <axis=0, block_size=32> (w_quantized, s, 0)
        y = MatMul (x, w_dequantized)

    Rules:
    1. A site is a node whose type is among the target's `stored_weight_ops`, with a constant
       [K, N] weight (a Gemm's may be transposed) of `least_weights` elements or more: smaller ones
       stay in caches, where there is little to gain.
    2. Levels are symmetric. A block's scale is, of the largest magnitude over 7 times factors in
       [0.5, 1], the one whose error is least, then that of least squares for the levels found, if
       it is better. Scales are rounded to half floats, which take two bytes.
    3. Activations stay in float, and so does what else reads the weight.
    4. The program is raised to operator set 21 from 20 on, which changes the meaning of no
       operator.

    `block_size` elements of K share a scale; `skip` holds globs of node names or source paths that
    stay float.
    """

    name: ClassVar[str] = "quantize-weights"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    after: ClassVar[tuple[str, ...]] = ("cast-bf16", "insert-qdq")
    summary: ClassVar[str] = "4-bit weights where the target multiplies them with floats"
    time_limit_s: ClassVar[float] = math.inf

    block_size: int = 32
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
            else:
                rewrite = Block(name, self.block_size)
                yield Candidate(name, "int4", rewrite, exact=False, nodes=(name,))

    def _skipped(self, node: ir.Node) -> str:
        names = (str(node.name), node.metadata_props.get(SOURCE_KEY, ""))
        for pattern in self.skip:
            if any(name and fnmatch.fnmatchcase(name, pattern) for name in names):
                return f"skipped by {pattern!r}"
        return ""


def _refusal(program: Program, context: PassContext) -> str | None:
    if not context.capabilities.stored_weight_ops:
        return f"target {context.target.backend} multiplies no weights as they are stored"
    if "int4" not in context.precisions:
        return f"precision int4 is not among those allowed: {', '.join(sorted(context.precisions))}"
    if not context.calibration:
        return "no calibration data to measure damage on; pass calibration=batches"
    if program.opset < LIKE_NOW:
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


@dataclass(frozen=True)
class Block:
    """The rewrite of one site."""

    site: str
    block_size: int

    def __call__(self, program: Program) -> None:
        editor = Editor(program)
        node = editor.nodes.get(self.site)
        reason = "it is gone" if node is None else _reason(node)
        if node is None or reason:
            raise Declined(f"{self.site!r}: {reason}.")
        raise_opset(program, BLOCKED_SINCE)
        value = node.inputs[1]
        assert value is not None
        axis = 1 if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) else 0
        insert_blocks(editor, node, value, axis, self.block_size)
