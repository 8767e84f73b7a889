"""Runners of an artifact: on a GPU through torch, or by Triton's interpreter in a worker."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from optcompiler.backend import Runner
from optcompiler_cuda.executor import Executor
from optcompiler_cuda.worker import Worker

if TYPE_CHECKING:
    import torch


class GpuRunner(Runner):
    """Weights are uploaded once; the first run compiles the kernels, the second is captured as a
    CUDA graph, which later runs replay."""

    def __init__(self, directory: Path) -> None:
        self.executor = Executor(directory, "cuda")
        self.runs = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        import torch

        self.executor.put(inputs)
        if self.runs == 1:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.executor.launch()
        if self.graph is not None:
            self.graph.replay()
        else:
            self.executor.launch()
        self.runs += 1
        return self.executor.get()

    def kernel_times_us(self, inputs: Mapping[str, np.ndarray]) -> dict[str, float] | None:
        import torch

        self.executor.put(inputs)
        self.executor.launch()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(self.executor.calls) + 1)]
        marks[0].record()
        for (_, call), mark in zip(self.executor.calls, marks[1:], strict=True):
            call()
            mark.record()
        torch.cuda.synchronize()
        spans = [a.elapsed_time(b) * 1e3 for a, b in pairwise(marks)]
        return {
            launch.name: span for (launch, _), span in zip(self.executor.calls, spans, strict=True)
        }


class InterpretedRunner(Runner):
    """A worker process that interprets the kernels on the CPU."""

    timed = False

    def __init__(self, directory: Path, threads: int) -> None:
        self.worker = Worker(directory, threads)

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return self.worker.run(inputs)

    def close(self) -> None:
        self.worker.close()
