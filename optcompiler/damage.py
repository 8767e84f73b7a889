"""Judging a student against the teacher: damage on calibration batches, and exactness of rewrites.

Measures, each an average over samples, 0 when the outputs agree:

- `kl`: Kullback-Leibler divergence in nats of the student's output distribution from the teacher's,
  KL(softmax(t) || softmax(s)) over the last axis. Blind to what softmax is blind to (a constant
  added to all logits), so outputs that are not scores are better judged by `nmse`. An output whose
  last axis has one element is judged by `nmse`.
- `nmse`: mean squared error over the variance of the teacher's output (1 - R²).

An output that is not floating point counts the share of elements that differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from optcompiler.errors import InputError
from optcompiler.executor import argument_of, to_torch
from optcompiler.ops.types import tensor_of

if TYPE_CHECKING:
    from optcompiler.ops import OpTable
    from optcompiler.program import Program

Batch = Mapping[str, np.ndarray]
Outputs = Sequence[torch.Tensor]

ROUNDING = 1e-9
"""Damage below this is what float arithmetic in another order does; it counts as none."""


def kl(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """Mean KL divergence in nats over the last axis of `[..., C]`; see the module for C = 1."""
    if teacher.ndim == 0 or teacher.shape[-1] < 2:
        return nmse(teacher, student)
    t = torch.log_softmax(teacher.double(), -1)
    s = torch.log_softmax(student.double(), -1)
    terms = torch.where(t.isneginf(), 0.0, t.exp() * (t - s))
    return max(float(terms.sum(-1).mean()), 0.0)


def nmse(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """Mean squared error relative to the variance of the teacher's output.

    Of finite elements; infinite where infinities are not in the same places.
    """
    t, s = teacher.double(), student.double()
    if not bool(t.isfinite().all()):
        if not _same_where_not_finite(t, s):
            return float("inf")
        t, s = t[t.isfinite()], s[t.isfinite()]
        if not t.numel():
            return 0.0
    spread = float((t - t.mean()).square().mean()) or float(t.square().mean()) or 1.0
    return float((t - s).square().mean()) / spread


def _same_where_not_finite(one: torch.Tensor, other: torch.Tensor) -> bool:
    rest = ~one.isfinite()
    return torch.equal(rest, ~other.isfinite()) and torch.equal(
        one[rest].nan_to_num(), other[rest].nan_to_num()
    )


MEASURES: dict[str, Callable[[torch.Tensor, torch.Tensor], float]] = {"kl": kl, "nmse": nmse}


def _one(measure: Callable[[torch.Tensor, torch.Tensor], float], t: torch.Tensor,
         s: torch.Tensor) -> float:  # fmt: skip
    if t.numel() == 0:
        return 0.0
    if not t.is_floating_point():
        return float((t != s).double().mean())
    value = measure(t, s)
    return value if np.isfinite(value) else float("inf")


class Judge:
    """The teacher's outputs on some batches, and how far other programs are from them.

    Runs programs through the FX executor. Raises `InputError` for an unknown measure, or when the
    teacher itself gives NaN on the batches.
    """

    def __init__(
        self, teacher: Program, batches: Sequence[Batch], ops: OpTable, measure: str = "kl"
    ) -> None:
        if measure not in MEASURES:
            raise InputError(f"no damage measure {measure!r}; there is {', '.join(MEASURES)}.")
        self.ops = ops
        self.batches = list(batches)
        self._measure = MEASURES[measure]
        self._teacher = self.outputs(teacher)
        for outputs in self._teacher:
            for name, value in zip(teacher.outputs, outputs, strict=True):
                if value.is_floating_point() and bool(value.isnan().any()):
                    raise InputError(
                        f"the model gives NaN in output {name.name!r} on the calibration data; "
                        f"check the weights and the inputs."
                    )

    def outputs(self, program: Program) -> list[Outputs]:
        """Outputs of `program`, batch by batch."""
        return run_batches(program, self.batches, self.ops)

    def damage(self, student: Program) -> float:
        """Mean damage of a program over outputs and samples."""
        return self._mean(self.outputs(student))

    def damage_of(self, run: Callable[[Batch], Sequence[np.ndarray]]) -> float:
        """Mean damage of anything that maps a batch to outputs in graph order."""
        return self._mean([as_tensors(run(b)) for b in self.batches])

    def _mean(self, outputs: Sequence[Outputs]) -> float:
        total = weight = 0.0
        for batch, teacher, got in zip(self.batches, self._teacher, outputs, strict=True):
            samples = max((a.shape[0] for a in batch.values() if a.ndim), default=1)
            for t, s in zip(teacher, got, strict=True):
                total += samples * _one(self._measure, t, s)
                weight += samples
        mean = total / weight if weight else 0.0
        return mean if mean > ROUNDING else 0.0


def run_batches(program: Program, batches: Sequence[Batch], ops: OpTable) -> list[Outputs]:
    """Outputs of the program on each batch through the FX executor, without gradients."""
    module = to_torch(program, ops, trainable=False)
    names = [p.name for p in program.inputs]
    results: list[Outputs] = []
    with torch.no_grad():
        for batch in batches:
            results.append(as_tensors(module(*(argument_of(batch[n]) for n in names))))
    return results


def as_tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    """Outputs as tensors to compare: strings become code points, a sequence its length and items.

    An empty optional is a length of -1.
    """
    found: list[torch.Tensor] = []
    for value in values:
        if value is None or isinstance(value, list):
            items = cast("list[Any]", value or [])
            found.append(torch.tensor(-1 if value is None else len(items)))
            found += as_tensors(items)
        elif isinstance(value, torch.Tensor):
            found.append(value.detach())
        elif (array := np.asarray(value)).dtype.kind in "OSU":
            texts = np.char.encode(array.astype(str), "utf-8")
            found.append(torch.tensor(np.frombuffer(texts.tobytes(), np.uint8)))
            found.append(torch.tensor(texts.shape))
        else:
            found.append(tensor_of(np.array(array)))
    return found


def largest_error(expected: Sequence[Outputs], got: Sequence[Outputs]) -> float:
    """The largest absolute difference, relative to the largest magnitude of each output.

    NaNs and infinities must be in the same places, and outputs that are not floating point equal;
    otherwise the error is infinite.
    """
    worst = 0.0
    for before, after in zip(expected, got, strict=True):
        for e, g in zip(before, after, strict=True):
            if e.shape != g.shape or e.dtype != g.dtype:
                return float("inf")
            if e.numel() == 0:
                continue
            if not e.is_floating_point():
                if not torch.equal(e, g):
                    return float("inf")
                continue
            if not _same_where_not_finite(e, g):
                return float("inf")
            finite = e.isfinite()
            if not bool(finite.any()):
                continue
            scale = float(e[finite].abs().max()) or 1.0
            worst = max(worst, float((e[finite] - g[finite]).abs().max()) / scale)
    return worst


def typical_error(expected: Sequence[Outputs], got: Sequence[Outputs]) -> float:
    """The largest over outputs of rms(difference) / rms(expected), of finite elements.

    Infinite for other shapes and types, and where NaNs or infinities are not in the same places.
    """
    worst = 0.0
    for before, after in zip(expected, got, strict=True):
        for e, g in zip(before, after, strict=True):
            if e.shape != g.shape or e.dtype != g.dtype:
                return float("inf")
            if e.numel() == 0:
                continue
            e, g = e.double(), g.double()
            if not _same_where_not_finite(e, g):
                return float("inf")
            e, g = e[e.isfinite()], g[e.isfinite()]
            if not e.numel():
                continue
            scale = float(e.square().mean().sqrt()) or 1.0
            error = float((e - g).square().mean().sqrt()) / scale
            worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst
