"""prune-channels: offer every channel group at smaller widths, least important channels first."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

import numpy as np
import onnx_ir as ir

from optcompiler.channels import (
    ChannelGraph,
    ChannelGroup,
    Member,
    absorb_obstacle,
    remove_channels,
    reroute,
    unshare_vectors,
)
from optcompiler.errors import InputError
from optcompiler.ops.spec import OpTable
from optcompiler.program import Program
from optcompiler.rewriting import Candidate, Decline, Pass, PassContext, Stage

if TYPE_CHECKING:
    import torch

Importance = Literal["magnitude", "activation", "taylor"]
Compensation = Literal["none", "mean", "linear"]
Place = tuple[str, int]
"""A value that consumers read and the axis of it that a group's channels are on."""

RIDGE = 1e-3
"""Regularisation of the regression, in mean variances of a kept channel."""

WIDEST = 4096
"""Most indices along an axis of which covariances are taken (a matrix of 64 MiB)."""

ROWS = 8
"""Positions per index from which covariances are taken, spread over all batches."""

FEWEST_ROWS = 8192
"""As `ROWS`, for narrow axes."""


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove the least important channels of a group from every tensor that holds them.

        c = Conv(x, w1[64, …], b1[64])                  c = Conv(x, w1[48, …], b1[48])
        r = Relu(c)                              →      r = Relu(c)
        y = Conv(r, w2[128, 64, …], b2)                 y = Conv(r, w2[128, 48, …], b2')

    1. One candidate for each free channel group and ratio of `keep_ratio`. Channels coupled by
       residual sums, concats, depthwise convolutions, attention heads and shared weights leave
       together (see `optcompiler.channels`).
    2. The count kept is rounded to `multiple_of` (the width of a hardware tile), in the producer's
       rows, and is never below it.
    3. `importance` ranks channels, each measure summed over the group's tensors:
       "magnitude": L2 norm of the coupled weights over the mean of that layer (Li et al., Pruning
       filters for efficient ConvNets, ICLR 2017);
       "activation": mean absolute activation where it is consumed, over the mean of that layer;
       "taylor": squared first-order Taylor term (activation times gradient, Molchanov et al.,
       CVPR 2019), averaged over samples. The gradient of the KL divergence from the teacher is
       zero as long as the student equals it, so the gradient is that of the log-likelihood of
       outputs sampled from the model, whose square is the second-order term of that divergence
       (Theis et al., Fisher pruning, 2018).
    4. With calibration data the consumers make up for what leaves: by "mean", the bias takes up the
       mean of the removed channels; by "linear", the weights of the kept channels also take up
       what predicts the removed ones, by ridge regression on the activations (after He et al.,
       Channel pruning for accelerating very deep networks, ICCV 2017). "none" leaves them.

    Declines groups that reach an input, an output or an operator that fixes them, widths that
    rounding leaves as they are, and measures that need calibration data where there is none.
    """

    name = "prune-channels"
    stage = Stage.REDUCE
    summary = "remove the least important channels"
    # Without training, few layers give up a quarter of their channels within a usual budget, and
    # every candidate costs a run over the calibration data: asked for by name, not by default.
    default = False
    time_limit_s = math.inf

    keep_ratio: float | tuple[float, ...] = (0.75, 0.5)
    importance: Importance = "magnitude"
    multiple_of: int = 8
    compensate: Compensation = "linear"

    def __post_init__(self) -> None:
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise InputError(f"prune-channels: keep_ratio {ratio}; give numbers in (0, 1).")
        for option, value, known in (
            ("importance", self.importance, get_args(Importance)),
            ("compensate", self.compensate, get_args(Compensation)),
        ):
            if value not in known:
                raise InputError(
                    f"prune-channels: {option}={value!r}; there is {', '.join(known)}."
                )
        if self.multiple_of < 1:
            raise InputError(f"prune-channels: multiple_of={self.multiple_of}; give 1 or more.")

    @property
    def ratios(self) -> tuple[float, ...]:
        return self.keep_ratio if isinstance(self.keep_ratio, tuple) else (self.keep_ratio,)

    def propose(self, program: Program, context: PassContext) -> Iterable[Candidate | Decline]:
        program = program.clone()
        unshare_vectors(program)
        graph = ChannelGraph(program, context.ops)
        free: list[ChannelGroup] = []
        for group in graph.groups:
            if group.pinned:
                yield Decline(group.name, group.pinned, (*group.producers, *group.consumers))
            else:
                free.append(group)
        if not free:
            return
        if self.importance != "magnitude" and not context.calibration:
            reason = f"importance {self.importance!r} needs calibration data"
            yield from (Decline(g.name, reason, g.producers) for g in free)
            return
        places = {g.name: consumed_places(graph, g) for g in free}
        asked = sorted({p for found in places.values() for p in found})
        moments: Mapping[Place, Moments] = {}
        if context.calibration and (self.compensate != "none" or self.importance == "activation"):
            moments = observe_moments(program, context, asked, self.compensate == "linear")
        if self.importance == "magnitude":
            worth = {g.name: magnitudes(program, g) for g in free}
        elif self.importance == "activation":
            sizes = {place: found.size for place, found in moments.items()}
            worth = {g.name: _by_layer(g, sizes) for g in free}
        else:
            worth = taylor_terms(program, context, free, places)
        if self.compensate == "none":
            moments = {}
        for group in free:
            mine = {p: moments[p] for p in places[group.name] if p in moments}
            yield from self._candidates(graph, group, worth[group.name], mine, context.ops)

    def _candidates(
        self,
        graph: ChannelGraph,
        group: ChannelGroup,
        worth: np.ndarray,
        moments: Mapping[Place, Moments],
        ops: OpTable,
    ) -> Iterator[Candidate | Decline]:
        nodes = (*group.producers, *group.consumers)
        order = np.argsort(worth, kind="stable")
        seen: set[int] = set()
        for ratio in self.ratios:
            keep = kept_count(group, ratio, self.multiple_of)
            if keep >= group.channels:
                reason = f"{ratio:g} of {group.channels} channels rounds up to all of them"
                yield Decline(group.name, reason, nodes)
            elif keep not in seen:
                seen.add(keep)
                gone = tuple(sorted(order[: group.channels - keep].tolist()))
                before, after = macs(graph, group, keep, ops)
                yield Candidate(
                    site=group.name,
                    choice=f"keep {keep} of {group.channels} channels",
                    rewrite=functools.partial(
                        prune, ops=ops, group=group, gone=gone, moments=moments
                    ),
                    exact=False,
                    nodes=nodes,
                    details={
                        "importance": self.importance,
                        "removed": list(gone),
                        "macs_before": before,
                        "macs_after": after,
                    },
                )


@dataclass(frozen=True, eq=False)
class Moments:
    """Statistics of a value by index along one axis of extent C, over batches and other axes.

    `mean` and `size` (mean absolute value) are float64 [C]; `covariance` is float32 [C, C] or None.
    """

    mean: np.ndarray
    size: np.ndarray
    covariance: np.ndarray | None


def prune(
    program: Program,
    ops: OpTable,
    group: ChannelGroup,
    gone: tuple[int, ...],
    moments: Mapping[Place, Moments],
) -> None:
    """Remove channels of a group; consumers with `moments` of what they read make up for them."""

    def make_up(graph: ChannelGraph, now: ChannelGroup) -> dict[str, np.ndarray]:
        constants: dict[str, np.ndarray] = {}
        for name in now.consumers:
            node = program.node(name)
            assert node is not None
            member = graph.consumed(now, node)
            if member is None or absorb_obstacle(node):
                continue
            seen = moments.get((member.value, member.axis))
            then = group.member(node.inputs[0], member.axis)
            if seen is not None and then is not None:
                constants[name] = _made_up_for(program, node, member, then, gone, seen)
        return constants

    remove_channels(program, ops, group, gone, make_up)


def _made_up_for(
    program: Program,
    node: ir.Node,
    member: Member,
    then: Member,
    gone: tuple[int, ...],
    seen: Moments,
) -> np.ndarray:
    """The constants that leaving channels stand for, once weights have taken up what they can.

    `then` is the member when `seen` was taken: other groups on its axis may have shrunk since, so
    only indices of this group are compared.
    """
    mine, mine_then = np.flatnonzero(member.channel_of >= 0), np.flatnonzero(then.channel_of >= 0)
    leaving = np.isin(member.channel_of[mine], gone)
    constants = np.zeros(len(member.channel_of))
    mean = seen.mean[mine_then]
    constants[mine] = mean
    if seen.covariance is None:
        return constants
    covariance = seen.covariance[np.ix_(mine_then, mine_then)].astype(np.float64)
    known = covariance[~leaving][:, ~leaving]
    ridge = RIDGE * np.trace(known) / len(known)
    if ridge > 0:
        known += ridge * np.eye(len(known))
        mixing = np.linalg.solve(known, covariance[~leaving][:, leaving]).T
        if reroute(program, node, mine[leaving], mine[~leaving], mixing):
            constants[mine[leaving]] = mean[leaving] - mixing @ mean[~leaving]
    return constants


def kept_count(group: ChannelGroup, ratio: float, multiple_of: int) -> int:
    """Channels to keep: `ratio` of them, with rows of the producer in whole tiles, at least one."""
    step = multiple_of // math.gcd(multiple_of, group.rows)
    return max(step, round(group.channels * ratio / step) * step)


def macs(graph: ChannelGraph, group: ChannelGroup, keep: int, ops: OpTable) -> tuple[int, int]:
    """Multiply-accumulates of the program now and, as an estimate, with `keep` channels left."""
    before = after = 0.0
    for node in graph.program.graph:
        spec, rule = ops.get(node), graph.rules.get(str(node.name))
        count = spec.cost(node).macs if spec is not None else 0
        before += count
        if count and rule is not None:
            axes = [(v, k) for v in node.outputs[:1] for k in range(len(v.shape or ()))]
            axes += [(a.value, a.axis) for a in rule.reduced[:1]]
            for value, axis in axes:
                member = group.member(value, axis)
                if member is not None:
                    gone = np.sum(member.channel_of >= keep)
                    count *= 1 - float(gone) / len(member.channel_of)
        after += count
    return int(before), round(after)


# -- importance -----------------------------------------------------------------------------


def consumed_places(graph: ChannelGraph, group: ChannelGroup) -> list[Place]:
    """Where the group's channels are read by the nodes that sum over them, each once."""
    found: dict[Place, None] = {}
    for name in group.consumers:
        node = graph.program.node(name)
        assert node is not None
        member = graph.consumed(group, node)
        if member is not None and member.value not in graph.program.graph.initializers:
            found[member.value, member.axis] = None
    return list(found)


def magnitudes(program: Program, group: ChannelGroup) -> np.ndarray:
    """L2 norm of each channel's weights over the mean of the tensor, summed over tensors.

    Matrices and kernels count; vectors (biases, norms) only where there is nothing else.
    """
    weights = program.weights()
    held = [m for m in group.members if m.value in weights and _is_float(weights[m.value])]
    large = [m for m in held if _fan(weights[m.value], m.axis) > 1]
    norms: dict[Place, np.ndarray] = {}
    for member in large or held:
        array = weights[member.value].numpy().astype(np.float64)
        rest = tuple(k for k in range(array.ndim) if k != member.axis)
        norms[member.value, member.axis] = np.square(array).sum(axis=rest)
    return _by_layer(group, norms, root=True)


def _is_float(tensor: ir.TensorProtocol) -> bool:
    return ir.DataType(tensor.dtype).is_floating_point()


def _fan(tensor: ir.TensorProtocol, axis: int) -> int:
    return tensor.size // int(tensor.shape.numpy()[axis])


def _by_layer(
    group: ChannelGroup, per_index: Mapping[Place, np.ndarray], *, root: bool = False
) -> np.ndarray:
    """Sum over places of a channel's share, each place normalised to mean one."""
    total = np.zeros(group.channels)
    for member in group.members:
        values = per_index.get((member.value, member.axis))
        if values is None:
            continue
        mine = member.channel_of >= 0
        share = np.bincount(member.channel_of[mine], values[mine], group.channels)
        share = np.sqrt(share) if root else share
        total += share / (share.mean() or 1.0)
    return total


def observe_moments(
    program: Program, context: PassContext, places: Iterable[Place], covariances: bool
) -> dict[Place, Moments]:
    """Statistics at each place over the calibration batches."""
    from optcompiler.executor import observe, to_torch

    batches = list(context.calibration)
    axes: dict[str, list[int]] = {}
    for value, axis in places:
        axes.setdefault(value, []).append(axis)
    sums: dict[Place, list[np.ndarray]] = {}
    products: dict[Place, np.ndarray] = {}
    firsts: dict[Place, np.ndarray] = {}
    counts: dict[Place, int] = {}

    def note(name: str, tensor: torch.Tensor) -> None:
        for axis in axes[name]:
            place = (name, axis)
            rows = tensor.movedim(axis, -1).reshape(-1, tensor.shape[axis]).double()
            means = [rows.mean(0).numpy(), rows.abs().mean(0).numpy()]
            sums[place] = [a + b for a, b in zip(sums.get(place, (0, 0)), means, strict=True)]
            if covariances and rows.shape[1] <= WIDEST:
                wanted = max(ROWS * rows.shape[1], FEWEST_ROWS) / len(batches)
                some = rows[:: max(1, int(len(rows) / wanted))]
                products[place] = products.get(place, 0) + (some.T @ some).numpy()
                firsts[place] = firsts.get(place, 0) + some.sum(0).numpy()
                counts[place] = counts.get(place, 0) + len(some)

    module = to_torch(program, context.ops, trainable=False)
    for batch in context.progress.track(batches, "observing channels"):
        observe(module, batch, note, tuple(axes))
    moments: dict[Place, Moments] = {}
    for place, (total, total_size) in sums.items():
        mean, covariance = total / len(batches), None
        if place in products:
            first = firsts[place] / counts[place]
            covariance = products[place] / counts[place] - np.outer(first, first)
            covariance = covariance.astype(np.float32)
        moments[place] = Moments(mean, total_size / len(batches), covariance)
    return moments


def taylor_terms(
    program: Program,
    context: PassContext,
    groups: Iterable[ChannelGroup],
    places: Mapping[str, list[Place]],
) -> dict[str, np.ndarray]:
    """Mean over samples of the squared first-order term of removing each channel, by group.

    Half of it estimates the KL divergence in nats that the removal causes.
    """
    import torch

    from optcompiler.executor import to_torch

    groups = list(groups)
    names = sorted({value for g in groups for value, _ in places[g.name]})
    totals = {g.name: np.zeros(g.channels) for g in groups}
    members = {(g.name, m.value, m.axis): m for g in groups for m in g.members}
    generator = torch.Generator().manual_seed(context.seed)
    module = to_torch(program, context.ops, extra_outputs=names)
    samples = 0
    for batch in context.progress.track(list(context.calibration), "taking gradients"):
        inputs = [torch.from_numpy(np.asarray(batch[p.name], order="C")) for p in program.inputs]
        results = module(*inputs)
        outputs = [o for o in results[: len(program.outputs)] if o.requires_grad]
        taken = dict(zip(names, results[len(program.outputs) :], strict=True))
        taken = {name: value for name, value in taken.items() if value.requires_grad}
        if not outputs or not taken:
            break
        loss = torch.stack([_sampled_loss(o, generator) for o in outputs]).sum()
        found = torch.autograd.grad(loss, list(taken.values()), allow_unused=True)
        # The stub leaves out that what a loss does not depend on has no gradient.
        slopes = cast("tuple[torch.Tensor | None, ...]", found)
        terms = {
            name: (value * slope).detach().double()
            for (name, value), slope in zip(taken.items(), slopes, strict=True)
            if slope is not None
        }
        samples += max((a.shape[0] for a in batch.values() if a.ndim), default=1)
        for group in groups:
            for value, axis in places[group.name]:
                if value in terms:
                    member = members[group.name, value, axis]
                    totals[group.name] += _squared(terms[value], member, group.channels)
    return {name: total / max(samples, 1) for name, total in totals.items()}


def _squared(term: torch.Tensor, member: Member, channels: int) -> np.ndarray:
    """Sum over samples (axis 0, unless channels are there) of the square of each channel's term."""
    import torch

    kept = [0, member.axis] if member.axis else [member.axis]
    rest = [k for k in range(term.ndim) if k not in kept]
    rows = (term.sum(rest) if rest else term).reshape(-1, len(member.channel_of))
    mine = torch.from_numpy(np.flatnonzero(member.channel_of >= 0))
    channel = torch.from_numpy(member.channel_of[member.channel_of >= 0])
    total = rows.new_zeros(len(rows), channels).index_add_(1, channel, rows[:, mine])
    return total.square().sum(0).numpy()


def _sampled_loss(output: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Negative log-likelihood of outputs drawn from the model itself.

    Scores along the last axis are a categorical distribution, as the KL damage reads them; an
    output with one element there is the mean of a normal distribution of variance one.
    """
    import torch

    if output.ndim == 0 or output.shape[-1] < 2:
        noise = torch.randn(output.shape, generator=generator, dtype=output.dtype)
        return (output * noise).sum()
    logs = torch.log_softmax(output, -1).reshape(-1, output.shape[-1])
    drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
    return -logs.gather(1, drawn).sum()
