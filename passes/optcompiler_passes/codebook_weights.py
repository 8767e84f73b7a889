"""Weights as indices into a table of 8 or 16 values, for smaller files."""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir

from optcompiler.errors import InputError
from optcompiler.program import SOURCE_KEY, Program, constant
from optcompiler.rewriting import Batch, Candidate, Decline, Declined, Pass, PassContext, Stage
from optcompiler_passes._blocks import BLOCKED_SINCE
from optcompiler_passes._codebooks import encoded, fitted, normal_table, uniform_table
from optcompiler_passes._qdq import laid_out, table_of
from optcompiler_passes.cast_bf16 import LIKE_NOW, raise_opset

if TYPE_CHECKING:
    import torch

PRECISIONS = {"codebook4": 4, "codebook3": 3}
TABLES = ("fitted", "normal", "uniform")
LEAST_BLOCK = 16
LEAST_SHARE = 1e-3
"""Of the mean importance, that every input counts at least: calibration may have missed it."""

_Stored = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class CodebookWeights(Pass):
    """Store a constant weight as 4-bit indices into a table and a scale for each block.

    Before:
        y = MatMul (x, w)

    After, all of it standard ONNX (`w_indices` is uint4 [K / 64, 64, N], `w_table` float [16],
    `w_scales` float16 [K / 64, 1, N]):
        picked = Gather (w_table, Cast <to = INT32> (w_indices))
        w_decoded = Reshape (Mul (picked, Cast <to = FLOAT> (w_scales)), [K, N])
        y = MatMul (x, w_decoded)

    Rules:
    1. A site is a MatMul, Gemm or Conv with a constant float weight of `least_weights` elements or
       more that nothing else reads. Transposed initializers are sites too.
    2. Blocks of `block_size` lie along what is summed over; where that does not divide it, the
       largest divisor from 16 on does, else the whole channel is one block.
    3. `table` is "fitted": k-means over the weights of the tensor, each counting by the mean
       square of the input that it multiplies (Kim et al., "SqueezeLLM", 2023, section 4.1, with the
       input's second moment for the Fisher information); "normal": quantiles of a normal
       distribution, NF4 with 4 bits (Dettmers et al., "QLoRA", 2023, section 3); "uniform": equal
       steps, to compare with. Scales are fitted to the table with the same weights.
    4. Precision `codebook4` has 16 values, `codebook3` 8; both keep indices in 4 bits, because ONNX
       has no type of 3: fewer values compress better, but the file is no smaller as it is.
    5. A target that computes the weight when it loads, as ONNX Runtime does, runs no faster: the
       planner takes these candidates for `Budget.max_size_mb` alone.
    6. The program is raised to operator set 21 from 20 on, which changes the meaning of no
       operator.

    `skip` holds globs of node names or source paths that stay float.
    """

    name: ClassVar[str] = "codebook-weights"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    after: ClassVar[tuple[str, ...]] = ("cast-bf16", "insert-qdq", "quantize-weights")
    summary: ClassVar[str] = "weights as indices into a table, where a size is asked for"
    time_limit_s: ClassVar[float] = math.inf

    table: str = "fitted"
    block_size: int = 64
    least_weights: int = 1024
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.table not in TABLES:
            known = ", ".join(TABLES)
            raise InputError(f"codebook-weights: table={self.table!r}; take one of {known}.")
        if self.block_size < LEAST_BLOCK:
            raise InputError(
                f"codebook-weights: block_size={self.block_size}; give {LEAST_BLOCK} or more."
            )

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate | Decline]:
        choices = [p for p in PRECISIONS if p in context.precisions]
        if not choices:
            yield Decline("program", f"none of {', '.join(PRECISIONS)} is among those allowed")
            return
        if not context.calibration:
            yield Decline(
                "program", "no calibration data to measure damage on; pass calibration=batches"
            )
            return
        if program.opset < LIKE_NOW:
            why = f"4 bits need operator set {BLOCKED_SINCE}, and the program is of"
            yield Decline("program", f"{why} {program.opset}")
            return
        sites: list[ir.Node] = []
        for node in program.graph:
            if node.domain != "" or node.op_type not in ("MatMul", "Gemm", "Conv"):
                continue
            reason = self._skipped(node) or _reason(node, self.least_weights)
            if reason:
                yield Decline(str(node.name), reason, (str(node.name),))
            else:
                sites.append(node)
        moments = _moments(program, context, sites) if sites else {}
        for node in sites:
            name = str(node.name)
            for choice in choices:
                rewrite = _Codebook(self, name, PRECISIONS[choice], moments[name])
                yield Candidate(name, choice, rewrite, exact=False, nodes=(name,))

    def _skipped(self, node: ir.Node) -> str:
        names = (str(node.name), node.metadata_props.get(SOURCE_KEY, ""))
        for pattern in self.skip:
            if any(name and fnmatch.fnmatchcase(name, pattern) for name in names):
                return f"skipped by {pattern!r}"
        return ""


def _reason(node: ir.Node, least: int) -> str:
    """Why the node is no site; "" for one."""
    data, weight = node.inputs[:2]
    if data is None or weight is None:
        return "it lacks an operand"
    array = laid_out(weight)
    if array is None or constant(data) is not None:
        return f"its weight {weight.name!r} is not a constant beside data that are none"
    if weight.dtype != ir.DataType.FLOAT or data.dtype != ir.DataType.FLOAT:
        return f"{weight.name!r} or {data.name!r} is not float"
    if node.op_type != "Conv" and array.ndim != 2:
        return f"its weight {weight.name!r} has {array.ndim} axes, not 2"
    if node.attributes.get_int("transA", 0):
        return "its data are transposed"
    if array.size < least:
        return f"its weight has {array.size} elements, fewer than {least}"
    value: ir.Value | None = weight
    while value is not None:
        if len(value.uses()) > 1 or value.is_graph_output():
            return f"{value.name!r} is also read elsewhere and would be stored twice"
        made = value.producer()
        value = made.inputs[0] if made is not None else None
    if not np.isfinite(array).all():
        return f"its weight {weight.name!r} holds what is not finite"
    return ""


def _channels_first(node: ir.Node) -> bool:
    return node.op_type == "Conv" or bool(node.attributes.get_int("transB", 0))


def _moments(
    program: Program, context: PassContext, sites: Sequence[ir.Node]
) -> dict[str, np.ndarray]:
    """Mean square of what each element along the summed axes multiplies, by node: float64 [K]
    of a matrix, [groups, C / groups] of a Conv."""
    from optcompiler.executor import observe, to_torch

    readers: dict[str, list[ir.Node]] = {}
    for node in sites:
        assert node.inputs[0] is not None
        readers.setdefault(str(node.inputs[0].name), []).append(node)
    sums: dict[tuple[str, bool], np.ndarray] = {}

    def seen(name: str, tensor: torch.Tensor) -> None:
        for conv in {n.op_type == "Conv" for n in readers[name]}:
            rows = tensor.detach().double().square().movedim(1 if conv else -1, 0).flatten(1)
            key = name, conv
            sums[key] = sums.get(key, np.zeros(len(rows))) + rows.mean(1).numpy()

    module = to_torch(program, context.ops, trainable=False)
    batches: Sequence[Batch] = context.calibration
    for batch in batches:
        observe(module, batch, seen, list(readers))
    found: dict[str, np.ndarray] = {}
    for name, nodes in readers.items():
        for node in nodes:
            mean = sums[name, node.op_type == "Conv"] / len(batches)
            usual = float(mean.mean())
            usable = np.isfinite(usual) and usual > 0
            mean = np.maximum(mean, LEAST_SHARE * usual) if usable else np.ones_like(mean)
            if node.op_type == "Conv":
                mean = mean.reshape(node.attributes.get_int("group", 1), -1)
            found[str(node.name)] = mean
    return found


@dataclass(frozen=True)
class _Codebook:
    """The rewrite of one site."""

    options: CodebookWeights
    site: str
    bits: int
    moments: np.ndarray

    def __call__(self, program: Program) -> None:
        node = program.node(self.site)
        reason = "it is gone" if node is None else _reason(node, self.options.least_weights)
        if node is None or reason:
            raise Declined(f"{self.site!r}: {reason}.")
        weight = node.inputs[1]
        assert weight is not None
        array = laid_out(weight)
        assert array is not None
        table, indices, scales = self._stored(node, weight, array)
        raise_opset(program, BLOCKED_SINCE)
        name = str(weight.name)
        few = ir.DataType.UINT4
        packed = ir.tensor(indices.astype(few.numpy()), dtype=few)
        wide, whole = ir.DataType.FLOAT, ir.DataType.INT32
        held = program.add_weight(f"{name}_indices", packed)
        picks = _insert(program, node, "Cast", [held], whole, indices.shape, to=int(whole))
        held = program.add_weight(f"{name}_table", table.astype(np.float32))
        picked = _insert(program, node, "Gather", [held, picks], wide, indices.shape)
        held = program.add_weight(f"{name}_scales", scales.astype(np.float16))
        factors = _insert(program, node, "Cast", [held], wide, scales.shape, to=int(wide))
        scaled = _insert(program, node, "Mul", [picked, factors], wide, indices.shape)
        shape = program.add_weight(f"{name}_shape", np.array(array.shape, np.int64))
        decoded = _insert(program, node, "Reshape", [scaled, shape], wide, array.shape)
        node.replace_input_with(1, decoded)

    def _stored(self, node: ir.Node, weight: ir.Value, array: np.ndarray) -> _Stored:
        """Table, indices and scales, kept on the tensor: rewrites run many times in a search."""
        tensor = table_of(weight).const_value
        assert tensor is not None
        digest = hashlib.sha256(self.moments.tobytes()).hexdigest()
        options = self.options
        key = f"optcompiler.codebook.{self.bits}.{options.table}.{options.block_size}.{digest}"
        known = tensor.meta.get(key)
        if known is None:
            known = tensor.meta[key] = self._found(node, array)
        return known

    def _found(self, node: ir.Node, array: np.ndarray) -> _Stored:
        first = _channels_first(node)
        rows = array.reshape(len(array), -1) if first else array.T
        importance = self._importance(node, array, len(rows))
        length = _block_length(rows.shape[1], self.options.block_size)
        blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, length)
        weights = importance.reshape(-1, length)
        if self.options.table == "fitted":
            table, indices, scales = fitted(blocks, weights, self.bits)
        else:
            make = normal_table if self.options.table == "normal" else uniform_table
            table = make(self.bits)
            indices, scales = encoded(blocks, weights, table)
        indices = indices.reshape(len(rows), -1, length)
        scales = scales.reshape(len(rows), -1, 1)
        if not first:
            indices, scales = (np.moveaxis(a, 0, 2) for a in (indices, scales))
        return table, np.ascontiguousarray(indices), np.ascontiguousarray(scales)

    def _importance(self, node: ir.Node, array: np.ndarray, channels: int) -> np.ndarray:
        """Float64 [channels, K]: the mean square of the input beside each weight."""
        if node.op_type != "Conv":
            return np.tile(self.moments, (channels, 1))
        per_channel = np.repeat(self.moments, channels // len(self.moments), axis=0)
        return np.repeat(per_channel, math.prod(array.shape[2:]), axis=1)


def _block_length(count: int, wanted: int) -> int:
    for length in range(min(wanted, count), LEAST_BLOCK - 1, -1):
        if count % length == 0:
            return length
    return count


def _insert(
    program: Program, before: ir.Node, op_type: str, operands: list[ir.Value],
    dtype: ir.DataType, shape: Sequence[int], **attributes: int,
) -> ir.Value:  # fmt: skip
    stem = f"{operands[0].name}_{op_type.lower()}"
    node = ir.node(op_type, operands, attributes, name=program.fresh_name(stem))
    result = node.outputs[0]
    result.name = program.fresh_name(f"{stem}_result")
    result.dtype, result.shape = dtype, ir.Shape(shape)
    program.graph.insert_before(before, node)
    return result
