"""The training loop of distillation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from optcompiler.binding import resolved
from optcompiler.damage import kl, nmse
from optcompiler.executor import WEIGHTS_KEY
from optcompiler.program import Program
from optcompiler.rewriting import Declined, PassContext
from optcompiler_passes._boundaries import (
    batch_free,
    batch_size,
    boundaries,
    comparable,
    module_of,
    spread_out,
)
from optcompiler_passes._clock import Clock
from optcompiler_passes._devices import deterministic, device_named, device_of
from optcompiler_passes._learnables import Learnable, learnables
from optcompiler_passes._samples import Samples, sample_count, size_of

if TYPE_CHECKING:
    from optcompiler_passes.distill import Distill

Tensor = torch.Tensor

MOST_PARTS = 8
"""Samples per step where a program is fixed to fewer at a time."""

_FLOORS = {"weights": 0.01, "biases": 0.1}
"""Least magnitude that step sizes are relative to; biases are often zero to begin with."""


# -- what is compared -----------------------------------------------------------------------


def same_function(program: Program, context: PassContext) -> bool:
    """Whether `program` and the teacher agree on the first batch, up to float rounding."""
    from optcompiler.executor import interpret

    batch = context.calibration[0]
    pair = [
        interpret(p, batch, [port.name for port in p.outputs], context.ops)
        for p in (context.teacher, program)
    ]
    for expected, got in zip(pair[0].values(), pair[1].values(), strict=True):
        if expected.shape != got.shape:
            return False
        if not expected.is_floating_point():
            if not torch.equal(expected, got):
                return False
        elif expected.numel() and not nmse(expected, got) < 1e-8:
            return False
    return True


class Loss:
    """Disagreement of student and teacher: outputs first, then values of blocks."""

    def __init__(self, outputs: int, options: Distill) -> None:
        self.outputs = outputs
        self.temperature = options.temperature
        self.block_weight = options.block_weight

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), device=teacher[0].device)
        errors: list[Tensor] = []
        for index, (s, t) in enumerate(zip(student, teacher, strict=True)):
            if not t.is_floating_point() or not t.numel():
                continue
            s, t = s.float(), t.float()
            scores = t.ndim > 0 and t.shape[-1] > 1
            if index < self.outputs and scores:
                total = total + self._divergence(s, t)
            finite = torch.isfinite(t) & torch.isfinite(s)
            gap = torch.where(finite, s - t, 0).square().mean()
            known = t[torch.isfinite(t)]
            spread = known.var(correction=0) if known.numel() else gap.detach()
            error = gap / spread.clamp_min(1e-12)
            if index < self.outputs and not scores:
                total = total + error
            else:
                errors.append(error)
        if errors and self.block_weight:
            total = total + self.block_weight * torch.stack(errors).mean()
        return total

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        t = torch.log_softmax(torch.nan_to_num(teacher / self.temperature, neginf=-1e4), -1)
        s = torch.log_softmax(torch.nan_to_num(student / self.temperature, neginf=-1e4), -1)
        return self.temperature**2 * (t.exp() * (t - s)).sum(-1).mean()


# -- data -----------------------------------------------------------------------------------


BYTE_MACS = 10
"""Multiply-accumulates that take as long as moving one byte, roughly, when training on a CPU."""


def work_per_sample(context: PassContext) -> int:
    """Multiply-accumulates of the teacher for one sample, and what moving its activations costs."""
    nodes = resolved(context.teacher).graph
    specs = [(context.ops.get(n), n) for n in nodes]
    costs = [s.cost(n) for s, n in specs if s is not None]
    work = sum(c.macs + BYTE_MACS * (c.bytes_read + c.bytes_written) for c in costs)
    return work // max(size_of(context.calibration[0]) if _fixed(context.teacher) else 1, 1)


def _fixed(program: Program) -> bool:
    return all(isinstance(d, int) for p in program.inputs for d in p.shape[:1])


# -- training -------------------------------------------------------------------------------


class Student:
    """A program's module with its learnable tensors replaced by what the optimiser moves.

    Scales are trained as the logarithm of their ratio to the first value, zero points as floats
    that round with a straight-through gradient, everything else as itself.
    """

    def __init__(self, module: fx.GraphModule, learnt: Sequence[Learnable]) -> None:
        self.module = module
        attributes = {name: key for key, name in module.meta[WEIGHTS_KEY].items()}
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.learnt = {attributes[i.name]: i for i in learnt if i.name in attributes}
        self.fixed = {k: t.detach() for k, t in tensors.items() if k not in self.learnt}
        self.start = {k: tensors[k].detach().clone() for k in self.learnt}
        self.free: dict[str, Tensor] = {}
        self.groups: list[dict[str, object]] = []
        for key, item in self.learnt.items():
            start = self.start[key]
            if item.role == "scales":
                free, step = torch.zeros_like(start), 1.0
            elif item.role == "zero_points":
                free, step = start.float(), float(item.bounds[1] - item.bounds[0]) / 4
            else:
                free = start.clone()
                step = max(float(start.square().mean().sqrt()), _FLOORS[item.role])
            self.free[key] = free.requires_grad_()
            self.groups.append({"params": [free], "lr": step})

    def tensors(self) -> dict[str, Tensor]:
        """Every learnable tensor as the module is to see it now."""
        return {key: self._shown(key, item) for key, item in self.learnt.items()}

    def _shown(self, key: str, item: Learnable) -> Tensor:
        free = self.free[key]
        if item.role == "scales":
            return (self.start[key] * torch.exp(free)).clamp(max=item.most)
        if item.role == "zero_points":
            level = free.clamp(*item.bounds)
            return level + (torch.round(level) - level).detach()
        return free

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        tensors = {**self.fixed, **self.tensors()}
        return torch.func.functional_call(self.module, tensors, tuple(inputs))

    def state(self) -> dict[str, Tensor]:
        """A copy of every learnable tensor by initializer name."""
        shown = self.tensors()
        return {item.name: shown[key].detach().clone() for key, item in self.learnt.items()}


def distill(student: Program, context: PassContext, options: Distill) -> None:
    """Train `student` in place; raises `Declined` when no state is nearer to the teacher."""
    learnt = learnables(student, options.learn)
    if not learnt:
        raise Declined(f"it holds no {' or '.join(options.learn)} to learn.")
    device = device_named(
        context.choices.keep("distill: device", lambda: device_of(options.device))
    )
    with deterministic():
        best = _train(student, context, options, learnt, device)
    if best is None:
        raise Declined(
            f"none of {options.steps} steps came nearer to the teacher on data held out."
        )
    values = {str(v.name): v for v in student.graph.initializers.values()}
    for item in learnt:
        if item.name in best:
            value = values[item.name]
            kind = value.const_value.dtype if value.const_value is not None else value.dtype
            assert kind is not None
            array = best[item.name].cpu().numpy().astype(kind.numpy())
            student.set_weight(value, array)


def _train(
    program: Program,
    context: PassContext,
    options: Distill,
    learnt: Sequence[Learnable],
    device: torch.device,
) -> dict[str, Tensor] | None:
    names = spread_out(boundaries(program, context.teacher)) if options.block_weight else []
    generator = torch.Generator().manual_seed(context.seed)
    samples = Samples(program, context.calibration, options.augment, device, generator)
    held_out = context.holdout or context.calibration
    judged = Samples(program, held_out, False, device, generator).given
    names = comparable(program, context, names, judged[0], device)
    free = batch_free(context.teacher), batch_free(program)
    teacher = module_of(free[0], context, names, False, device)
    wanted = min(options.batch_size, sample_count(context.calibration))
    samples.size = batch_size(program, teacher, samples, wanted)
    if samples.size != wanted:
        free = context.teacher, program
        teacher = module_of(free[0], context, names, False, device)
    student = Student(module_of(free[1], context, names, True, device), learnt)
    outputs = len(program.outputs)
    loss_of = Loss(outputs, options)
    references = [_plain(teacher(*inputs))[:outputs] for inputs in judged]

    def judge() -> float:
        with torch.no_grad():
            pairs = [(r, student(i)[:outputs]) for r, i in zip(references, judged, strict=True)]
        return sum(_distance(r, s) for r, s in pairs) / len(pairs)

    optimizer = torch.optim.Adam(student.groups, betas=(0.9, 0.99))  # type: ignore[arg-type]
    peak = options.learning_rate * _share(references, judged, student)
    rates = [peak * float(g["lr"]) for g in optimizer.param_groups]
    parts = max(1, min(wanted, MOST_PARTS) // samples.size) if samples.joined else 1
    clock = Clock(options.steps, options.minutes, context.choices)
    best, nearest = None, judge()
    for step in context.progress.track(range(options.steps), "distilling"):
        if step >= clock.steps:
            break
        optimizer.zero_grad(set_to_none=True)
        for _ in range(parts):
            inputs = samples.draw()
            with torch.no_grad():
                expected = _plain(teacher(*inputs))
            (loss_of(student(inputs), expected) / parts).backward()
        if not _finite(student.free.values()):
            continue
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * clock.factor(step)
        optimizer.step()
        clock.tick(step)
        if clock.evaluates(step):
            distance = judge()
            if distance < nearest:
                best, nearest = student.state(), distance
    clock.stop()
    return best


def _distance(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> float:
    """Damage as the planner sees it, with a little of the squared error for what it is blind to."""
    total = 0.0
    for t, s in zip(teacher, student, strict=True):
        if t.is_floating_point() and t.numel():
            value = kl(t, s) + 0.01 * nmse(t, s)
            total += value if math.isfinite(value) else math.inf
    return total


def _share(
    references: Sequence[Sequence[Tensor]], inputs: Sequence[Sequence[Tensor]], student: Student
) -> float:
    """How far the outputs are off to begin with, relative to their spread, between 0.05 and 1.

    Small errors need small steps: the noise of a step is not to exceed what is to be repaired.
    """
    errors = [0.0]
    with torch.no_grad():
        for reference, given in zip(references, inputs, strict=True):
            got = student(given)[: len(reference)]
            for t, s in zip(reference, got, strict=True):
                if t.is_floating_point() and t.numel():
                    errors.append(nmse(t, s))
    return min(max(math.sqrt(max(errors)), 0.05), 1.0) if math.isfinite(max(errors)) else 1.0


def _plain(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach() for t in outputs]


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(t.grad is None or bool(torch.isfinite(t.grad).all()) for t in tensors)
