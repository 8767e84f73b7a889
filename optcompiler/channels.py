"""Which channels of a program must leave together, and taking them out.

The axes of all values are nodes of a `networkx` graph and the couplings that the operators state
are its edges (Fang et al., DepGraph, CVPR 2023). Within a connected component single indices are
tied by the index maps of the couplings; indices tied to one another are one *channel*, and the
channels that touch the same axes are one *group*. So concatenated branches fall into groups of
their own, the branches of a residual sum into one, and a flattened channel is a block of indices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import onnx_ir as ir

from optcompiler.errors import Declined, VerificationError
from optcompiler.ops.spec import Axis, Channels, Coupling, OpTable, attributes_of
from optcompiler.program import Program, constant, consumed

Key = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one value that shrinks with its group.

    `channel_of[i]` is the group's channel that index `i` belongs to, -1 where it is another's.
    """

    value: str
    axis: int
    channel_of: np.ndarray

    def indices(self, channels: Iterable[int]) -> np.ndarray:
        """Indices along the axis that the given channels of the group occupy, ascending."""
        return np.flatnonzero(np.isin(self.channel_of, np.fromiter(channels, np.int64)))


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that touch the same axes, any of which can leave on its own.

    `name` is the first node, in graph order, whose weights make the channels (with `#2`, `#3`, …
    when it makes several groups). `members` are all axes that shrink, `producers` the nodes whose
    weights make the channels, `consumers` those that sum over them. `rows` is how many rows of the
    first producer's weights one channel takes (a head takes several). `pinned` says why the group
    cannot shrink, "" when it can. `exact` says that removing a channel equals zeroing it where
    it is consumed: no member is normalised over.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    rows: int
    pinned: str
    exact: bool

    def member(self, value: ir.Value | None, axis: int) -> Member | None:
        """The member at this axis of this value, or None."""
        name = None if value is None else value.name
        return next((m for m in self.members if (m.value, m.axis) == (name, axis)), None)

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for groups with the same name, members and index maps."""
        return (
            self.name,
            self.channels,
            tuple((m.value, m.axis, m.channel_of.tobytes()) for m in self.members),
        )


class ChannelGraph:
    """The channel groups of a program under an operator table.

    `axes` is the `networkx.MultiGraph` of `(value name, axis)` with the couplings on its edges
    and the number of channels that each ties; an axis with a symbolic extent is no part of it.
    `summed` has the nodes that sum over an axis. An operator without a channel rule pins all its
    axes, and so do the inputs and outputs of the program.
    """

    def __init__(self, program: Program, ops: OpTable) -> None:
        self.program = program
        self.axes: nx.MultiGraph[Key] = nx.MultiGraph()
        self.rules: dict[str, Channels] = {}
        self._values: dict[str, ir.Value] = {}
        self._pins: dict[Key, str] = {}
        self._made: dict[Key, list[str]] = {}
        self.summed: dict[Key, list[str]] = {}
        self._normalised: set[Key] = set()
        for node in program.graph:
            self._add(node, ops)
        for value in program.graph.inputs:
            self._pin(value, f"reaches input {value.name!r}")
        for value in program.graph.outputs:
            self._pin(value, f"reaches output {value.name!r}")
        self._order = {str(n.name): i for i, n in enumerate(program.graph)}

    @functools.cached_property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """All groups in graph order of their first producers."""
        return tuple(self._named(nx.connected_components(self.axes)))

    def group(self, name: str) -> ChannelGroup | None:
        """The group with this name, or None; looks at the axes that it may hang together with."""
        producer = name.partition("#")[0]
        mine = [k for k, nodes in self._made.items() if producer in nodes]
        near = {frozenset(nx.node_connected_component(self.axes, k)) for k in mine}
        return next((g for g in self._named(near) if g.name == name), None)

    def consumed(self, group: ChannelGroup, node: ir.Node) -> Member | None:
        """The group's member on the first operand of a node that sums over it, or None."""
        rule = self.rules.get(str(node.name))
        for axis in rule.reduced if rule is not None else ():
            if axis.value is node.inputs[0]:
                return group.member(axis.value, axis.axis)
        return None

    # -- the graph of axes ------------------------------------------------------------------

    def _add(self, node: ir.Node, ops: OpTable) -> None:
        label = f"{node.op_type} {node.name!r}"
        touched = [v for v in (*consumed(node), *node.outputs) if v.name]
        for value in touched:
            self._values.setdefault(str(value.name), value)
            for axis in range(_rank(value)):
                if _extent(Axis(value, axis)) is not None:
                    self.axes.add_node((str(value.name), axis))
        spec = ops.get(node)
        rule = spec.channels(node) if spec is not None and spec.channels is not None else None
        shapeless = next((v.name for v in touched if v.shape is None), None)
        if rule is None or shapeless is not None:
            states = f"has {shapeless!r} of unknown shape" if shapeless else "states no channels"
            for value in touched:
                self._pin(value, f"{label} {states}")
            return
        self.rules[str(node.name)] = rule
        loose: set[Key] = set()
        for coupling in rule.couplings:
            if self._couple(coupling):
                loose |= {_key(coupling.source), _key(coupling.target)}
        for axes, where in ((rule.produced, self._made), (rule.reduced, self.summed)):
            for axis in axes:
                where.setdefault(_key(axis), []).append(str(node.name))
                loose.add(_key(axis))
        self._normalised |= {_key(a) for a in rule.normalised}
        for value in touched:
            for axis in range(_rank(value)):
                if (value.name, axis) not in loose:
                    reason = f"axis {axis} of {value.name!r} is fixed by {label}"
                    self._pins.setdefault((str(value.name), axis), reason)

    def _couple(self, coupling: Coupling) -> bool:
        source, target = _extent(coupling.source), _extent(coupling.target)
        if source is None or target is None:
            for axis in (coupling.source, coupling.target):
                reason = f"axis {axis.axis} of {axis.value.name!r} meets an unknown extent"
                self._pins.setdefault(_key(axis), reason)
            return False
        count = coupling.count if coupling.count >= 0 else source - coupling.source_offset
        if coupling.source_offset + count > source:
            return False
        if coupling.target_offset + count * coupling.repeat > target:
            return False
        edge = (coupling, count)
        self.axes.add_edge(_key(coupling.source), _key(coupling.target), coupling=edge)
        return True

    def _pin(self, value: ir.Value, reason: str) -> None:
        for axis in range(_rank(value)):
            self._pins[str(value.name), axis] = reason

    # -- groups -----------------------------------------------------------------------------

    def _named(self, components: Iterable[Iterable[Key]]) -> Iterator[ChannelGroup]:
        order = self._order
        found: list[tuple[list[str], np.ndarray, list[Member]]] = []
        for component in map(frozenset, components):
            if any(key in self._made for key in component):
                found += self._split(component)
        found.sort(key=lambda item: (order[item[0][0]], int(np.argmax(item[1] >= 0))))
        seen: dict[str, int] = {}
        for producers, rows, members in found:
            first = producers[0]
            seen[first] = seen.get(first, 0) + 1
            keys = [(m.value, m.axis) for m in members]
            consumers = dict.fromkeys(n for k in keys for n in self.summed.get(k, ()))
            reasons = [self._pins[k] for k in keys if k in self._pins]
            reasons.sort(key=lambda r: not r.startswith("reaches"))
            channels = int(members[0].channel_of.max()) + 1
            if channels == 1:
                reasons.append("it is a single channel")
            yield ChannelGroup(
                name=first if seen[first] == 1 else f"{first}#{seen[first]}",
                channels=channels,
                members=tuple(members),
                producers=tuple(producers),
                consumers=tuple(sorted(consumers, key=order.__getitem__)),
                rows=int(np.sum(rows == 0)),
                pinned=reasons[0] if reasons else "",
                exact=self._normalised.isdisjoint(keys),
            )

    def _split(
        self, component: frozenset[Key]
    ) -> Iterator[tuple[list[str], np.ndarray, list[Member]]]:
        """Groups of one component: (producers, channels by row of the first one, members)."""
        keys = sorted(component)
        extents = [int(_extent(Axis(self._values[v], a)) or 0) for v, a in keys]
        starts = dict(zip(keys, np.cumsum([0, *extents]).tolist(), strict=False))
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        edges: Iterable[tuple[Key, Key, tuple[Coupling, int]]]
        edges = self.axes.edges(keys, data="coupling")
        for _, _, (coupling, count) in edges:
            source, target = starts[_key(coupling.source)], starts[_key(coupling.target)]
            first = np.arange(count) + source + coupling.source_offset
            second = np.arange(count * coupling.repeat) + target + coupling.target_offset
            pairs.append((np.repeat(first, coupling.repeat), second))
        label = _connected(sum(extents), pairs)
        roots, channel = np.unique(label, return_inverse=True)
        touches = np.zeros((len(roots), len(keys)), np.bool_)
        for k, key in enumerate(keys):
            touches[channel[starts[key] : starts[key] + extents[k]], k] = True
        packed, kind = np.unique(np.packbits(touches, axis=1), axis=0, return_inverse=True)
        kind = kind.reshape(-1)
        for group in range(len(packed)):
            mine = np.flatnonzero(kind == group)
            held = [k for k in range(len(keys)) if touches[mine[0], k]]
            makers = {n for k in held for n in self._made.get(keys[k], ())}
            if not makers:
                continue
            producers = sorted(makers, key=self._order.__getitem__)
            made_at = next(k for k in held if producers[0] in self._made.get(keys[k], ()))
            span = channel[starts[keys[made_at]] :][: extents[made_at]]
            numbers = np.full(len(roots), -1)
            ordered = list(dict.fromkeys(c for c in span.tolist() if kind[c] == group))
            numbers[ordered] = np.arange(len(ordered))
            members = [
                Member(*keys[k], numbers[channel[starts[keys[k]] :][: extents[k]]]) for k in held
            ]
            yield producers, numbers[span], members

    # -- editing ----------------------------------------------------------------------------

    def remove(self, group: ChannelGroup, channels: Sequence[int]) -> None:
        """Take channels of a group of this graph out of its program, for good: see `remove_all`."""
        self.remove_all([(group, channels)])

    def remove_all(self, leaving: Sequence[tuple[ChannelGroup, Sequence[int]]]) -> None:
        """Take channels of groups of this graph out of its program, for good.

        Edits initializers, shape constants and what nodes state about the shrunk axes; infers
        shapes and verifies. Names stay, and weights outside the groups are untouched. The graph is
        stale afterwards. Raises `Declined` for a pinned group, a channel that its group does not
        have, when nothing would be left of one, or when what is left is not valid.
        """
        cuts: dict[Key, np.ndarray] = {}
        for group, channels in leaving:
            gone = _removable(group, channels)
            for m in group.members:
                others = cuts.get((m.value, m.axis), np.zeros(0, np.int64))
                cuts[m.value, m.axis] = np.union1d(others, m.indices(gone))
        touching: dict[str, dict[Axis, int]] = {}
        for (name, axis), indices in cuts.items():
            value = self._values[name]
            left = (_extent(Axis(value, axis)) or 0) - len(indices)
            readers = [n for n, _ in value.uses()]
            for node in dict.fromkeys((value.producer(), *readers)):
                if node is not None:
                    touching.setdefault(str(node.name), {})[Axis(value, axis)] = left
        before = self.program.inputs, self.program.outputs
        for node in self.program.graph:
            rule, local = self.rules.get(str(node.name)), touching.get(str(node.name))
            if rule is not None and rule.repair is not None and local:
                rule.repair(self.program, node, local)
        for (name, axis), indices in cuts.items():
            weight = constant(self._values[name])
            if weight is not None:
                self.program.set_weight(self._values[name], np.delete(weight, indices, axis))
        labels = ", ".join(repr(group.name) for group, _ in leaving)
        try:
            self.program.infer_shapes()
            self.program.verify()
        except VerificationError as error:
            raise Declined(f"without channels of {labels}, {error}") from error
        if before != (self.program.inputs, self.program.outputs):
            raise Declined(f"removing channels of {labels} changes the interface.")


def _removable(group: ChannelGroup, channels: Sequence[int]) -> list[int]:
    gone = sorted(set(channels))
    if group.pinned:
        raise Declined(f"channels of {group.name!r} cannot shrink: {group.pinned}.")
    if gone and (gone[0] < 0 or gone[-1] >= group.channels):
        raise Declined(f"{group.name!r} has {group.channels} channels, asked for {gone}.")
    if len(gone) >= group.channels:
        raise Declined(f"all {group.channels} channels of {group.name!r} would go; keep one.")
    return gone


MakeUp = Callable[[ChannelGraph, ChannelGroup], Mapping[str, np.ndarray]]


def remove_channels(
    program: Program,
    ops: OpTable,
    group: ChannelGroup,
    channels: Sequence[int],
    make_up: MakeUp | None = None,
) -> None:
    """Take channels out of the group of `program` that is the same as `group`.

    `group` may come from an earlier state of the program. `make_up` is called with the group as it
    is now, may change weights, and gives by consumer the value that each input channel stands for:
    what the leaving ones contributed goes to the consumer's bias (see `absorb`). Raises `Declined`
    when the program has no such group any more, or one of other channels.
    """
    remove_all_channels(program, ops, [(group, channels, make_up)])


def remove_all_channels(
    program: Program,
    ops: OpTable,
    leaving: Sequence[tuple[ChannelGroup, Sequence[int], MakeUp | None]],
) -> None:
    """As `remove_channels`, for several groups at once."""
    unshare_vectors(program)
    graph = ChannelGraph(program, ops)
    before = len(program.graph.initializers), len(program.graph)
    groups = _same_groups(graph, [group for group, *_ in leaving])
    for now, (_, channels, make_up) in zip(groups, leaving, strict=True):
        for name, values in (make_up(graph, now) if make_up is not None else {}).items():
            node = program.node(name)
            member = graph.consumed(now, node) if node is not None else None
            assert node is not None
            assert member is not None
            gone = np.isin(member.channel_of, channels)
            if np.any(values[gone]):
                absorb(program, node, np.where(gone, values, 0.0))
    if before != (len(program.graph.initializers), len(program.graph)):
        # A bias that a consumer got may shrink with this very group, as in a residual block.
        graph = ChannelGraph(program, ops)
        groups = _same_groups(graph, groups)
    graph.remove_all([(now, c) for now, (_, c, _) in zip(groups, leaving, strict=True)])


def _same_groups(graph: ChannelGraph, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """As `same_group`, for several; all groups of the graph are looked at when they are many."""
    if len(groups) == 1:
        return [same_group(graph, groups[0])]
    known = {g.name: g for g in graph.groups}
    return [_require_same(known.get(g.name), g) for g in groups]


def unshare_vectors(program: Program) -> None:
    """Give each node its own copy of a floating-point vector that several use.

    Exporters store equal tensors once. Zero biases would tie layers that have nothing else in
    common; matrices are shared on purpose and stay so.
    """
    for value in list(program.graph.initializers.values()):
        tensor, users = value.const_value, list(value.uses())
        if tensor is None or len(users) < 2 or not ir.DataType(tensor.dtype).is_floating_point():
            continue
        if tensor.size < 2 or max(tensor.shape.numpy()) != tensor.size:
            continue
        for use in users[1:]:
            copy = ir.tensor(tensor.numpy(), dtype=tensor.dtype)
            use.node.replace_input_with(use.idx, program.add_weight(str(value.name), copy))


def same_group(graph: ChannelGraph, group: ChannelGroup) -> ChannelGroup:
    """The group of `graph` that `group` of an earlier state still is; raises `Declined` if none."""
    return _require_same(graph.group(group.name), group)


def _require_same(now: ChannelGroup | None, group: ChannelGroup) -> ChannelGroup:
    if now is None:
        raise Declined(f"the channel group {group.name!r} is gone.")
    if now.channels != group.channels or now.producers != group.producers:
        raise Declined(
            f"the channel group {group.name!r} changed: it had {group.channels} channels made by "
            f"{', '.join(group.producers)}, and has {now.channels} by {', '.join(now.producers)}."
        )
    return now


# -- constants that channels leave behind --------------------------------------------------------


def absorb_obstacle(node: ir.Node) -> str:
    """Why `absorb` cannot work on a node, "" when it can."""
    label = f"{node.op_type} {node.name!r}"
    weight, bias = node.inputs[1] if len(node.inputs) > 1 else None, None
    if node.op_type not in ("Conv", "Gemm", "MatMul") or weight is None:
        return f"{label} has no bias to hold a constant"
    if node.op_type != "MatMul" and len(node.inputs) > 2:
        bias = node.inputs[2]
    if weight.const_value is None or (bias is not None and bias.const_value is None):
        return f"{label} has a weight or a bias that is computed"
    if node.op_type == "Gemm" and attributes_of(node)["transA"]:
        return f"{label} transposes its input"
    if node.op_type == "MatMul" and (
        weight.shape is None or len(weight.shape) != 2 or node.outputs[0].is_graph_output()
    ):
        return f"{label} has no place for a bias"
    return ""


def absorb(program: Program, node: ir.Node, constants: np.ndarray) -> None:
    """Add what constant input channels contribute to a node's output to its bias.

    `constants` holds one value per input channel, 0 for those to leave alone; the weights of the
    others are not changed here. Exact where every position of the channel holds the constant, so
    not at the border of a padded Conv. A node without a bias gets one, a MatMul an Add. Raises
    `Declined` for the nodes that `absorb_obstacle` names.
    """
    obstacle = absorb_obstacle(node)
    if obstacle:
        raise Declined(f"{obstacle}.")
    stored = constant(node.inputs[1])
    assert stored is not None
    weight = stored.astype(np.float64)
    attributes = attributes_of(node)
    if node.op_type == "Conv":
        groups = int(attributes["group"])
        taps = weight.reshape(*weight.shape[:2], -1).sum(axis=2)
        taps = taps.reshape(groups, -1, weight.shape[1])
        shift = np.einsum("goc,gc->go", taps, constants.reshape(groups, -1)).reshape(-1)
        _shift_operand(program, node, 2, shift, stored.dtype)
    elif node.op_type == "Gemm":
        matrix = weight.T if attributes["transB"] else weight
        shift = float(attributes["alpha"]) * (constants @ matrix)
        absent = len(node.inputs) < 3 or node.inputs[2] is None
        if absent or attributes["beta"] == 0:
            node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
            _set_operand(program, node, 2, shift.astype(stored.dtype))
        else:
            _shift_operand(program, node, 2, shift / float(attributes["beta"]), stored.dtype)
    else:
        _shift_matmul(program, node, constants @ weight, stored.dtype)


def reroute(
    program: Program, node: ir.Node, leaving: np.ndarray, staying: np.ndarray, mixing: np.ndarray
) -> bool:
    """Let staying input channels of a node stand in for leaving ones, in its weights.

    `leaving` [R] and `staying` [K] are indices of input channels; channel `leaving[r]` is taken to
    be the sum of the staying ones weighted by `mixing[r]` [R, K]. Returns False, changing nothing,
    for a grouped Conv and for weights that other nodes use.
    """
    weight = node.inputs[1]
    attributes = attributes_of(node)
    stored = constant(weight)
    if weight is None or stored is None or len(tuple(weight.uses())) > 1:
        return False
    if attributes.get("group", 1) != 1:
        return False
    rows_last = node.op_type == "Conv" or bool(attributes.get("transB"))
    inputs_first = np.array(np.swapaxes(stored, 0, 1) if rows_last else stored, np.float64)
    inputs_first[staying] += np.tensordot(mixing.T, inputs_first[leaving], 1)
    changed = np.swapaxes(inputs_first, 0, 1) if rows_last else inputs_first
    program.set_weight(weight, np.ascontiguousarray(changed, stored.dtype))
    return True


def _shift_matmul(program: Program, node: ir.Node, shift: np.ndarray, dtype: np.dtype[Any]) -> None:
    out = node.outputs[0]
    users = list(out.uses())
    if len(users) == 1 and users[0].node.op_type == "Add":
        add, other = users[0].node, 1 - users[0].idx
        bias = constant(add.inputs[other])
        if bias is not None and bias.ndim <= _rank(out):
            _shift_operand(program, add, other, shift, dtype)
            return
    bias = program.add_weight(f"{node.name}.bias", shift.astype(dtype))
    result = ir.val(program.fresh_name(f"{out.name}.biased"), dtype=out.dtype, shape=out.shape)
    add = ir.Node(
        "", "Add", [out, bias], outputs=[result], name=program.fresh_name(f"{node.name}.add")
    )
    for use in users:
        use.node.replace_input_with(use.idx, result)
    program.graph.insert_after(node, add)


def _shift_operand(
    program: Program, node: ir.Node, index: int, shift: np.ndarray, dtype: np.dtype[Any]
) -> None:
    held = constant(node.inputs[index]) if index < len(node.inputs) else None
    total = shift if held is None else held.astype(np.float64) + shift
    _set_operand(program, node, index, total.astype(dtype))


def _set_operand(program: Program, node: ir.Node, index: int, array: np.ndarray) -> None:
    held = node.inputs[index] if index < len(node.inputs) else None
    if held is not None and len(tuple(held.uses())) == 1:
        program.set_weight(held, array)
        return
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, program.add_weight(f"{node.name}.bias", array))


def _key(axis: Axis) -> Key:
    return (str(axis.value.name), axis.axis)


def _rank(value: ir.Value) -> int:
    return 0 if value.shape is None else len(value.shape)


def _extent(axis: Axis) -> int | None:
    if axis.value.shape is None or not 0 <= axis.axis < len(axis.value.shape):
        return None
    extent = axis.value.shape[axis.axis]
    return extent if isinstance(extent, int) else None


def _connected(count: int, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The least index of each one's connected component, by minimum labels and pointer jumping."""
    label = np.arange(count)
    if not pairs:
        return label
    first = np.concatenate([p[0] for p in pairs])
    second = np.concatenate([p[1] for p in pairs])
    while True:
        least = np.minimum(label[first], label[second])
        fresh = label.copy()
        for ends in (first, second):
            np.minimum.at(fresh, label[ends], least)
            np.minimum.at(fresh, ends, least)
        while not np.array_equal(fresh, jumped := fresh[fresh]):
            fresh = jumped
        if np.array_equal(fresh, label):
            return label
        label = fresh
