"""prune-dead-channels: take out channels that provably cannot matter."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from optcompiler.channels import (
    ChannelGraph,
    ChannelGroup,
    MakeUp,
    Member,
    absorb_obstacle,
    remove_all_channels,
    remove_channels,
    unshare_vectors,
)
from optcompiler.ops.axes import dims, integers, row_major
from optcompiler.ops.spec import OpTable, attributes_of
from optcompiler.program import Program, constant
from optcompiler.rewriting import Candidate, Decline, Declined, Pass, PassContext, Stage

Interval = tuple[np.ndarray, np.ndarray]
"""Least and greatest value, float64, with the value's rank and extents of 1 where all are alike."""

BLOCK_ELEMENTS = 1 << 20
"""Of a weight that are worked on at once."""


@dataclass(frozen=True)
class PruneDeadChannels(Pass):
    """Remove channels whose removal keeps the function.

        c = Conv(x, w1, b1)      w1[3] = 0, b1[3] = -0.5        c = Conv(x, w1', b1')
        r = Relu(c)                                      →      r = Relu(c)      one channel less
        y = Conv(r, w2, b2)                                     y = Conv(r, w2', b2)

    A channel of a group leaves when every node that sums over it allows it:

    1. all the node's weights for it are zero; or
    2. by interval bounds it holds one constant c everywhere (zero weights upstream, a ReLU or Clip
       that is never active), and c = 0; or
    3. as 2 with c ≠ 0, and the node takes a bias, which takes up c times the weights. A padded
       Conv declines this: at its border the channel is 0, not c.

    Bounds start from nothing known of the inputs. Removing channels may show that others are dead;
    those come as further candidates at site `group@2`, `group@3`, …, which hold once the earlier
    ones are applied. At least one channel of a group stays. Declines groups that reach an input,
    an output or an operator that fixes them, and those normalised over (LayerNormalization), where
    removal changes the statistics.
    """

    name = "prune-dead-channels"
    stage = Stage.CLEAN
    summary = "remove channels that provably cannot matter"
    after = ("simplify", "fold-batchnorm")

    max_rounds: int = 8

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate | Decline]:
        working = program.clone()
        unshare_vectors(working)
        for round_ in range(1, self.max_rounds + 1):
            graph = ChannelGraph(working, context.ops)
            bounds = intervals(working)
            found: list[Candidate] = []
            for group in graph.groups:
                site = group.name if round_ == 1 else f"{group.name}@{round_}"
                outcome = _candidate(graph, group, bounds, site, context.ops, round_)
                if isinstance(outcome, Candidate):
                    found.append(outcome)
                    yield outcome
                elif round_ == 1:
                    yield outcome
            if not found:
                return
            ahead = working.clone()
            try:
                remove_all_dead(ahead, found)
                working = ahead
            except Declined:
                for candidate in found:
                    with contextlib.suppress(Declined):
                        candidate.rewrite(working)


@dataclass(frozen=True)
class Verdict:
    """What the consumers of a group say of it.

    `dead` channels may leave. `leftovers` are the constants that each consumer then takes up, one
    per channel of its input. `obstacles` say what keeps further constant channels.
    """

    dead: tuple[int, ...]
    leftovers: tuple[tuple[str, np.ndarray], ...]
    obstacles: tuple[str, ...]


def _candidate(
    graph: ChannelGraph, group: ChannelGroup, bounds: dict[str, Interval], site: str, ops: OpTable,
    round_: int,
) -> Candidate | Decline:  # fmt: skip
    nodes = (*group.producers, *group.consumers)
    if group.pinned:
        return Decline(site, group.pinned, nodes)
    if not group.exact:
        return Decline(site, "its channels are normalised together", nodes)
    verdict = judge(graph, group, bounds)
    if not verdict.dead:
        return Decline(site, "; ".join(verdict.obstacles) or "no channel is dead", nodes)
    return Candidate(
        site=site,
        choice=f"remove {len(verdict.dead)} of {group.channels} channels",
        rewrite=Removal(ops, group, verdict.dead, round_),
        together=remove_all_dead,
        exact=True,
        nodes=nodes,
        note="; ".join(verdict.obstacles),
        details={"channels": group.channels, "removed": list(verdict.dead)},
    )


@dataclass(frozen=True)
class Removal:
    """Removes channels of a group, after proving again, on the program, that they are dead."""

    ops: OpTable
    group: ChannelGroup
    dead: tuple[int, ...]
    round: int

    def __call__(self, program: Program) -> None:
        remove_channels(program, self.ops, self.group, self.dead, _prover(self.dead, {}))


def remove_all_dead(program: Program, candidates: Sequence[Candidate]) -> None:
    """What the candidates' rewrites do, with one proof and one removal for each round of them."""
    removals = [c.rewrite for c in candidates if isinstance(c.rewrite, Removal)]
    for _, found in itertools.groupby(removals, lambda r: r.round):
        bounds: dict[str, Interval] = {}
        same = list(found)
        leaving = [(r.group, r.dead, _prover(r.dead, bounds)) for r in same]
        remove_all_channels(program, same[0].ops, leaving)


def _prover(dead: Sequence[int], known: dict[str, Interval]) -> MakeUp:
    """Proves that channels are dead. Provers that share `known` work bounds out once, before any
    of their groups gives a constant to a bias, which only takes the place of what it gave."""

    def prove(graph: ChannelGraph, now: ChannelGroup) -> dict[str, np.ndarray]:
        if not known:
            known.update(intervals(graph.program))
        verdict = judge(graph, now, known)
        alive = len(set(dead) - set(verdict.dead))
        if alive:
            raise Declined(f"{alive} of {len(dead)} channels of {now.name!r} are not dead here.")
        return dict(verdict.leftovers)

    return prove


def judge(graph: ChannelGraph, group: ChannelGroup, bounds: dict[str, Interval]) -> Verdict:
    """Which channels of a free group every consumer can do without."""
    dead = np.ones(group.channels, np.bool_)
    leftovers: list[tuple[str, np.ndarray]] = []
    obstacles: list[str] = []
    for name in group.consumers:
        node = graph.program.node(name)
        assert node is not None
        ignored = np.zeros(group.channels, np.bool_)
        for axis in graph.rules[name].reduced:
            member = group.member(axis.value, axis.axis)
            if member is not None:
                ignored |= _vanishing(axis.value, member, group.channels, bounds)
        held, constants = _held(graph, group, node, bounds)
        held &= ~ignored
        obstacle = absorb_obstacle(node)
        if not obstacle and node.op_type == "Conv" and _padded(node):
            obstacle = f"Conv {name!r} has padding"
        if obstacle and held.any():
            member = graph.consumed(group, node)
            assert member is not None
            first = float(constants[member.indices([int(np.flatnonzero(held)[0])])[0]])
            obstacles.append(
                f"consumer {obstacle}, and the constant is {first:.4g}"
                f" for {int(held.sum())} channels"
            )
        elif held.any():
            leftovers.append((name, np.nan_to_num(constants)))
            ignored |= held
        dead &= ignored
    if dead.all():
        dead[0] = False
    channels = tuple(np.flatnonzero(dead).tolist())
    return Verdict(channels, tuple(leftovers) if channels else (), tuple(obstacles))


def _vanishing(
    value: ir.Value, member: Member, channels: int, bounds: dict[str, Interval]
) -> np.ndarray:
    """Channels for which an operand that is summed over holds nothing but zeros."""
    weight = constant(value)
    if weight is not None:
        rest = tuple(k for k in range(weight.ndim) if k != member.axis)
        live = np.any(weight != 0, axis=rest)
    elif value.name in bounds:
        low, high = _per_index(bounds[value.name], member)
        live = (low != 0) | (high != 0)
    else:
        return np.zeros(channels, np.bool_)
    alive = np.zeros(channels, np.bool_)
    alive[member.channel_of[live & (member.channel_of >= 0)]] = True
    return ~alive


def _held(
    graph: ChannelGraph, group: ChannelGroup, node: ir.Node, bounds: dict[str, Interval]
) -> tuple[np.ndarray, np.ndarray]:
    """Channels that are constant in a node's first operand, and the constant by index."""
    member = graph.consumed(group, node)
    if member is None or member.value not in bounds:
        return np.zeros(group.channels, np.bool_), np.zeros(0)
    low, high = _per_index(bounds[member.value], member)
    fixed = (low == high) & np.isfinite(low)
    held = np.ones(group.channels, np.bool_)
    held[member.channel_of[~fixed & (member.channel_of >= 0)]] = False
    return held, np.where(fixed, low, np.nan)


def _per_index(interval: Interval, member: Member) -> Interval:
    low, high = interval
    rest = tuple(k for k in range(low.ndim) if k != member.axis)
    count = len(member.channel_of)
    return (
        np.broadcast_to(low.min(axis=rest), count),
        np.broadcast_to(high.max(axis=rest), count),
    )


def _padded(node: ir.Node) -> bool:
    attributes = attributes_of(node)
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return True
    return attributes.get("auto_pad") != "VALID" and any(attributes.get("pads") or ())


# -- interval bounds ----------------------------------------------------------------------------


def intervals(program: Program) -> dict[str, Interval]:
    """Bounds of the values about which anything is known, for every input the program may get."""
    bounds: dict[str, Interval] = {}
    for node in program.graph:
        out = node.outputs[0]
        transfer = TRANSFER.get(node.op_type) if node.domain == "" else None
        if transfer is None or out.dtype is None or not out.dtype.is_floating_point():
            continue
        if out.shape is None or node.inputs[0] is None:
            continue
        if any(v is not None and v.shape is None for v in node.inputs):
            continue
        with np.errstate(all="ignore"):
            found = transfer(node, lambda i, node=node: _bounds_of(node, i, bounds))
        if found is None or np.isnan(found[0]).any() or np.isnan(found[1]).any():
            continue
        if np.isfinite(found[0]).any() or np.isfinite(found[1]).any():
            low, high = np.broadcast_arrays(*found)
            bounds[str(out.name)] = (low, high)
    return bounds


Lookup = Callable[[int], Interval]
Transfer = Callable[[ir.Node, Lookup], Interval | None]


def _bounds_of(node: ir.Node, index: int, bounds: dict[str, Interval]) -> Interval:
    value = node.inputs[index]
    assert value is not None
    known = bounds.get(str(value.name))
    if known is not None:
        return known
    held = constant(value)
    if held is not None and held.size:
        exact = held.astype(np.float64)
        return exact, exact
    ones = (1,) * len(value.shape or ())
    return np.full(ones, -math.inf), np.full(ones, math.inf)


def _times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Products in which zero times infinity is zero: an endpoint that is never reached."""
    product = a * b
    return np.where(np.isnan(product), 0.0, product)


def _monotone(function: Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]) -> Transfer:
    def transfer(node: ir.Node, get: Lookup) -> Interval:
        attributes = attributes_of(node)
        ends = [function(end, attributes) for end in get(0)]
        return np.minimum(*ends), np.maximum(*ends)

    return transfer


def _dipping(
    function: Callable[[np.ndarray, Mapping[str, Any]], np.ndarray], least: float
) -> Transfer:
    """Gelu and its kin: at least `least`, at most max(x, 0)."""

    def transfer(node: ir.Node, get: Lookup) -> Interval:
        low, high = get(0)
        value = function(np.where(low == high, low, 0.0), attributes_of(node))
        return np.where(low == high, value, least), np.where(
            low == high, value, np.maximum(high, 0)
        )

    return transfer


def _unit(node: ir.Node, get: Lookup) -> Interval:
    ones = (1,) * len(node.outputs[0].shape or ())
    return np.zeros(ones), np.ones(ones)


def _clip(node: ir.Node, get: Lookup) -> Interval | None:
    low, high = get(0)
    for index, limit in ((1, np.maximum), (2, np.minimum)):
        if index >= len(node.inputs) or node.inputs[index] is None:
            continue
        edge = constant(node.inputs[index])
        if edge is None:
            return None
        low, high = limit(low, float(edge.item())), limit(high, float(edge.item()))
    return low, high


def _leaky(node: ir.Node, get: Lookup) -> Interval | None:
    slope = float(attributes_of(node)["alpha"])
    low, high = get(0)
    if slope < 0:
        return None
    return np.where(low < 0, slope * low, low), np.where(high < 0, slope * high, high)


def _arithmetic(node: ir.Node, get: Lookup) -> Interval | None:
    low, high = get(0)
    for index in range(1, len(node.inputs)):
        other_low, other_high = get(index)
        if node.op_type in ("Add", "Sum"):
            low, high = low + other_low, high + other_high
        elif node.op_type == "Sub":
            low, high = low - other_high, high - other_low
        elif node.op_type in ("Max", "Min"):
            pick = np.maximum if node.op_type == "Max" else np.minimum
            low, high = pick(low, other_low), pick(high, other_high)
        else:
            if node.op_type == "Div":
                if not np.all((other_low > 0) | (other_high < 0)):
                    return None
                other_low, other_high = 1 / other_high, 1 / other_low
            corners = [_times(a, b) for a in (low, high) for b in (other_low, other_high)]
            low = functools.reduce(np.minimum, corners)
            high = functools.reduce(np.maximum, corners)
    return low, high


def _negated(node: ir.Node, get: Lookup) -> Interval:
    low, high = get(0)
    return -high, -low


def _absolute(node: ir.Node, get: Lookup) -> Interval:
    low, high = get(0)
    return np.maximum(np.maximum(low, -high), 0), np.maximum(-low, high)


def _affine(low: np.ndarray, high: np.ndarray, scale: np.ndarray) -> Interval:
    up, down = np.maximum(scale, 0), np.minimum(scale, 0)
    return _times(up, low) + _times(down, high), _times(up, high) + _times(down, low)


def _batch_normalization(node: ir.Node, get: Lookup) -> Interval | None:
    vectors = [constant(v) for v in node.inputs[1:5]]
    if any(v is None for v in vectors) or attributes_of(node).get("training_mode"):
        return None
    scale, bias, mean, var = (np.asarray(v, np.float64) for v in vectors)
    slope = scale / np.sqrt(var + attributes_of(node)["epsilon"])
    shape = (1, -1, *(1 for _ in range(len(dims(node.outputs[0]) or ()) - 2)))
    low, high = _affine(*get(0), slope.reshape(shape))
    offset = (bias - mean * slope).reshape(shape)
    return low + offset, high + offset


def _collapsed(interval: Interval, axis: int, count: int) -> Interval:
    """Bounds along one axis alone, as vectors."""
    low, high = interval
    rest = tuple(k for k in range(low.ndim) if k != axis)
    return np.broadcast_to(low.min(axis=rest), count), np.broadcast_to(high.max(axis=rest), count)


def _convolution(node: ir.Node, get: Lookup) -> Interval | None:
    stored = constant(node.inputs[1])
    attributes = attributes_of(node)
    groups = int(attributes["group"])
    if stored is None:
        return None
    low, high = _collapsed(get(0), 1, stored.shape[1] * groups)
    if _padded(node):
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    taps = stored.astype(np.float64).reshape(*stored.shape[:2], -1)
    up = np.maximum(taps, 0).sum(axis=2).reshape(groups, -1, stored.shape[1])
    down = np.minimum(taps, 0).sum(axis=2).reshape(groups, -1, stored.shape[1])
    low, high = (v.reshape(groups, 1, -1) for v in (low, high))
    least = (_times(up, low) + _times(down, high)).sum(axis=2).reshape(-1)
    most = (_times(up, high) + _times(down, low)).sum(axis=2).reshape(-1)
    shape = (1, -1, *(1 for _ in range(stored.ndim - 2)))
    return _with_bias(node, get, least.reshape(shape), most.reshape(shape), shape)


def _with_bias(
    node: ir.Node, get: Lookup, low: np.ndarray, high: np.ndarray, shape: tuple[int, ...]
) -> Interval:
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return low, high
    bias_low, bias_high = get(2)
    return low + bias_low.reshape(shape), high + bias_high.reshape(shape)


def _matrix(node: ir.Node, get: Lookup) -> Interval | None:
    stored = constant(node.inputs[1])
    if stored is None or stored.ndim != 2:
        return None
    attributes = attributes_of(node)
    weight, alpha = stored, 1.0
    if node.op_type == "Gemm":
        if attributes["transA"]:
            return None
        weight, alpha = stored.T if attributes["transB"] else stored, float(attributes["alpha"])
    rank = len(dims(node.inputs[0]) or ())
    least, most = _product(*_collapsed(get(0), rank - 1, weight.shape[0]), weight, alpha)
    shape = (*(1 for _ in range(rank - 1)), -1)
    low, high = least.reshape(shape), most.reshape(shape)
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        beta = np.array(float(attributes["beta"]))
        bias_low, bias_high = _affine(*get(2), beta)
        low, high = low + bias_low, high + bias_high
    return low, high


def _product(low: np.ndarray, high: np.ndarray, weight: np.ndarray, alpha: float) -> Interval:
    """Bounds of x @ (alpha * weight) for x between `low` and `high`.

    A few rows at a time, since the weight may be a mapped file; where nothing is known of x, only
    which of them are zero counts.
    """
    least, most = np.zeros(weight.shape[1]), np.zeros(weight.shape[1])
    step = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        if np.isneginf(low[rows]).all() and np.isposinf(high[rows]).all() and alpha:
            unbounded = (weight[rows] != 0).any(axis=0)
            least[unbounded], most[unbounded] = -math.inf, math.inf
            continue
        scale = alpha * weight[rows].astype(np.float64)
        below, above = _affine(low[rows, None], high[rows, None], scale)
        least += below.sum(axis=0)
        most += above.sum(axis=0)
    return least, most


def _pooled(node: ir.Node, get: Lookup) -> Interval | None:
    # What a window that sticks out by ceil_mode divides by differs between runtimes.
    if node.op_type == "AveragePool" and attributes_of(node).get("ceil_mode"):
        return None
    low, high = get(0)
    rest = tuple(range(2, low.ndim))
    low, high = low.min(axis=rest, keepdims=True), high.max(axis=rest, keepdims=True)
    if node.op_type == "AveragePool" and _padded(node) and attributes_of(node)["count_include_pad"]:
        return np.minimum(low, 0), np.maximum(high, 0)
    return low, high


def _reduced(node: ir.Node, get: Lookup) -> Interval | None:
    low, high = get(0)
    axes = integers(node, 1, "axes")
    attributes = attributes_of(node)
    if axes is None or (not axes and attributes.get("noop_with_empty_axes")):
        return None
    gone = tuple(axes) or tuple(range(low.ndim))
    keep = bool(attributes["keepdims"])
    return low.min(axis=gone, keepdims=keep), high.max(axis=gone, keepdims=keep)


def _concatenated(node: ir.Node, get: Lookup) -> Interval | None:
    rank = len(dims(node.outputs[0]) or ())
    axis = int(attributes_of(node)["axis"]) % rank
    lows: list[np.ndarray] = []
    highs: list[np.ndarray] = []
    for index, value in enumerate(node.inputs):
        extent = (dims(value) or ())[axis]
        if not isinstance(extent, int):
            return None
        low, high = _collapsed(get(index), axis, extent)
        lows.append(low)
        highs.append(high)
    shape = tuple(-1 if k == axis else 1 for k in range(rank))
    return np.concatenate(lows).reshape(shape), np.concatenate(highs).reshape(shape)


def _relabelled(node: ir.Node, get: Lookup) -> Interval | None:
    """Reshapes: runs of axes in which nothing varies stay so, the others are spelled out."""
    old, new = dims(node.inputs[0]), dims(node.outputs[0])
    if old is None or new is None:
        return None
    low, high = get(0)
    spelled, shape = list(low.shape), [1] * len(new)
    varying = {k for k, extent in enumerate(low.shape) if extent != 1}
    for ins, outs in row_major(old, new):
        if varying.isdisjoint(ins):
            continue
        varying -= set(ins)
        for names, extents, axes in ((old, spelled, ins), (new, shape, outs)):
            for k in axes:
                extent = names[k]
                if not isinstance(extent, int):
                    return None
                extents[k] = extent
    if varying:
        return None
    return (
        np.broadcast_to(low, spelled).reshape(shape),
        np.broadcast_to(high, spelled).reshape(shape),
    )


def _transposed(node: ir.Node, get: Lookup) -> Interval:
    low, high = get(0)
    perm = attributes_of(node)["perm"] or tuple(range(low.ndim))[::-1]
    return low.transpose(perm), high.transpose(perm)


def _resampled(node: ir.Node, get: Lookup) -> Interval | None:
    attributes = attributes_of(node)
    crops = "crop" in attributes["coordinate_transformation_mode"]
    kept = (dims(node.inputs[0]) or ())[:2] == (dims(node.outputs[0]) or ())[:2]
    if attributes["mode"] == "cubic" or crops or not kept:
        return None
    return _pooled(node, get)


def _gelu(x: np.ndarray, attributes: Mapping[str, Any]) -> np.ndarray:
    if attributes["approximate"] == "tanh":
        return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x * 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))


TRANSFER: dict[str, Transfer] = {
    **dict.fromkeys(("Dropout", "Identity"), _monotone(lambda x, a: x)),
    **dict.fromkeys(("Add", "Div", "Max", "Min", "Mul", "Sub", "Sum"), _arithmetic),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _relabelled),
    **dict.fromkeys(("Gemm", "MatMul"), _matrix),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool", "AveragePool", "MaxPool"), _pooled),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin"), _reduced),
    "Abs": _absolute,
    "BatchNormalization": _batch_normalization,
    "Clip": _clip,
    "Concat": _concatenated,
    "Conv": _convolution,
    "Exp": _monotone(lambda x, a: np.exp(x)),
    "Gelu": _dipping(_gelu, -0.171),
    "HardSigmoid": _monotone(lambda x, a: np.clip(a["alpha"] * x + a["beta"], 0, 1)),
    "HardSwish": _dipping(lambda x, a: x * np.clip(x / 6 + 0.5, 0, 1), -0.375),
    "LeakyRelu": _leaky,
    "Neg": _negated,
    "Relu": _monotone(lambda x, a: np.maximum(x, 0)),
    "Resize": _resampled,
    "Sigmoid": _monotone(lambda x, a: 1 / (1 + np.exp(-x))),
    "Softmax": _unit,
    "Tanh": _monotone(lambda x, a: np.tanh(x)),
    "Transpose": _transposed,
}
