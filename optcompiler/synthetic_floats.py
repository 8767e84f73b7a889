"""Float inputs learned by gradient descent through the teacher, to fit what it has kept of its own
training data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F

from optcompiler.calibration_sources import Given, Watched, affordable, sample_shape
from optcompiler.program import Port, Program, constant, shape_of
from optcompiler.synthetic_tokens import integer_inputs

if TYPE_CHECKING:
    from optcompiler.rewriting import Batch
    from optcompiler.synthesizing import Synthetic

Tensor = torch.Tensor

CHUNK = 64
"""Samples learned together: statistics are those of so many."""

LENGTH = 64
"""Of a symbolic dimension."""

LEAST_STEPS, MOST_STEPS = 30, 150
MOST_MACS = 2e10
"""Multiply-accumulates of the forward passes, which decide the number of steps between those two:
on a small network with depthwise convolutions more steps did not help."""

RATE = 0.05
"""Of Adam, in standard deviations of the input."""

SMOOTHNESS = 0.02
FAR_OFF = 3.0
"""Standard deviations from zero at which a channel counts as dead or never cut."""

RANGES = ((-3.0, 3.0), (-1.0, 1.0), (0.0, 1.0), (0.0, 255.0))
"""Limits that inputs may have; the first are those of mean 0 and deviation 1."""


@dataclass(frozen=True)
class Kept:
    """Statistics [C] of the value that a BatchNormalization node reads."""

    value: str
    mean: Tensor
    variance: Tensor


def float_batches(options: Synthetic, given: Given, *, images: bool) -> Iterator[Batch]:
    """Batches of at most `CHUNK` samples, each learned by itself."""
    kept = kept_statistics(given.teacher)
    cut = [] if kept else read_by_cuts(given.teacher)
    goals = Goals(given, kept, cut)
    limits = options.limits or best_limits(options, given, goals, images)
    steps = options.steps
    if steps is None:
        steps = affordable(given, options.count, LEAST_STEPS, MOST_STEPS, MOST_MACS)
    starts = range(0, options.count, CHUNK)
    for index, start in enumerate(given.progress.track(starts, "synthetic calibration samples")):
        size = min(CHUNK, options.count - start)
        generator = torch.Generator().manual_seed(_seed(given, options, index))
        fixed = integer_inputs(given, size, options, given.rng(options.seed + 1 + index))
        yield learned(given, goals, fixed, size, steps, limits, options, images, generator)


def learned(
    given: Given, goals: Goals, fixed: Mapping[str, np.ndarray], size: int, steps: int,
    limits: Sequence[float], options: Synthetic, images: bool, generator: torch.Generator,
) -> Batch:  # fmt: skip
    """One batch after `steps` of gradient descent."""
    ports = [p for p in given.ports if p.name not in fixed]
    middle, spread = (limits[0] + limits[1]) / 2, (limits[1] - limits[0]) / 6
    least, most = (limits[0] - middle) / spread, (limits[1] - middle) / spread
    free = {
        p.name: noise(p, size, given, options, images, generator).requires_grad_() for p in ports
    }
    others = {name: torch.from_numpy(array) for name, array in fixed.items()}
    optimizer = torch.optim.Adam(free.values(), RATE, betas=(0.5, 0.9))
    targets = goals.targets(size, generator)

    def inputs(values: Mapping[str, Tensor], moved: bool) -> dict[str, Tensor]:
        made = dict(others)
        for port in ports:
            value = values[port.name]
            if moved and images:
                down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
                value = torch.roll(value, (down, right), (-2, -1))
            made[port.name] = (value * spread + middle).to(_torch_type(port))
        return made

    for step in range(steps if goals.any else 0):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + RATE / 50
        loss = goals.loss(inputs(free, moved=True), targets)
        for value in free.values():
            if images:
                loss = loss + SMOOTHNESS * _variation(value)
        if not loss.requires_grad:
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        for value in free.values():
            if value.grad is not None:
                value.grad.nan_to_num_(0.0, 0.0, 0.0)
        optimizer.step()
        with torch.no_grad():
            for value in free.values():
                value.clamp_(least, most)
    with torch.no_grad():
        made = inputs(free, moved=False)
    return {p.name: _array(made[p.name], p) for p in given.ports}


class Goals:
    """What inputs are learned for."""

    def __init__(self, given: Given, kept: Sequence[Kept], cut: Sequence[str]) -> None:
        self.kept = kept
        self._cut = cut
        self._watched = Watched(given, [*(k.value for k in kept), *cut])
        self._classes, self._probabilities, self._output = class_scores(given.teacher)

    def targets(self, size: int, generator: torch.Generator) -> Tensor | None:
        """Probabilities [size, classes]: each class in turn, with a random certainty."""
        count = self._classes
        if not count:
            return None
        order = torch.randperm(count, generator=generator)
        chosen = order[torch.arange(size) % count]
        sure = 0.6 + 0.38 * torch.rand(size, 1, generator=generator)
        rest = torch.rand(size, count, generator=generator) ** 4
        rest.scatter_(1, chosen[:, None], 0)
        rest = rest / rest.sum(1, keepdim=True).clamp_min(1e-9)
        return (rest * (1 - sure)).scatter_(1, chosen[:, None], sure)

    @property
    def any(self) -> bool:
        return bool(self.kept or self._cut or self._classes)

    def loss(self, inputs: Mapping[str, Tensor], targets: Tensor | None) -> Tensor:
        values = self._watched(inputs)
        outputs, inner = values[: self._watched.count], values[self._watched.count :]
        total = torch.zeros(())
        if self.kept:
            total = total + self.mismatch(inner)
        elif self._cut:
            total = total + torch.stack([_far_off(v) for v in inner]).mean()
        if targets is not None:
            scores = outputs[self._output].flatten(1).float()
            logs = scores.clamp_min(1e-9).log() if self._probabilities else scores.log_softmax(1)
            weight = 0.1 if self.kept else 1.0
            total = total + weight * F.kl_div(logs, targets, reduction="batchmean")
        return total

    def mismatch(self, inner: Sequence[Tensor]) -> Tensor:
        """How far means and deviations are from those kept, in deviations, squared; averaged over
        channels and nodes."""
        parts: list[Tensor] = []
        for kept, value in zip(self.kept, inner, strict=True):
            axes = [a for a in range(value.ndim) if a != 1]
            variance, mean = torch.var_mean(value.float(), axes, correction=0)
            deviation = kept.variance.sqrt()
            parts.append((((mean - kept.mean) / deviation) ** 2).mean())
            parts.append((((variance + 1e-12).sqrt() / deviation - 1) ** 2).mean())
        return torch.stack(parts).mean()


def noise(
    port: Port, size: int, given: Given, options: Synthetic, images: bool,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Standardised noise for a port; of images, noise of several resolutions on top of another."""
    shape = (size, *sample_shape(port, given, options.length or LENGTH))
    if not images:
        return torch.randn(shape, generator=generator)
    total = torch.zeros(shape)
    scale = 1
    while scale <= min(shape[-2:]):
        small = (*shape[:2], math.ceil(shape[2] / scale), math.ceil(shape[3] / scale))
        drawn = torch.randn(small, generator=generator)
        drawn = drawn if scale == 1 else F.interpolate(drawn, shape[2:], mode="bilinear")
        total += drawn * (0.5 if scale == 1 else 1)
        scale *= 2
    return (total - total.mean()) / total.std()


def best_limits(
    options: Synthetic, given: Given, goals: Goals, images: bool
) -> tuple[float, float]:
    """Those of `RANGES` whose noise fits the goals best; the first where there are none."""
    found: list[tuple[float, tuple[float, float]]] = []
    fixed = integer_inputs(given, CHUNK, options, given.rng(options.seed))
    for limits in RANGES if goals.any else RANGES[:1]:
        generator = torch.Generator().manual_seed(_seed(given, options, 0))
        inputs = {name: torch.from_numpy(array) for name, array in fixed.items()}
        for port in given.ports:
            if port.name in fixed:
                continue
            drawn = noise(port, CHUNK, given, options, images, generator).clamp(-3, 3)
            spread = (limits[1] - limits[0]) / 6
            inputs[port.name] = (drawn * spread + sum(limits) / 2).to(_torch_type(port))
        with torch.no_grad():
            found.append((float(goals.loss(inputs, goals.targets(CHUNK, generator))), limits))
    return min(found, key=lambda pair: pair[0])[1]


# -- what the teacher says --------------------------------------------------------------------


def kept_statistics(program: Program) -> list[Kept]:
    """Those of the BatchNormalization nodes of the main graph that read a value of theirs."""
    found: dict[str, Kept] = {}
    for node in program.graph:
        if node.op_type != "BatchNormalization" or node.domain or len(node.inputs) < 5:
            continue
        value, mean, variance = node.inputs[0], constant(node.inputs[3]), constant(node.inputs[4])
        if value is None or mean is None or variance is None or value.is_graph_input():
            continue
        epsilon = node.attributes.get_float("epsilon", 1e-5)
        spread = torch.from_numpy(variance.astype(np.float32)) + epsilon
        means = torch.from_numpy(mean.astype(np.float32))
        found.setdefault(str(value.name), Kept(str(value.name), means, spread))
    return list(found.values())


def read_by_cuts(program: Program) -> list[str]:
    """Values [N, C, ...] that a convolution or a product makes and Relu or Clip reads."""
    found: list[str] = []
    for node in program.graph:
        if node.domain or node.op_type not in ("Relu", "Clip", "PRelu", "LeakyRelu"):
            continue
        value = node.inputs[0]
        maker = value.producer() if value is not None else None
        if value is not None and maker is not None and maker.op_type in ("Conv", "Gemm", "Add"):
            found.append(str(value.name))
    return found


def class_scores(program: Program) -> tuple[int, bool, int]:
    """Of the first output that looks like scores of classes, float [N, C]: how many classes,
    whether it holds probabilities, and its index; (0, False, 0) without any."""
    for index, value in enumerate(program.graph.outputs):
        shape = shape_of(value)
        count = shape[1] if len(shape) == 2 else None
        if not isinstance(count, int) or count < 2 or value.dtype != ir.DataType.FLOAT:
            continue
        maker = value.producer()
        kind = maker.op_type if maker is not None else ""
        if kind in ("Gemm", "MatMul", "Add", "Softmax", "Reshape", "Flatten", "Squeeze"):
            return count, kind == "Softmax", index
    return 0, False, 0


def _far_off(value: Tensor) -> Tensor:
    """How far channels are to one side of zero, beyond `FAR_OFF` of their own deviations."""
    axes = [a for a in range(value.ndim) if a != 1]
    variance, mean = torch.var_mean(value.float(), axes, correction=0)
    ratio = mean.abs() / (variance + 1e-6).sqrt()
    return (F.relu(ratio - FAR_OFF).clamp_max(10) ** 2).mean()


def _variation(value: Tensor) -> Tensor:
    return value.diff(dim=-1).abs().mean() + value.diff(dim=-2).abs().mean()


def _torch_type(port: Port) -> torch.dtype:
    return {"FLOAT": torch.float32, "DOUBLE": torch.float64, "FLOAT16": torch.float16}.get(
        port.dtype, torch.bfloat16
    )


def _array(value: Tensor, port: Port) -> np.ndarray:
    from optcompiler.signature import as_array

    return as_array(value.detach().contiguous(), port).copy()


def _seed(given: Given, options: Synthetic, index: int) -> int:
    return int(given.rng(options.seed).integers(0, 1 << 31)) + index
