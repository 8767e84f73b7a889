"""Where `insert-qdq` can put integers, and why it cannot elsewhere."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optcompiler.program import SOURCE_KEY, Program, constant
from optcompiler.rewriting import Decline, PassContext
from optcompiler_passes._blocks import LEAST_WEIGHTS, is_large_matrix
from optcompiler_passes._qdq import (
    KEEPS_LEVELS,
    PICKS_LEVELS,
    dequantizer,
    laid_out,
    quantized_source,
    readers,
    table_of,
)

CONTRACTIONS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_ABSORBED = frozenset({"Clip", "Relu"})
_ARITHMETIC = frozenset({"Add", "Concat", "Div", "Mul", "Sub", "Sum"})


@dataclass(frozen=True)
class Site:
    """What one candidate quantises, by name; `note` says what it leaves beside the integers.

    `chains` gives for an operand index the values from the one whose range counts down to the
    operand, each but the first made from the one before by an operator that keeps its levels.
    `weight` is (operand index, channel axis). `output` is the value to quantise for every reader.
    `multipliers` are roots of chains that lead to the second operand of a product of activations.
    `blocks` says whether the weight is a matrix that the target multiplies in blocks of 4 bits,
    `large` whether it is so large that fewer bits are worth something. `end` is set for the first
    and the last of the weighted sites on a way from an input to an output.
    """

    node: str
    nodes: tuple[str, ...]
    chains: tuple[tuple[int, tuple[str, ...]], ...]
    weight: tuple[int, int] | None = None
    output: str | None = None
    multipliers: tuple[str, ...] = ()
    note: str = ""
    blocks: bool = False
    large: bool = False
    end: bool = False

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
                raise _No(f"its operand {value_name(operand)} is a constant where data is expected")
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
            raise _No(
                f"its result {value_name(result)} is an output of the program and stays float"
            )
        if not self._integer_reader(result):
            raise _No(f"no integer kernel reads its result {value_name(result)}")
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
                raise _No(f"the shape of {value_name(value)} is unknown")
            if value.dtype != ir.DataType.FLOAT:
                kind = value.dtype.name.lower() if value.dtype is not None else "unknown"
                raise _No(f"{value_name(value)} is {kind}, not float")

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
                and is_large_matrix(node.inputs[weight[0]]),
                weight is not None and _elements(node.inputs[weight[0]]) >= LEAST_WEIGHTS,
                node in self._weights and self._is_end(node),
            )
        )

    def _is_end(self, node: ir.Node) -> bool:
        """Whether no other weighted site lies before it, or none after it."""
        before = self._reached(node, lambda n: [v.producer() for v in n.inputs if v is not None])
        after = self._reached(node, lambda n: [r for v in n.outputs for r in v.consumers()])
        return not before or not after

    def _reached(self, node: ir.Node, step: Callable[[ir.Node], Sequence[ir.Node | None]]) -> bool:
        """Whether steps from `node` lead to another site with a constant weight."""
        waiting, seen = list(step(node)), {node}
        while waiting:
            found = waiting.pop()
            if found is None or found in seen:
                continue
            if self._weights.get(found) is not None:
                return True
            seen.add(found)
            waiting += step(found)
        return False

    def _output(self, node: ir.Node) -> ir.Value | None:
        contraction = node.op_type in CONTRACTIONS
        if contraction and (self.fuses or node.op_type in self.capabilities.float_outputs):
            return None
        result = self._after_activation(node.outputs[0])
        if result.is_graph_output():
            raise _No(
                f"its result {value_name(result)} is an output of the program, and the target's "
                f"integer {node.op_type} does not write float"
            )
        return result


def _elements(weight: ir.Value | None) -> int:
    array = laid_out(weight)
    return 0 if array is None else array.size


def value_name(value: ir.Value | None) -> str:
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
        raise _No(f"its weight {value_name(value)} is not a constant")
    if array.dtype != np.float32:
        raise _No(f"its weight {value_name(value)} is {array.dtype}, not float32")
    if node.op_type == "MatMul":
        if array.ndim != 2:
            raise _No(f"its weight {value_name(value)} has {array.ndim} dimensions, not 2")
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
        f"{others[0]!r} reads its weight {value_name(table)} too, which stays in float "
        f"({table.const_value.nbytes} bytes) beside the integers ({table.const_value.size} bytes)"
    )
