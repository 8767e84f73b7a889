"""Running a schedule on torch tensors: on a GPU, or on the CPU under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optcompiler_cuda.schedule import (
    ITEM_BYTES,
    WEIGHTS,
    BufferEntry,
    Launch,
    Schedule,
    load_kernels,
)

if TYPE_CHECKING:
    import torch

FUSE_MULTIPLY_ADD = False
"""Off, as ONNX says: rounding to int8 falls in the same places. `tl.dot` keeps its own fusion."""


class Executor:
    """Buffers, kernels and launches of one artifact on one device ("cuda" or "cpu").

    Needs torch and triton; on "cpu" the process must have started with `TRITON_INTERPRET=1`.
    """

    def __init__(self, directory: Path, device: str) -> None:
        import torch
        from safetensors.torch import load_file

        self.schedule = Schedule.read(directory)
        self.device = device
        self.arena = torch.zeros(self.schedule.arena_bytes, dtype=torch.uint8, device=device)
        self.weights = load_file(directory / WEIGHTS, device=device)
        self.tensors = {b.name: self._tensor(b) for b in self.schedule.buffers}
        module = load_kernels(directory)
        kernels = {s.id: s for s in self.schedule.specialisations}
        options: dict[str, Any] = {} if device == "cpu" else {"enable_fp_fusion": FUSE_MULTIPLY_ADD}
        self.calls: list[tuple[Launch, Callable[[], object]]] = []
        for launch in self.schedule.launches:
            kernel = kernels[launch.kernel]
            bound = getattr(module, kernel.function)[launch.grid]
            args = [self.tensors[a] for a in launch.args]
            keywords = {
                **kernel.constexprs,
                "num_warps": kernel.num_warps,
                "num_stages": kernel.num_stages,
                **options,
            }
            self.calls.append((launch, _call(bound, args, keywords)))

    def _tensor(self, buffer: BufferEntry) -> torch.Tensor:
        import torch

        dtype = getattr(torch, buffer.dtype)
        if buffer.place == "weight":
            return self.weights[buffer.name]
        if buffer.place == "arena":
            size = int(np.prod(buffer.shape, dtype=np.int64)) * ITEM_BYTES[buffer.dtype]
            return self.arena[buffer.offset : buffer.offset + size].view(dtype).view(buffer.shape)
        return torch.zeros(buffer.shape, dtype=dtype, device=self.device)

    def put(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Copy the inputs, by port name, into their buffers."""
        import torch

        ports = {b.name: b.port for b in self.schedule.buffers}
        for name in self.schedule.inputs:
            array = np.ascontiguousarray(inputs[ports[name]])
            tensor = self.tensors[name]
            tensor.copy_(torch.from_numpy(array).view(tensor.shape))

    def launch(self) -> None:
        """Enqueue every kernel once."""
        for _, call in self.calls:
            call()

    def get(self) -> list[np.ndarray]:
        """The outputs, in graph order, in host memory of their own."""
        boolean = {b.name for b in self.schedule.buffers if b.boolean}
        arrays = {n: self.tensors[n].to("cpu", copy=True).numpy() for n in self.schedule.outputs}
        return [a.view(np.bool_) if n in boolean else a for n, a in arrays.items()]


def _call(
    bound: Callable[..., object], args: list[torch.Tensor], keywords: dict[str, Any]
) -> Callable[[], object]:
    return lambda: bound(*args, **keywords)
