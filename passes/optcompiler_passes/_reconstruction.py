"""Learning one unit of a quantised program from what the same unit of its teacher computes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import fx, nn

from optcompiler.executor import NODE_KEY, WEIGHTS_KEY, to_torch
from optcompiler.ops import OpTable
from optcompiler.ops.quantization import dequantize_linear, quantize_linear
from optcompiler.program import Program, constant
from optcompiler.quantization import INTEGER_RANGES, spread
from optcompiler_passes._kd import Student
from optcompiler_passes._learnables import learnables
from optcompiler_passes._units import Unit, is_weight_quantizer

if TYPE_CHECKING:
    from optcompiler_passes.reconstruct import Reconstruct

Tensor = torch.Tensor
Values = dict[str, Tensor]
State = dict[str, np.ndarray]
"""New contents of initializers by name."""

STRETCH = (-0.1, 1.1)
"""The rectified sigmoid's ends before it is clipped to [0, 1] (AdaRound, equation 23)."""
WARM = 0.2
"""The share of the steps in which rounding is free."""
SHARPNESS = (20.0, 2.0)
LEAST_WEIGHT = 0.1
"""Least weight of a channel in the loss, of a mean of 1."""


class Quantizer(nn.Module):
    """Quantises and dequantises an activation; while `chance` is set, leaves that share of its
    elements in float (QDrop: Wei et al., 2022, section 4.3)."""

    def __init__(self, target: int, generator: torch.Generator) -> None:
        super().__init__()
        self.target = target
        self.generator = generator
        self.chance = 0.0

    def forward(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        levels = quantize_linear(x, scale, zero, target=self.target)
        rounded = dequantize_linear(levels, scale, zero)
        if not self.chance:
            return rounded
        kept = torch.rand(x.shape, generator=self.generator) < self.chance
        return torch.where(kept.to(x.device), x, rounded)


@dataclass(frozen=True)
class Rounding:
    """A weight whose rounding is learnt: level = floor(weight / scale) + 0 or 1."""

    name: str
    base: Tensor
    scale: Tensor
    zero: Tensor
    low: int
    high: int
    start: Tensor
    """What the rectified sigmoid begins from: the weight itself."""

    def soft(self, free: Tensor) -> Tensor:
        return self._dequantised(self.base + rectified(free))

    def hard(self, free: Tensor) -> Tensor:
        return self._dequantised(self.base + (rectified(free) >= 0.5))

    def _dequantised(self, levels: Tensor) -> Tensor:
        return (levels.clamp(self.low, self.high) - self.zero) * self.scale


def rectified(free: Tensor) -> Tensor:
    """AdaRound's h (Nagel et al., "Up or Down?", 2020, equation 23)."""
    low, high = STRETCH
    return (torch.sigmoid(free) * (high - low) + low).clamp(0, 1)


def rounding_of(quantize: ir.Node) -> Rounding | None:
    """How the weight of a quantiser may be rounded; None where that is not ours to learn."""
    weight, scale = constant(quantize.inputs[0]), constant(quantize.inputs[1])
    levels = quantize.outputs[0]
    kind = levels.dtype.name if levels.dtype is not None else ""
    if weight is None or scale is None or kind not in INTEGER_RANGES or weight.dtype != np.float32:
        return None
    axis = quantize.attributes.get_int("axis", 1)
    block = quantize.attributes.get_int("block_size", 0)
    given = constant(quantize.inputs[2]) if len(quantize.inputs) > 2 else None
    zero = np.zeros((), np.float32) if given is None else given.astype(np.float32)
    low, high = INTEGER_RANGES[kind]
    s = torch.from_numpy(np.array(spread(scale, weight.shape, axis, block), np.float32))
    z = torch.from_numpy(np.array(spread(zero, weight.shape, axis, block), np.float32))
    ratio = (torch.from_numpy(np.array(weight)) / s + z).clamp(low, high)
    base = ratio.floor().clamp(max=high - 1)
    share = ((ratio - base - STRETCH[0]) / (STRETCH[1] - STRETCH[0])).clamp(1e-4, 1 - 1e-4)
    return Rounding(str(quantize.inputs[0].name), base, s, z, low, high, torch.logit(share))  # type: ignore[union-attr]


class Learner:
    """The student's part of a unit, made so that its rounding, scales and biases can be learnt."""

    def __init__(
        self, unit: Unit, shared: frozenset[str], options: Reconstruct, ops: OpTable,
        device: torch.device, generator: torch.Generator,
    ) -> None:  # fmt: skip
        part = unit.student.clone()
        self.roundings = _free_weights(part, shared, options)
        module = to_torch(part, ops)
        self.quantizers = _with_drops(module, part, generator)
        self.module = module.to(device)
        self.inputs = [p.name for p in part.inputs]
        self.outputs = [p.name for p in part.outputs]
        roles = [r for r in options.learn if r in ("scales", "biases")]
        learnt = [i for i in learnables(part, roles) if i.name not in shared]
        self.student = Student(self.module, learnt)
        attributes = {name: key for key, name in module.meta[WEIGHTS_KEY].items()}
        self.rounds = {attributes[r.name]: r for r in self.roundings if r.name in attributes}
        for key, rounding in self.rounds.items():
            assert key in self.student.fixed, rounding.name
        self.free = {k: r.start.to(device).requires_grad_() for k, r in self.rounds.items()}

    @property
    def learns(self) -> bool:
        return bool(self.free or self.student.learnt)

    def __call__(self, values: Mapping[str, Tensor], soft: bool = False) -> list[Tensor]:
        """The outputs, in the order of `outputs`."""
        weights = {
            key: r.soft(self.free[key]) if soft else r.hard(self.free[key])
            for key, r in self.rounds.items()
        }
        tensors = {**self.student.fixed, **self.student.tensors(), **weights}
        inputs = tuple(values[name] for name in self.inputs)
        return list(torch.func.functional_call(self.module, tensors, inputs))

    def state(self) -> State:
        """The contents that its initializers have now, weights rounded for good."""
        with torch.no_grad():
            found = dict(self.student.state())
            found |= {r.name: r.hard(self.free[k]).detach() for k, r in self.rounds.items()}
        return {name: tensor.cpu().numpy().copy() for name, tensor in found.items()}

    def drop(self, chance: float) -> None:
        for quantizer in self.quantizers:
            quantizer.chance = chance

    def undecided(self, sharpness: float) -> Tensor:
        """How far roundings are from 0 and 1: AdaRound's regulariser, mean over all weights."""
        total = sum(f.numel() for f in self.free.values())
        parts = [
            (1 - (2 * rectified(f) - 1).abs().pow(sharpness)).sum() for f in self.free.values()
        ]
        return torch.stack(parts).sum() / total


def _free_weights(part: Program, shared: frozenset[str], options: Reconstruct) -> list[Rounding]:
    """Let nodes read weights in place of their quantised form; how those may be rounded."""
    found: list[Rounding] = []
    for node in tuple(part.graph):
        if not is_weight_quantizer(node):
            continue
        weight = node.inputs[0]
        assert weight is not None
        readers = list(node.outputs[0].consumers())
        alone = len(list(weight.consumers())) == 1 and weight.name not in shared
        rounding = rounding_of(node) if alone and not weight.is_graph_output() else None
        if rounding is None or [r.op_type for r in readers] != ["DequantizeLinear"]:
            continue
        if not options.rounds(rounding.high - rounding.low + 1):
            continue
        ir.convenience.replace_all_uses_with(readers[0].outputs[0], weight)
        found.append(rounding)
    part.sweep()
    return found


def _with_drops(
    module: fx.GraphModule, part: Program, generator: torch.Generator
) -> list[Quantizer]:
    """Put a `Quantizer` in the place of every pair of quantiser and dequantiser."""
    nodes = {str(n.name): n for n in part.graph}
    by_name = {n.meta.get(NODE_KEY): n for n in module.graph.nodes if n.op == "call_function"}
    found: list[Quantizer] = []
    for name, node in nodes.items():
        if node.op_type != "DequantizeLinear":
            continue
        quantize = node.inputs[0].producer() if node.inputs[0] is not None else None
        same = quantize is not None and [*quantize.inputs[1:]] == [*node.inputs[1:]]
        if quantize is None or quantize.op_type != "QuantizeLinear" or not same:
            continue
        kind = quantize.outputs[0].dtype
        scale = node.inputs[1]
        if kind is None or scale is None or scale.shape is None or len(scale.shape):
            continue
        first, second = by_name[str(quantize.name)], by_name[name]
        key = f"quantizer_{len(found)}"
        module.add_submodule(key, Quantizer(int(kind), generator))
        arguments = (*first.args, None)[:3]
        with module.graph.inserting_after(second):
            made = module.graph.call_module(key, cast("Any", arguments))
        second.replace_all_uses_with(made)
        found.append(cast("Quantizer", getattr(module, key)))
    module.graph.eliminate_dead_code()
    module.recompile()
    return found


# -- data -----------------------------------------------------------------------------------


@dataclass
class Cache:
    """What a program computed so far for all samples, by name of value: [samples, …]."""

    values: Values = field(default_factory=dict)

    def rows(self, names: Sequence[str], rows: Tensor) -> Values:
        return {n: self.values[n][rows] for n in names}

    def run(
        self, part: Program, ops: OpTable, chunk: int, device: torch.device
    ) -> dict[str, Tensor]:
        """The outputs of a part for all samples, added to the values."""
        module = to_torch(part, ops, trainable=False).to(device)
        names = [p.name for p in part.inputs]
        outputs = [p.name for p in part.outputs]
        count = len(next(iter(self.values.values())))
        made: list[list[Tensor]] = [[] for _ in outputs]
        with torch.no_grad():
            for start in range(0, count, chunk):
                rows = slice(start, start + chunk)
                given = [self.values[n][rows].to(device) for n in names]
                for kept, tensor in zip(made, module(*given), strict=True):
                    kept.append(_by_sample(tensor.cpu(), min(chunk, count - start)))
        fresh = {n: torch.cat(parts) for n, parts in zip(outputs, made, strict=True)}
        self.values |= fresh
        return fresh

    def forget(self, wanted: frozenset[str]) -> None:
        self.values = {n: t for n, t in self.values.items() if n in wanted}


def _by_sample(tensor: Tensor, count: int) -> Tensor:
    """A value of `count` samples; one that is the same for all is repeated."""
    if tensor.ndim and tensor.shape[0] == count:
        return tensor
    if tensor.ndim and tensor.shape[0] == 1:
        return tensor.expand(count, *tensor.shape[1:])
    raise NoSamples(f"a value of shape {list(tensor.shape)} is not one for each sample")


class NoSamples(Exception):
    """A value between units does not have the samples along its first axis."""


# -- the loss -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """Squared error of a unit's ends, weighted by channel, over the teacher's variance."""

    weights: tuple[Tensor, ...]
    """One a value, broadcastable to it."""
    variances: tuple[float, ...]

    def __call__(self, got: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), device=expected[0].device)
        for g, e, w, v in zip(got, expected, self.weights, self.variances, strict=True):
            if not e.is_floating_point():
                continue
            error = (g.float() - e.float()).square()
            total = total + (torch.where(torch.isfinite(error), error, 0) * w).mean() / v
        return total


def loss_of(expected: Sequence[Tensor], weights: Mapping[str, Tensor], ends: Sequence[str]) -> Loss:
    variances: list[float] = []
    for value in expected:
        finite = value[torch.isfinite(value)].float() if value.is_floating_point() else value
        spread_ = float(finite.float().var(correction=0)) if finite.numel() else 0.0
        variances.append(max(spread_, 1e-12))
    ones = torch.ones(())
    return Loss(tuple(weights.get(n, ones) for n in ends), tuple(variances))


# -- training -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """What a unit learns from: values of student and teacher, samples to train on and to judge."""

    student: Cache
    teacher: Cache
    expected: Values
    training: Tensor
    judging: Tensor
    ends: tuple[str, ...]
    loss: Loss


@dataclass(frozen=True)
class Learnt:
    state: State | None
    """None where no state was better than the first."""
    before: float
    after: float
    """Loss on the samples that judge."""


def learn(
    learner: Learner, lesson: Lesson, options: Reconstruct, steps: int,
    generator: torch.Generator, device: torch.device,
) -> Learnt:  # fmt: skip
    """Train a unit; its best state on the samples that judge."""
    picked = [learner.outputs.index(n) for n in lesson.ends]
    mixed = [
        n for n in learner.inputs
        if n in lesson.teacher.values and _alike(lesson.student.values[n], lesson.teacher.values[n])
    ]  # fmt: skip

    def ends(values: Values, soft: bool = False) -> list[Tensor]:
        given = learner(values, soft)
        return [given[i] for i in picked]

    def judged() -> float:
        total = 0.0
        with torch.no_grad():
            for rows in lesson.judging.split(options.batch_size):
                values = _moved(lesson.student.rows(learner.inputs, rows), device)
                expected = [lesson.expected[n][rows].to(device) for n in lesson.ends]
                total += len(rows) * float(lesson.loss(ends(values), expected))
        return total / len(lesson.judging)

    first = judged()
    if not learner.learns or not steps or not first > 0:
        return Learnt(None, first, first)
    rates = [options.learning_rate * float(g["lr"]) for g in learner.student.groups]  # type: ignore[arg-type]
    groups = [dict(g) for g in learner.student.groups]
    if learner.free:
        groups.append({"params": list(learner.free.values())})
        rates.append(options.rounding_rate)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    best, least = None, first
    order: list[int] = []
    for step in range(steps):
        while len(order) < options.batch_size:
            order += torch.randperm(len(lesson.training), generator=generator).tolist()
        rows = lesson.training[order[: options.batch_size]]
        del order[: options.batch_size]
        values = _moved(lesson.student.rows(learner.inputs, rows), device)
        for name in mixed if options.drop else ():
            keep = torch.rand(values[name].shape, generator=generator) < options.drop
            other = lesson.teacher.values[name][rows].to(device)
            values[name] = torch.where(keep.to(device), other, values[name])
        learner.drop(options.drop)
        expected = [lesson.expected[n][rows].to(device) for n in lesson.ends]
        loss = lesson.loss(ends(values, soft=True), expected) / first
        progress = step / steps
        if learner.free and progress >= WARM:
            along = (progress - WARM) / (1 - WARM)
            sharpness = SHARPNESS[1] + (SHARPNESS[0] - SHARPNESS[1]) * 0.5 * (
                1 + math.cos(math.pi * along)
            )
            loss = loss + options.rounding_weight * learner.undecided(sharpness)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        learner.drop(0.0)
        factor = 0.5 * (1 + math.cos(math.pi * progress))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        if learner.free:
            optimizer.param_groups[-1]["lr"] = options.rounding_rate
        optimizer.step()
        if step + 1 == steps or (step + 1) % max(1, steps // 8) == 0:
            now = judged()
            if now < least:
                best, least = learner.state(), now
    return Learnt(best, first, least)


def _moved(values: Values, device: torch.device) -> Values:
    return {name: tensor.to(device) for name, tensor in values.items()}


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.is_floating_point() and one.shape == other.shape
