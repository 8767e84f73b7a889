"""Quantise what the target has integer kernels for: QuantizeLinear/DequantizeLinear around it."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optcompiler.errors import InputError
from optcompiler.observers import (
    Observer,
    builtin_observers,
    observe,
    quantization_parameters,
    weight_scales,
)
from optcompiler.program import SOURCE_KEY, Program, constant
from optcompiler.rewriting import Candidate, Decline, Declined, Pass, PassContext, Stage
from optcompiler_passes._blocks import BLOCKED_SINCE, insert_blocks, is_large_matrix
from optcompiler_passes._qdq import (
    KEEPS_LEVELS,
    PICKS_LEVELS,
    Editor,
    Pair,
    dequantizer,
    laid_out,
    pair_of,
    quantized_source,
    readers,
    table_of,
)
from optcompiler_passes.cast_bf16 import LIKE_NOW, raise_opset

CONTRACTIONS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
BLOCK_SIZE = 32
_ABSORBED = frozenset({"Clip", "Relu"})
_ARITHMETIC = frozenset({"Add", "Concat", "Div", "Mul", "Sub", "Sum"})


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
    6. Where "w4a8" is allowed, a large matrix may have 4 bits in blocks (`quantize-weights`).

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

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate | Decline]:
        make = self._observer(context.observers)
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
        dtype = context.capabilities.activation_dtype
        bits = ir.DataType[dtype].bitwidth
        multipliers: set[str] = set()
        if context.capabilities.symmetric_multipliers:
            multipliers = {name for site in survey.sites for name in site.multipliers}
        ranges: dict[str, tuple[np.float32, int]] = {}
        broken: dict[str, int] = {}
        for name, observer in observers.items():
            if observer.non_finite:
                broken[name] = observer.non_finite
            else:
                even = name in multipliers
                ranges[name] = quantization_parameters(*observer.range(bits, even), dtype, even)
        widths = {
            choice: of for name, choice, of in (
                ("int8", f"int{bits}", context.capabilities.weight_dtype), ("w4a8", "w4a8", "INT4"),
            ) if name in context.precisions
        }  # fmt: skip
        for site in survey.sites:
            bad = next((n for n in site.watched if n in broken), None)
            if bad is not None:
                yield Decline(
                    site.node,
                    f"{broken[bad]} values of {bad!r} were NaN or infinite in calibration",
                    site.nodes,
                )
                continue
            offered = {c: of for c, of in widths.items() if of != "INT4" or site.blocks}
            if not offered:
                yield Decline(site.node, "it has no large matrix to store in 4 bits", site.nodes)
            for choice, weight_dtype in offered.items():
                rewrite = Quantize(
                    site,
                    {n: ranges[n] for n in site.watched},
                    dtype,
                    weight_dtype,
                    context.capabilities.per_channel,
                    self.weight_observer,
                )
                yield Candidate(
                    site.node,
                    choice,
                    rewrite,
                    exact=False,
                    nodes=site.nodes,
                    note=site.note,
                    details={
                        "observer": self.observer,
                        "scales": {n: float(ranges[n][0]) for n in site.watched},
                    },
                )

    def _observer(self, known: Mapping[str, type[Observer]]) -> type[Observer]:
        available = {o.name: o for o in builtin_observers()} | dict(known)
        if self.observer not in available:
            raise InputError(
                f"insert-qdq: observer {self.observer!r} is not known; "
                f"take one of {', '.join(sorted(available))}."
            )
        return available[self.observer]


def _refusal(context: PassContext) -> str | None:
    if not context.precisions & {"int8", "w4a8"}:
        return f"precision int8 is not among those allowed: {', '.join(sorted(context.precisions))}"
    if not context.capabilities.integer_ops:
        return f"target {context.target.backend} has no integer kernels"
    if not context.calibration:
        return "no calibration data to take ranges from; pass calibration=batches"
    return None


@dataclass(frozen=True)
class Site:
    """What one candidate quantises, by name; `note` says what it leaves beside the integers.

    `chains` gives for an operand index the values from the one whose range counts down to the
    operand, each but the first made from the one before by an operator that keeps its levels.
    `weight` is (operand index, channel axis). `output` is the value to quantise for every reader.
    `multipliers` are roots of chains that lead to the second operand of a product of activations.
    `blocks` says whether the weight is a matrix that may have 4 bits, in blocks of `BLOCK_SIZE`.
    """

    node: str
    nodes: tuple[str, ...]
    chains: tuple[tuple[int, tuple[str, ...]], ...]
    weight: tuple[int, int] | None = None
    output: str | None = None
    multipliers: tuple[str, ...] = ()
    note: str = ""
    blocks: bool = False

    @property
    def watched(self) -> tuple[str, ...]:
        roots = [chain[0] for _, chain in self.chains]
        return (*dict.fromkeys([*roots, *([self.output] if self.output else [])]),)


class _No(Exception):
    """Why a node is not a site."""


class Survey:
    """The sites of a program and the nodes that cannot be one."""

    def __init__(self, program: Program, context: PassContext, skip: Sequence[str]) -> None:
        self.context = context
        self.capabilities = context.capabilities
        self.fuses = "contraction" in context.capabilities.fusions
        self.opset = program.opset
        self.order = {node: i for i, node in enumerate(program.graph)}
        self.sites: list[Site] = []
        self.declines: list[Decline] = []
        self._skip = skip
        self._weights: dict[ir.Node, tuple[int, int] | None] = {}
        self._reasons: dict[ir.Node, str] = {}
        self._operands: dict[ir.Node, tuple[int, ...]] = {}
        integer_ops = self.capabilities.integer_ops
        nodes = [n for n in program.graph if n.domain == "" and n.op_type in integer_ops]
        for node in nodes:
            if node.op_type in CONTRACTIONS:
                self._attempt(node, self._contraction)
        for node in reversed(nodes):
            if self._is_movement_site(node):
                self._attempt(node, self._movement)
        for node in nodes:
            if node in self._operands and node.op_type not in CONTRACTIONS:
                self._attempt(node, self._fed_by_integers)
        for node in nodes:
            if node in self._operands:
                self._attempt(node, self._emit)
            if node in self._reasons:
                self.declines.append(
                    Decline(str(node.name), self._reasons[node], (str(node.name),))
                )

    def _attempt(self, node: ir.Node, step: Callable[[ir.Node], None]) -> None:
        try:
            step(node)
        except _No as reason:
            self._operands.pop(node, None)
            self._reasons[node] = str(reason)

    # -- which nodes ------------------------------------------------------------------------

    def _contraction(self, node: ir.Node) -> None:
        self._check_common(node)
        self._weights[node] = _weight(node)
        weight = self._weights[node]
        candidates = (0,) if weight is not None else (0, 1)
        for index in candidates:
            operand = node.inputs[index]
            if constant(operand) is not None:
                raise _No(f"its operand {_name(operand)} is a constant where data is expected")
        done = dequantizer(node.inputs[0]) is not None and dequantizer(node.inputs[1]) is not None
        if done:
            raise _No("already quantised")
        self._output(node)
        self._operands[node] = candidates

    def _is_movement_site(self, node: ir.Node) -> bool:
        if node.op_type in CONTRACTIONS | _ABSORBED | KEEPS_LEVELS | PICKS_LEVELS:
            return False
        constants = [constant(v) is not None for v in node.inputs if v is not None]
        return not any(constants) if node.op_type in _ARITHMETIC else not all(constants)

    def _movement(self, node: ir.Node) -> None:
        operands = [i for i, v in enumerate(node.inputs) if v is not None and constant(v) is None]
        if all(dequantizer(node.inputs[i]) is not None for i in operands):
            raise _No("already quantised")
        self._check_common(node)
        result = self._after_activation(node.outputs[0])
        if result.is_graph_output():
            raise _No(f"its result {_name(result)} is an output of the program and stays float")
        if not self._integer_reader(result):
            raise _No(f"no integer kernel reads its result {_name(result)}")
        if node.op_type == "Add" and self.fuses:
            fused = self._fused_operand(node, operands)
            operands = [i for i in operands if i != fused]
        self._operands[node] = tuple(operands)

    def _fed_by_integers(self, node: ir.Node) -> None:
        if not any(self.from_integer(v) for v in node.inputs):
            raise _No("none of its operands comes from an integer kernel")

    def _check_common(self, node: ir.Node) -> None:
        path = node.metadata_props.get(SOURCE_KEY, "")
        for pattern in self._skip:
            if fnmatch.fnmatchcase(str(node.name), pattern) or (
                path and fnmatch.fnmatchcase(path, pattern)
            ):
                raise _No(f"skipped by {pattern!r}")
        if len(node.outputs) != 1:
            raise _No(f"it has {len(node.outputs)} outputs")
        first = node.inputs[0]
        for value in (first, node.outputs[0]):
            if value is None or value.shape is None:
                raise _No(f"the shape of {_name(value)} is unknown")
            if value.dtype != ir.DataType.FLOAT:
                kind = value.dtype.name.lower() if value.dtype is not None else "unknown"
                raise _No(f"{_name(value)} is {kind}, not float")

    # -- following values -------------------------------------------------------------------

    def _after_activation(self, value: ir.Value) -> ir.Value:
        """`value`, or the result of the Relu or Clip that alone reads it."""
        uses = value.uses()
        if len(uses) == 1 and not value.is_graph_output():
            reader = next(iter(uses)).node
            if reader.op_type in _ABSORBED and reader.domain == "":
                return reader.outputs[0]
        return value

    def _integer_reader(self, value: ir.Value) -> bool:
        """Whether an integer kernel reads `value`, or a rearrangement of it."""
        for use in value.uses():
            if use.idx in self._operands.get(use.node, ()):
                return True
            moves = use.node.op_type in KEEPS_LEVELS | PICKS_LEVELS and use.idx == 0
            if moves and any(self._integer_reader(v) for v in use.node.outputs):
                return True
        return False

    def from_integer(self, value: ir.Value | None, depth: int = 12) -> bool:
        """Whether `value` is made by an integer kernel, through what that kernel can absorb."""
        node = value.producer() if value is not None else None
        if node is None or depth == 0:
            return False
        if node in self._operands or node.op_type == "DequantizeLinear":
            return True
        if node.op_type in KEEPS_LEVELS | PICKS_LEVELS | _ABSORBED:
            return self.from_integer(node.inputs[0], depth - 1)
        spec = self.context.ops.get(node)
        if self.fuses and spec is not None and spec.pointwise:
            return any(self.from_integer(v, depth - 1) for v in node.inputs)
        return False

    def _fused_operand(self, node: ir.Node, operands: Sequence[int]) -> int | None:
        """The operand of an Add that the contraction making it adds in its own kernel."""
        found: list[tuple[int, int]] = []
        for index in operands:
            value = node.inputs[index]
            producer = self._only_reader(value)
            if producer is not None and producer.op_type == "Add":
                parts = [v for v in producer.inputs if constant(v) is None]
                producer = self._only_reader(parts[0]) if len(parts) == 1 else None
            if producer in self._operands and producer.op_type in CONTRACTIONS:
                found.append((self.order[producer], index))
        return max(found)[1] if found else None

    def _only_reader(self, value: ir.Value | None) -> ir.Node | None:
        """The producer of a value that is read once and is no output."""
        if value is None or value.is_graph_output() or len(value.uses()) != 1:
            return None
        return value.producer()

    def _chain(self, value: ir.Value) -> tuple[str, ...]:
        """From the value to quantise down to `value`, over operators that keep its levels."""
        chain = [value]
        while True:
            node = chain[0].producer()
            if node is None or node.domain != "" or dequantizer(chain[0]) is not None:
                break
            source = node.inputs[0] if node.inputs else None
            if source is None or constant(source) is not None:
                break
            if node.op_type in PICKS_LEVELS:
                if not self.from_integer(source):
                    break
            elif node.op_type not in KEEPS_LEVELS:
                break
            chain.insert(0, source)
        if dequantizer(chain[0]) is not None:
            source = quantized_source(chain[0])
            chain[:1] = [source] if source is not None else []
        return tuple(str(v.name) for v in chain)

    # -- sites ------------------------------------------------------------------------------

    def _emit(self, node: ir.Node) -> None:
        chains: list[tuple[int, tuple[str, ...]]] = []
        for index in self._operands[node]:
            value = node.inputs[index]
            if value is not None and dequantizer(value) is None:
                chains.append((index, self._chain(value)))
        weight = self._weights.get(node)
        products = node in self._weights and weight is None
        if weight is not None and dequantizer(node.inputs[weight[0]]) is not None:
            weight = None
        output = self._output(node)
        covered = [str(node.name)]
        producer = output.producer() if output is not None else None
        if producer is not None and producer is not node:
            covered.append(str(producer.name))
        self.sites.append(
            Site(
                str(node.name),
                tuple(covered),
                tuple(chains),
                weight,
                str(output.name) if output is not None else None,
                tuple(chain[0] for index, chain in chains if index == 1 and products),
                "" if weight is None else _kept_in_float(node.inputs[weight[0]]),
                weight is not None
                and node.op_type in self.capabilities.stored_weight_ops
                and is_large_matrix(node.inputs[weight[0]])
                and self.opset >= LIKE_NOW,
            )
        )

    def _output(self, node: ir.Node) -> ir.Value | None:
        contraction = node.op_type in CONTRACTIONS
        if contraction and (self.fuses or node.op_type in self.capabilities.float_outputs):
            return None
        result = self._after_activation(node.outputs[0])
        if result.is_graph_output():
            raise _No(
                f"its result {_name(result)} is an output of the program, and the target's "
                f"integer {node.op_type} does not write float"
            )
        return result


def _name(value: ir.Value | None) -> str:
    return repr(value.name) if value is not None else "an absent operand"


def _weight(node: ir.Node) -> tuple[int, int] | None:
    """(operand index, axis of output channels) of a constant weight; None for two activations."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        raise _No("it has no second operand")
    operand = node.inputs[1]
    value = quantized_source(operand) or operand
    array = laid_out(value)
    made = dequantizer(operand)
    if array is None and made is not None and constant(made.inputs[0]) is not None:
        return 1, 0
    if array is None:
        if node.op_type == "MatMul":
            return None
        raise _No(f"its weight {_name(value)} is not a constant")
    if array.dtype != np.float32:
        raise _No(f"its weight {_name(value)} is {array.dtype}, not float32")
    if node.op_type == "MatMul":
        if array.ndim != 2:
            raise _No(f"its weight {_name(value)} has {array.ndim} dimensions, not 2")
        axis = 1
    elif node.op_type == "Gemm":
        axis = 0 if node.attributes.get_int("transB", 0) else 1
    elif node.op_type == "ConvTranspose":
        axis = 1 if node.attributes.get_int("group", 1) == 1 else -1
    else:
        axis = 0
    if not np.isfinite(array).all():
        rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
        bad = int((~np.isfinite(rows)).any(axis=1).sum())
        raise _No(f"{bad} of {len(rows)} output channels hold NaN weights")
    return 1, axis


def _kept_in_float(weight: ir.Value | None) -> str:
    """What a weight costs that stays in float for others than contractions, as a remark."""
    table = table_of(weight) if weight is not None else None
    if table is None or table.const_value is None:
        return ""
    others = [
        str(reader.name)
        for reader, _ in readers(table)
        if reader.op_type not in CONTRACTIONS | KEEPS_LEVELS
    ]
    if not others:
        return ""
    return (
        f"{others[0]!r} reads its weight {_name(table)} too, which stays in float "
        f"({table.const_value.nbytes} bytes) beside the integers ({table.const_value.size} bytes)"
    )


@dataclass(frozen=True, eq=False)
class Quantize:
    """The rewrite of one site; `ranges` gives scale and zero point of each watched value."""

    site: Site
    ranges: Mapping[str, tuple[np.float32, int]]
    dtype: str
    weight_dtype: str
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
        if existing is not None:
            return existing
        if shared is not None and shared.zero_point is not None:
            return editor.insert_pair(value, shared.scale, shared.zero_point)
        scale, zero_point = self.ranges[range_of]
        parameters = editor.parameters(
            str(value.name), np.asarray(scale), np.asarray(zero_point), self.dtype
        )
        return editor.insert_pair(value, *parameters)

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
            raise Declined(f"{_name(weight)} is no longer a constant.")
        if self.weight_dtype == "INT4":
            raise_opset(editor.program, BLOCKED_SINCE)
            insert_blocks(editor, node, weight, 1 - axis, BLOCK_SIZE)
            return
        along = axis if self.per_channel and axis >= 0 else None
        pair = pair_of(weight, along)
        if pair is None:
            known = _scales(weight, array, self.weight_dtype, along, self.weight_observer)
            scales = np.array(known)
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
