"""Channels that pass from weights to weights through positively homogeneous operators alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optcompiler.channels import ChannelGraph, ChannelGroup
from optcompiler.ops.spec import Axis, Channels, Coupling, OpSpec, OpTable
from optcompiler.program import Program, constant
from optcompiler_passes._linear import Linear, input_factors, linear, multiply_inputs, scale_outputs
from optcompiler_passes._regions import is_constant, is_op
from optcompiler_passes._rescaling import mark_rescaled

_THROUGH = frozenset(
    {
        "Abs", "AveragePool", "Concat", "DepthToSpace", "Dropout", "Flatten", "GlobalAveragePool",
        "GlobalMaxPool", "Identity", "LeakyRelu", "MaxPool", "Neg", "PRelu", "ReduceMax",
        "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Reshape", "Slice", "Split", "Squeeze",
        "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""f(s · x) = s · f(x) for s > 0, for every channel that is not summed over."""

_JOINTLY = frozenset({"Add", "Max", "Min", "Sub", "Sum"})
"""The same where all operands are multiplied by s."""

_SINGLY = frozenset({"Div", "MatMul", "Mul"})
"""The same where one operand is."""

_NORMALIZATIONS = {
    "BatchNormalization": 1, "InstanceNormalization": 1, "LayerNormalization": -1,
    "RMSNormalization": -1,
}  # fmt: skip
"""Axis of the output along which gamma and beta lie."""


class _Homogeneous(OpTable):
    """Channel rules of another meaning: which channels have to be multiplied by the same factor.

    What a node states fixes every axis that it does not let pass. An axis of its output is
    *produced* where constants of the node can be divided by the factor, an axis of its input is
    *reduced* where they can be multiplied by it. A depthwise Conv and a Mul by a vector do both,
    which parts what is before them from what is behind.
    """

    def __init__(self, ops: OpTable) -> None:
        super().__init__(())
        self.ops = ops

    def get(self, node: ir.Node) -> OpSpec | None:
        known = self.ops.get(node)
        torch, cost = (known.torch, known.cost) if known is not None else (_nothing, _nothing)
        return OpSpec(node.op_type, torch, cost, channels=self._rule, domain=node.domain)  # type: ignore[arg-type]

    def _rule(self, node: ir.Node) -> Channels:
        if node.domain != "":
            return Channels()
        contraction = linear(node) if not is_op(node, "Add") else None
        if isinstance(contraction, Linear):
            return self._contraction(node, contraction)
        if node.op_type in _NORMALIZATIONS:
            return _normalization(node)
        if node.op_type in _THROUGH or (node.op_type in ("Pad", "Clip") and _keeps_zero(node)):
            operands = node.inputs if is_op(node, "Concat") else node.inputs[:1]
            return Channels(tuple(self._from(node, operands)))
        if node.op_type in _JOINTLY:
            return Channels(tuple(self._jointly(node)))
        if node.op_type in _SINGLY:
            return self._singly(node)
        return Channels()

    def _stated(self, node: ir.Node) -> Iterable[Coupling]:
        spec = self.ops.get(node)
        rule = spec.channels(node) if spec is not None and spec.channels is not None else None
        return rule.couplings if rule is not None else ()

    def _from(self, node: ir.Node, operands: Sequence[ir.Value | None]) -> Iterator[Coupling]:
        """Couplings between some operands and results."""
        for c in self._stated(node):
            ends = (c.source.value, c.target.value)
            if any(v in operands for v in ends) and any(v in node.outputs for v in ends):
                yield c

    def _jointly(self, node: ir.Node) -> Iterator[Coupling]:
        """Couplings of axes along which no operand but zero is stretched."""
        scaled = [v for v in node.inputs if v is not None and not _is_zero(v)]
        found = list(self._from(node, scaled))
        for c in found:
            if {o.source.value for o in found if o.target == c.target} >= set(scaled):
                yield c

    def _singly(self, node: ir.Node) -> Channels:
        couplings: list[Coupling] = []
        produced: list[Axis] = []
        reduced: list[Axis] = []
        out = node.outputs[0]
        found = list(self._from(node, node.inputs))
        if len(set(node.inputs)) < len(node.inputs):
            return Channels()
        for c in found:
            along = {o.source.value: o for o in found if o.target == c.target}
            constants = [v for v in along if is_constant(v)]
            if len(along) == 1 and not constants:
                if not is_op(node, "Div") or c.source.value is node.inputs[0]:
                    couplings.append(c)
            elif is_op(node, "Mul") and len(along) == 2 and len(constants) == 1:
                if not _is_vector(constants[0], c.target.axis, out) or len(constants[0].uses()) > 1:
                    continue
                data = next(v for v in along if v is not constants[0])
                if c.target not in produced:
                    produced.append(c.target)
                    reduced.append(along[data].source)
        return Channels(tuple(couplings), tuple(produced), tuple(reduced))

    def _contraction(self, node: ir.Node, found: Linear) -> Channels:
        data, out = node.inputs[0], node.outputs[0]
        own = [found.weight, *([found.bias] if found.bias is not None else [])]
        shared = any(len(v.uses()) > 1 or v.is_graph_output() for v in own)
        if data is None or data.shape is None or shared or is_constant(data):
            return Channels()
        if is_op(node, "Gemm") and node.attributes.get_int("transA", 0):
            return Channels()
        axis = len(data.shape) - 1 if is_op(node, "MatMul") else 1
        passed: list[Coupling] = []
        if is_op(node, "MatMul"):
            passed = [
                c for c in self._from(node, [data])
                if c.target.axis != found.axis and c.source.axis != axis
            ]  # fmt: skip
        return Channels(tuple(passed), (Axis(out, found.axis),), (Axis(data, axis),))


def _nothing(*_: object) -> None:
    return None


def _normalization(node: ir.Node) -> Channels:
    out = node.outputs[0]
    gamma, *beta = node.inputs[1:3]
    if out.shape is None or gamma is None or len(node.outputs) > 1:
        return Channels()
    own = [gamma, *(v for v in beta if v is not None)]
    arrays = [constant(v) for v in own]
    if any(a is None or a.ndim != 1 for a in arrays) or any(len(v.uses()) > 1 for v in own):
        return Channels()
    axis = _NORMALIZATIONS[node.op_type] % len(out.shape)
    last = node.attributes.get_int("axis", -1) % len(out.shape)
    if axis != 1 and last != axis:
        return Channels()
    return Channels((), (Axis(out, axis),))


def _keeps_zero(node: ir.Node) -> bool:
    """Whether a Pad or Clip is homogeneous: it fills with zeros, or has no bound but zero."""
    if node.op_type == "Clip":
        if {"min", "max"} & set(node.attributes):
            return False
        return all(v is None or _is_zero(v) for v in node.inputs[1:])
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    if mode != "constant":
        return True
    value = node.inputs[2] if len(node.inputs) > 2 else None
    return "value" not in node.attributes and (value is None or _is_zero(value))


def _is_zero(value: ir.Value | None) -> bool:
    array = constant(value)
    return array is not None and not array.any()


def _is_vector(value: ir.Value, axis: int, out: ir.Value) -> bool:
    """Whether a constant differs along this axis of the result only."""
    array = constant(value)
    if array is None or out.shape is None:
        return False
    mine = axis - (len(out.shape) - array.ndim)
    return mine >= 0 and array.shape[mine] == array.size


# -- groups ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reader:
    """A node that multiplies channels by weights: `channel_of` gives the channel of each index
    along axis `axis` of its operand `operand`, -1 for those of other groups."""

    node: ir.Node
    operand: int
    axis: int
    channel_of: np.ndarray

    @property
    def value(self) -> ir.Value:
        value = self.node.inputs[self.operand]
        assert value is not None
        return value


class Scaling:
    """The channel groups of a float program that may be scaled, and scaling them.

    Vectors that several nodes read have to be copied first (`channels.unshare_vectors`).
    """

    def __init__(self, program: Program, ops: OpTable) -> None:
        self.program = program
        self.graph = ChannelGraph(program, _Homogeneous(ops))
        self.values = {str(v.name): v for v in program.graph.initializers.values()}
        self.values |= {str(v.name): v for node in program.graph for v in node.outputs}

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """All groups that something reads, those that cannot be scaled (`pinned`) included."""
        return tuple(g for g in self.graph.groups if g.consumers)

    def readers(self, group: ChannelGroup) -> list[Reader]:
        """The nodes whose weights make up for scales of the group, in graph order."""
        found: list[Reader] = []
        for name in group.consumers:
            node = self.program.node(name)
            assert node is not None
            for axis in self.graph.rules[name].reduced:
                member = group.member(axis.value, axis.axis)
                if member is not None:
                    operand = node.inputs.index(axis.value)
                    found.append(Reader(node, operand, axis.axis, member.channel_of))
        return found

    def scale(self, group: ChannelGroup, factors: np.ndarray) -> None:
        """Divide the channels of a group by `factors` [channels] > 0, and multiply by them where
        the channels are read: the program computes what it did. Raises `Declined` where a weight
        would not be finite.
        """
        for member in group.members:
            value = self.values[member.value]
            array = constant(value)
            if array is not None:
                divided = array / _along(spread_out(member.channel_of, factors), member.axis, array)
                self.program.set_weight(value, divided.astype(array.dtype))
        for name in group.producers:
            for axis in self.graph.rules[name].produced:
                member = group.member(axis.value, axis.axis)
                if member is not None:
                    node = self.program.node(name)
                    assert node is not None
                    self._produce(node, 1 / spread_out(member.channel_of, factors))
        for reader in self.readers(group):
            mine = spread_out(reader.channel_of, factors)
            found = linear(reader.node)
            if isinstance(found, Linear):
                multiply_inputs(self.program, found, mine)
            else:
                self._multiply_vector(reader.node, mine)

    def _produce(self, node: ir.Node, factors: np.ndarray) -> None:
        found = linear(node)
        if isinstance(found, Linear):
            scale_outputs(self.program, found, factors, None)
        elif node.op_type in _NORMALIZATIONS:
            for value in node.inputs[1:3]:
                if value is not None:
                    self._multiply(value, factors)
        else:
            self._multiply_vector(node, factors)

    def _multiply_vector(self, node: ir.Node, factors: np.ndarray) -> None:
        value = next(v for v in node.inputs if v is not None and is_constant(v))
        self._multiply(value, factors)

    def _multiply(self, value: ir.Value, factors: np.ndarray) -> None:
        array = constant(value)
        assert array is not None
        self.program.set_weight(value, (array * factors.reshape(array.shape)).astype(array.dtype))


def multiplied(node: ir.Node, factors: np.ndarray) -> np.ndarray:
    """The weight or vector of a reader when its input channels are multiplied by `factors`."""
    found = linear(node)
    if isinstance(found, Linear):
        array = constant(found.weight)
        assert array is not None
        return (array * input_factors(found, factors)).astype(np.float32)
    array = next(a for v in node.inputs if (a := constant(v)) is not None)
    return (array * factors.reshape(array.shape)).astype(np.float32)


def mark_group(program: Program, group: ChannelGroup, factors: np.ndarray) -> None:
    """Record on the values of a group that their channels were divided by `factors`."""
    for member in group.members:
        value = program.value(member.value)
        if value is not None and not value.is_initializer():
            mark_rescaled(value, member.axis, spread_out(member.channel_of, factors))


def spread_out(channel_of: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The factor of each index, 1 for channels of other groups."""
    return np.where(channel_of >= 0, factors[channel_of], 1.0)


def _along(vector: np.ndarray, axis: int, array: np.ndarray) -> np.ndarray:
    return vector.reshape([-1 if i == axis else 1 for i in range(array.ndim)])
