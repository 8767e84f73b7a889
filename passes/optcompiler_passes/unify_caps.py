"""One upper bound for all channels, in place of one for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from optcompiler.channels import ChannelGroup, unshare_vectors
from optcompiler.ops.spec import OpTable
from optcompiler.program import Program, constant
from optcompiler.rewriting import Candidate, Decline, Declined, Pass, PassContext, Stage
from optcompiler_passes._homogeneous import Scaling, mark_group
from optcompiler_passes._regions import is_op

CLIP_WITH_OPERANDS = 11
"""Operator set from which on Clip takes its bounds as operands."""

EQUAL = 1e-5
"""Greatest relative difference between caps that rounding alone is taken for."""

SPAN = 2.0**16
"""Greatest ratio of two caps of a group."""


@dataclass(frozen=True)
class UnifyCaps(Pass):
    """Scale channels that have caps of their own until one Clip serves them all.

        y = Conv(x, w, b)                             y' = Conv(x, w / s, b / s)
        r = Relu(y)                              →    m' = Clip(y', 0, c)
        m = Min(r, caps)                              z  = Conv(m', v · s)
        z = Conv(m, v)

    with s = caps / c, and c the geometric mean of the caps. ReLU6 looks like this after its
    channels were scaled (by cross-layer equalisation, say). Kernels fuse a Clip, and the channels
    share a range again, as quantisation per tensor wants them to.

    1. A cap is a Min of a positive constant that differs along one axis, in either operand, and a
       Relu or Max(…, 0) that nothing else reads.
    2. Its channels pass from weights to weights through positively homogeneous operators alone (see
       `equalize`); all caps on the way must become equal at once.
    3. Caps that are all equal to begin with become a Clip without scaling.
    4. The Min keeps its name, and so does its result.
    """

    name: ClassVar[str] = "unify-caps"
    stage: ClassVar[Stage] = Stage.CLEAN
    after: ClassVar[tuple[str, ...]] = ("simplify", "fold-batchnorm")
    summary: ClassVar[str] = "scale channels until one Clip serves where each had a bound"

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate | Decline]:
        caps = [c for node in program.graph if (c := cap_of(node)) is not None]
        if not caps or program.opset < CLIP_WITH_OPERANDS:
            return
        plain = program.clone()
        unshare_vectors(plain)
        served = {str(c.node.name) for c in caps if c.even}
        refused = {
            str(c.node.name): "its channels do not come from weights" for c in caps if not c.even
        }
        for _, names, factors in _capped(Scaling(plain, context.ops)):
            for name in names:
                if isinstance(factors, str):
                    refused[name] = factors
                else:
                    served.add(name)
        for name, reason in refused.items():
            if name not in served:
                yield Decline(name, reason, (name,))
        if served:
            names = tuple(str(c.node.name) for c in caps if c.node.name in served)
            yield Candidate(
                "program", "one cap", lambda copy: unify_caps(copy, context.ops), exact=True,
                nodes=names, note=f"{len(names)} nodes Min",
            )  # fmt: skip


@dataclass(frozen=True)
class Cap:
    """A Min of `source`, made not negative, and positive `caps`."""

    node: ir.Node
    data: ir.Value
    source: ir.Value
    caps: ir.Value

    @property
    def array(self) -> np.ndarray:
        array = constant(self.caps)
        assert array is not None
        return array

    @property
    def even(self) -> bool:
        return bool(np.ptp(self.array) <= EQUAL * self.array.max())


def cap_of(node: ir.Node) -> Cap | None:
    """What a node caps; None for another node."""
    if not is_op(node, "Min") or len(node.inputs) != 2:
        return None
    for data, caps in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        array = constant(caps)
        if data is None or caps is None or array is None or constant(data) is not None:
            continue
        source = _rectified(data)
        alone = len(data.uses()) == 1 and not data.is_graph_output()
        vector = array.size > 0 and max(array.shape, default=1) == array.size
        if source is None or not alone or not vector or not (array > 0).all():
            continue
        if source.shape is not None and node.outputs[0].shape == source.shape:
            return Cap(node, data, source, caps)
    return None


def _rectified(value: ir.Value) -> ir.Value | None:
    """x where `value` is Relu(x) or Max(x, 0)."""
    node = value.producer()
    if node is not None and is_op(node, "Relu"):
        return node.inputs[0]
    if node is None or not is_op(node, "Max") or len(node.inputs) != 2:
        return None
    for data, zero in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        array = constant(zero)
        if data is not None and array is not None and array.size == 1 and not array.any():
            return data
    return None


def _capped(scaling: Scaling) -> Iterator[tuple[ChannelGroup, list[str], np.ndarray | str]]:
    """Groups with caps that differ, the Min nodes, and factors that unify them or why none do."""
    caps = [c for node in scaling.program.graph if (c := cap_of(node)) is not None and not c.even]
    for group in scaling.graph.groups:
        factors: np.ndarray | str = group.pinned
        names: list[str] = []
        for cap in caps:
            member = next((m for m in group.members if m.value == cap.caps.name), None)
            if member is None or cap.array.size != len(member.channel_of):
                continue
            names.append(str(cap.node.name))
            if group.pinned:
                continue
            mine = np.zeros(group.channels)
            held = member.channel_of >= 0
            np.maximum.at(mine, member.channel_of[held], cap.array.reshape(-1)[held])
            mine = mine / np.exp(np.log(mine).mean())
            if np.ptp(np.log(mine)) > np.log(SPAN):
                factors = f"its caps differ by more than a factor of {SPAN:g}"
            elif isinstance(factors, str) and not factors:
                factors = mine
            elif not isinstance(factors, str) and not np.allclose(mine, factors, rtol=EQUAL):
                factors = "caps of the same channels have other ratios elsewhere"
        if names:
            yield group, names, factors


def unify_caps(program: Program, ops: OpTable) -> None:
    """Scale the channels of every group that this makes equal caps for, and write Clips."""
    unshare_vectors(program)
    scaling = Scaling(program, ops)
    for group, _, factors in list(_capped(scaling)):
        if not isinstance(factors, str):
            scaling.scale(group, factors)
            mark_group(program, group, factors)
    found = [c for node in program.graph if (c := cap_of(node)) is not None and c.even]
    if not found:
        raise Declined("no caps are left that could be one.")
    for cap in found:
        node, kind = cap.node, cap.array.dtype
        low = program.add_weight(f"{node.name}.low", np.zeros((), kind))
        high = program.add_weight(f"{node.name}.high", np.array(cap.array.max(), kind))
        maker = cap.data.producer()
        node.op_type = "Clip"
        node.resize_inputs(3)
        for index, value in enumerate((cap.source, low, high)):
            node.replace_input_with(index, value)
        if maker is not None:
            program.discard(maker)
