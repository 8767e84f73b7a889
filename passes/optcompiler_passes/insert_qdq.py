"""Quantise what the target has integer kernels for: QuantizeLinear/DequantizeLinear around it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from optcompiler import evidence
from optcompiler.backend import Capabilities
from optcompiler.errors import InputError
from optcompiler.observers import Observer, Seen, builtin_observers, observe
from optcompiler.program import Program, constant
from optcompiler.quantization import (
    FLOAT8,
    INTEGER_RANGES,
    QuantizationScheme,
    weight_scales,
)
from optcompiler.rewriting import Candidate, Decline, Declined, Pass, PassContext, Stage
from optcompiler_passes._blocks import BLOCKED_SINCE, blocks_of, insert_blocks
from optcompiler_passes._qdq import (
    Editor,
    Pair,
    dequantizer,
    laid_out,
    pair_of,
    quantized_source,
    readers,
    table_of,
)
from optcompiler_passes._sites import Site, Survey, value_name
from optcompiler_passes.cast_bf16 import LIKE_NOW, raise_opset

BLOCK_SIZE = 32
PRECISIONS = ("int8", "w4a8", "w4a4", "fp8")


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Wrap activations and weights of integer-capable nodes in quantise-dequantise pairs.

    Before:
        y = Conv (x, w, b)
        z = Relu (y)

    After (scales and zero points are initializers; the weight stays float, so that it can still be
    tuned):
        x_dequantized = DequantizeLinear (QuantizeLinear (x, s_x, z_x), s_x, z_x)
        w_dequantized = DequantizeLinear <axis=0> (QuantizeLinear <axis=0> (w, s_w, 0), s_w, 0)
        y = Conv (x_dequantized, w_dequantized, b)
        z = Relu (y)
        z_dequantized = DequantizeLinear (QuantizeLinear (z, s_z, z_z), s_z, z_z)

    Rules:
    1. A site is a node whose type is among the target's `integer_ops`. A contraction with a
       constant weight quantises that symmetrically per output channel (Conv axis 0, Gemm by transB,
       MatMul's [K, N] axis 1); one of two activations quantises both, the second symmetrically:
       kernels multiply by signed bytes. A weight that is another arrangement of an initializer (the
       Transpose of an embedding table) is quantised as arranged: what else reads the initializer
       goes on reading floats.
    2. A value has one pair, whoever asks for it. It is placed before the reshapes, transposes and
       poolings that lead from an integer kernel to the reader, and those carry the same scale.
    3. The output is quantised where the target's kernel cannot write float, after the Relu or Clip
       that the kernel absorbs.
    4. Elementwise nodes, concatenations and poolings are sites where an operand comes from an
       integer kernel and a reader is one. Where the target fuses an Add into the contraction
       that feeds it, that operand stays as it is.
    5. Ranges come from one pass of `program` over the calibration batches.
    6. With "w4a8" weights have 4 bits: a large matrix in blocks where the target multiplies those
       (`quantize-weights`), all others per output channel. Beside "int8" it is offered for large
       weights only: there is nothing to gain at small ones, which stay in caches.
    7. With "w4a4" activations that a weight multiplies have 4 bits too. The first and the last
       weighted sites (`ends="int8"`; "same" for no exception) and products of two activations keep
       8 bits, other operators float.
    8. With "fp8" activations and weights are floats of 8 bits (E4M3), scaled so that the largest
       magnitude in calibration is the largest of the type. Biases stay in float.
    9. A value that sites want in different types has the widest, of those of 8 bits integers.

    `observer` names the activation observer, `weight_observer` is "mse" or "minmax", `skip` holds
    globs of node names or source paths that stay float.
    """

    name: ClassVar[str] = "insert-qdq"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    after: ClassVar[tuple[str, ...]] = ("cast-bf16",)
    summary: ClassVar[str] = "8-bit activations and weights where the target has integer kernels"
    time_limit_s: ClassVar[float] = math.inf

    observer: str = "mse"
    weight_observer: str = "mse"
    skip: tuple[str, ...] = ()
    ends: str = "int8"

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate | Decline]:
        make = self._observer(context.observers)
        if self.ends not in ("int8", "same"):
            raise InputError(f"insert-qdq: ends={self.ends!r}; take int8 or same.")
        if self.weight_observer not in ("mse", "minmax"):
            raise InputError(
                f"insert-qdq: weight_observer={self.weight_observer!r}; take mse or minmax."
            )
        refusal = _refusal(context)
        if refusal is not None:
            yield Decline("program", refusal)
            return
        survey = Survey(program, context, self.skip)
        yield from survey.declines
        if not survey.sites:
            return
        watched = sorted({n for site in survey.sites for n in site.watched})
        observers = observe(
            program, watched, context.calibration, make, context.ops, context.progress
        )
        forms = _forms(context.capabilities)
        multipliers: set[str] = set()
        if context.capabilities.symmetric_multipliers:
            multipliers = {name for site in survey.sites for name in site.multipliers}
        broken = {name: o.non_finite for name, o in observers.items() if o.non_finite}
        wanted = {f.activation for f in forms.values()}
        ranges: dict[str, dict[str, tuple[np.float32, int]]] = {}
        for dtype in wanted:
            of_dtype = ranges[dtype] = {}
            for name, observer in observers.items():
                if name not in broken:
                    even = name in multipliers or dtype in FLOAT8
                    scheme = QuantizationScheme(dtype, symmetric=even)
                    low, high = observer.range(scheme.range_bits, even)
                    of_dtype[name] = scheme.parameters(low, high)
        summaries = {name: o.summary() for name, o in observers.items()}
        told: set[str] = set()
        for site in survey.sites:
            bad = next((n for n in site.watched if n in broken), None)
            if bad is not None:
                yield Decline(
                    site.node,
                    f"{broken[bad]} values of {bad!r} were NaN or infinite in calibration",
                    site.nodes,
                )
                continue
            offered = self._offered(site, context.precisions, program.opset)
            if not offered:
                reason = "4 bits are for what a weight multiplies, and 8 are not allowed"
                yield Decline(site.node, reason, site.nodes)
            for choice, note in offered.items():
                form = forms[choice]
                mine = {n: ranges[form.activation][n] for n in site.watched}
                rewrite = Quantize(
                    site, mine, form.activation, form.weight,
                    form.weight == "INT4" and site.blocks and program.opset >= LIKE_NOW,
                    context.capabilities.per_channel, self.weight_observer,
                )  # fmt: skip
                yield Candidate(
                    site.node, choice, rewrite, exact=False, nodes=site.nodes,
                    note="; ".join(filter(None, (note, site.note))),
                    details={
                        "observer": self.observer, **rewrite.evidence(program, summaries, told),
                    },
                )  # fmt: skip

    def _offered(self, site: Site, precisions: frozenset[str], opset: int) -> dict[str, str]:
        """What the site may become, with a remark each."""
        found = {"int8": ""} if "int8" in precisions else {}
        weighted = site.weight is not None
        product = bool(site.multipliers)
        few = opset >= LIKE_NOW
        if "w4a8" in precisions:
            if not weighted:
                found.setdefault("int8", "")
            elif few and (site.large or "int8" not in precisions):
                found["w4a8"] = ""
        if "w4a4" in precisions:
            if weighted and few and not (site.end and self.ends == "int8"):
                found["w4a4"] = ""
            elif weighted:
                found.setdefault("int8", "the first and the last layer keep 8 bits")
            elif product:
                found.setdefault("int8", "a product of activations keeps 8 bits")
        if "fp8" in precisions and few:
            found["fp8"] = ""
        return found

    def _observer(self, known: Mapping[str, type[Observer]]) -> type[Observer]:
        available = {o.name: o for o in builtin_observers()} | dict(known)
        if self.observer not in available:
            raise InputError(
                f"insert-qdq: observer {self.observer!r} is not known; "
                f"take one of {', '.join(sorted(available))}."
            )
        return available[self.observer]


def _refusal(context: PassContext) -> str | None:
    if not context.precisions & set(PRECISIONS):
        return f"precision int8 is not among those allowed: {', '.join(sorted(context.precisions))}"
    if not context.capabilities.integer_ops:
        return f"target {context.target.backend} has no integer kernels"
    if not context.calibration:
        return "no calibration data to take ranges from; pass calibration=batches"
    return None


@dataclass(frozen=True)
class Form:
    """ONNX types of activations and weights."""

    activation: str
    weight: str


def _forms(capabilities: Capabilities) -> dict[str, Form]:
    """The types by choice: 4 bits are signed where the target's 8 bits are."""
    eight = capabilities.activation_dtype
    four = "UINT4" if eight.startswith("U") else "INT4"
    return {
        "int8": Form(eight, capabilities.weight_dtype), "w4a8": Form(eight, "INT4"),
        "w4a4": Form(four, "INT4"), "fp8": Form("FLOAT8E4M3FN", "FLOAT8E4M3FN"),
    }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Quantize:
    """The rewrite of one site; `ranges` gives scale and zero point of each watched value."""

    site: Site
    ranges: Mapping[str, tuple[np.float32, int]]
    dtype: str
    weight_dtype: str
    blocks: bool
    per_channel: bool
    weight_observer: str

    def __call__(self, program: Program) -> None:
        editor = Editor(program)
        node = editor.nodes.get(self.site.node)
        if node is None:
            raise Declined(f"{self.site.node!r} is gone.")
        for value in (*node.inputs[:1], *node.outputs):
            if value is not None and value.dtype != ir.DataType.FLOAT:
                raise Declined(f"{self.site.node!r} no longer works on floats.")
        for index, chain in self.site.chains:
            if dequantizer(node.inputs[index]) is None:
                self._quantize_chain(editor, chain, node, index)
        if self.site.weight is not None:
            self._quantize_weight(editor, node, *self.site.weight)
        if self.site.output is not None:
            output = self._present(editor, self.site.output)
            pair = self._pair(editor, output, self.site.output)
            for reader, index in list(readers(output)):
                reader.replace_input_with(index, pair.value)

    def evidence(
        self, program: Program, summaries: Mapping[str, Seen | None], told: set[str]
    ) -> dict[str, Any]:
        """For the ledger; values in `told` were described at another site."""
        found = {n: s for n in self.site.watched if (s := summaries[n]) and n not in told}
        told.update(found)
        details: dict[str, Any] = {
            evidence.ACTIVATIONS: {
                name: evidence.activation(summaries[name], self.dtype, float(scale), zero_point)
                for name, (scale, zero_point) in self.ranges.items()
            },
        }
        if found:
            details[evidence.OBSERVED] = {n: evidence.observed(s) for n, s in found.items()}
        node = program.node(self.site.node)
        if self.site.weight is None or node is None:
            return details
        index, axis = self.site.weight
        weight = node.inputs[index]
        array = laid_out(weight) if dequantizer(weight) is None else None
        if weight is None or array is None or not np.isfinite(array).all():
            return details
        if self.blocks:
            scheme = QuantizationScheme("INT4", 1 - axis, BLOCK_SIZE)
            scales, _ = blocks_of(weight, array, scheme)
        else:
            along = axis if self.per_channel and axis >= 0 else None
            scheme = QuantizationScheme(self.weight_dtype, along)
            scales = _scales(weight, array, self.weight_dtype, along, self.weight_observer)
        details[evidence.WEIGHT] = evidence.weight(array, scales, scheme)
        return details

    def _quantize_chain(
        self, editor: Editor, chain: Sequence[str], node: ir.Node, index: int
    ) -> None:
        shared: Pair | None = None
        for position, name in enumerate(chain):
            value = self._present(editor, name)
            if position + 1 < len(chain):
                reader = self._present(editor, chain[position + 1]).producer()
                operand = 0
            else:
                reader, operand = node, index
            current = reader.inputs[operand] if reader is not None else None
            if reader is None or (current is not value and quantized_source(current) is not value):
                raise Declined(f"{node.name!r} no longer reads {name!r}.")
            pair = self._pair(editor, value, chain[0], shared)
            reader.replace_input_with(operand, pair.value)
            shared = pair

    def _pair(
        self, editor: Editor, value: ir.Value, range_of: str, shared: Pair | None = None
    ) -> Pair:
        existing = pair_of(value)
        if existing is not None and _rank(existing.dtype) >= _rank(self.dtype):
            return existing
        if existing is not None:
            return self._widened(editor, existing, range_of, shared)
        if shared is not None and shared.zero_point is not None:
            return editor.insert_pair(value, shared.scale, shared.zero_point)
        scale, zero_point = self.ranges[range_of]
        parameters = editor.parameters(
            str(value.name), np.asarray(scale), np.asarray(zero_point), self.dtype
        )
        return editor.insert_pair(value, *parameters)

    def _widened(self, editor: Editor, pair: Pair, range_of: str, shared: Pair | None) -> Pair:
        """A pair that others wanted narrower, in this site's type."""
        if shared is not None and shared.zero_point is not None:
            parameters = shared.scale, shared.zero_point
        else:
            scale, zero_point = self.ranges[range_of]
            parameters = editor.parameters(
                str(pair.source.name), np.asarray(scale), np.asarray(zero_point), self.dtype
            )
        for node in (pair.quantize, pair.dequantize):
            for index, value in enumerate(parameters, 1):
                node.replace_input_with(index, value)
        pair.quantize.outputs[0].type = parameters[1].type
        return pair

    def _present(self, editor: Editor, name: str) -> ir.Value:
        if name not in editor.values:
            raise Declined(f"{name!r} is gone.")
        return editor.values[name]

    def _quantize_weight(self, editor: Editor, node: ir.Node, index: int, axis: int) -> None:
        weight = node.inputs[index]
        if weight is None or dequantizer(weight) is not None:
            return
        array = laid_out(weight)
        if array is None:
            raise Declined(f"{value_name(weight)} is no longer a constant.")
        if {"INT4", "UINT4"} & {self.weight_dtype, self.dtype}:
            raise_opset(editor.program, BLOCKED_SINCE)
        if self.blocks:
            insert_blocks(editor, node, weight, QuantizationScheme("INT4", 1 - axis, BLOCK_SIZE))
            return
        along = axis if self.per_channel and axis >= 0 else None
        pair = pair_of(weight, along)
        if pair is None:
            known = _scales(weight, array, self.weight_dtype, along, self.weight_observer)
            scales = np.array(known)
            if self.weight_dtype not in FLOAT8:
                self._raise_to_bias(node, scales)
            parameters = editor.parameters(
                str(weight.name), scales, np.zeros_like(scales), self.weight_dtype
            )
            pair = editor.insert_pair(weight, *parameters, axis=along)
        node.replace_input_with(index, pair.value)

    def _raise_to_bias(self, node: ir.Node, scales: np.ndarray) -> None:
        """Make the scales of nearly dead channels large enough for their bias to fit 32 bits."""
        bias = _bias(node)
        made = dequantizer(node.inputs[0])
        activation = constant(made.inputs[1]) if made is not None else None
        if bias is None or activation is None or scales.ndim == 0 or bias.size != scales.size:
            return
        least = np.abs(bias.reshape(-1)).astype(np.float64) / (float(activation) * 2.0**30)
        np.maximum(scales, least.astype(np.float32), out=scales)


def _rank(dtype: str) -> tuple[int, bool]:
    """Of two types that sites want of one value, the higher: more bits, then integers."""
    return int(ir.DataType[dtype].bitwidth), dtype in INTEGER_RANGES


def _bias(node: ir.Node) -> np.ndarray | None:
    """The constant bias of a Conv or Gemm, or of the Add that alone reads a MatMul."""
    if node.op_type != "MatMul":
        return constant(node.inputs[2]) if len(node.inputs) > 2 else None
    uses = node.outputs[0].uses()
    reader = next(iter(uses)).node if len(uses) == 1 else None
    if reader is None or reader.op_type != "Add":
        return None
    return next((a for v in reader.inputs if (a := constant(v)) is not None), None)


def _scales(
    weight: ir.Value, array: np.ndarray, dtype: str, axis: int | None, method: str
) -> np.ndarray:
    """Scales of a weight, kept on its tensor: rewrites run many times in a search."""
    tensor = table_of(weight).const_value
    assert tensor is not None
    key = f"optcompiler.scales.{weight.name}.{dtype}.{axis}.{method}"
    known = tensor.meta.get(key)
    if known is None:
        known = tensor.meta[key] = weight_scales(array, dtype, axis, method)
    return known
