"""Calibration data as mini-batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from optcompiler.program import Program
from optcompiler.rewriting import Batch

Tensor = torch.Tensor


def sample_count(batches: Sequence[Batch]) -> int:
    """Samples in the batches: the sizes of their first axes."""
    return sum(size_of(b) for b in batches)


def size_of(batch: Batch) -> int:
    first = next(iter(batch.values()), None)
    return int(first.shape[0]) if first is not None and first.ndim else 1


class Samples:
    """Calibration data as mini-batches of the size asked for, in a random order, mixed.

    Batches whose inputs do not share their first axis, or differ in their other axes, are used as
    they were given.
    """

    def __init__(
        self,
        program: Program,
        batches: Sequence[Batch],
        augment: bool,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        names = [p.name for p in program.inputs]
        self.generator = generator
        self.given = [[torch.from_numpy(np.array(b[n])).to(device) for n in names] for b in batches]
        self.joined = self._join()
        self.augment = augment and all(t.is_floating_point() for t in self.given[0])
        self.size = 1
        self._queue: list[int] = []

    def _join(self) -> list[Tensor] | None:
        for row in self.given:
            like = zip(row, self.given[0], strict=True)
            if any(t.ndim == 0 or t.shape[0] != row[0].shape[0] for t in row):
                return None
            if any(t.shape[1:] != f.shape[1:] for t, f in like):
                return None
        return [torch.cat(columns) for columns in zip(*self.given, strict=True)]

    def draw(self) -> list[Tensor]:
        """The inputs of one mini-batch."""
        if self.joined is None:
            return self.given[self._next(1, len(self.given))[0]]
        total = self.joined[0].shape[0]
        rows = torch.tensor(self._next(self.size, total))
        picked = [t[rows.to(t.device)] for t in self.joined]
        if not self.augment:
            return picked
        order = torch.randperm(len(rows), generator=self.generator)
        keep = 1 - 0.5 * torch.rand(len(rows), generator=self.generator)
        keep = torch.where(torch.rand(len(rows), generator=self.generator) < 0.5, keep, 1.0)
        return [_mix(t, order.to(t.device), keep.to(t.device, t.dtype)) for t in picked]

    def _next(self, count: int, total: int) -> list[int]:
        while len(self._queue) < count:
            self._queue += torch.randperm(total, generator=self.generator).tolist()
        taken, self._queue = self._queue[:count], self._queue[count:]
        return taken


def _mix(samples: Tensor, order: Tensor, keep: Tensor) -> Tensor:
    keep = keep.reshape([-1] + [1] * (samples.ndim - 1))
    return keep * samples + (1 - keep) * samples[order]
