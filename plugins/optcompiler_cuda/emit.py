"""A lowered program as Triton source, a schedule and weights."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.lowering.ir import (
    Buffer,
    Conv,
    CumSum,
    Gather,
    Loop,
    Lowered,
    MatMul,
    Normalization,
    Pooling,
    Reduction,
    Softmax,
    Step,
)
from optcompiler_cuda.contractions import print_conv, print_matmul
from optcompiler_cuda.elementwise import print_depthwise, print_gather, print_loop
from optcompiler_cuda.helpers import helpers_for
from optcompiler_cuda.rows import (
    print_cumsum,
    print_normalization,
    print_pooling,
    print_reduction,
    print_softmax,
)
from optcompiler_cuda.schedule import (
    KERNELS,
    WEIGHTS,
    BufferEntry,
    Launch,
    Schedule,
    Specialisation,
)
from optcompiler_cuda.spaces import Printed
from optcompiler_cuda.text import TORCH, Packed

HEAD = '''\
"""Triton kernels of one compiled model; `schedule.json` says how they are launched."""

import triton
import triton.language as tl
'''

PLACEHOLDER = "KERNEL"


def _conv(step: Conv) -> Printed:
    return print_depthwise(step) if step.depthwise else print_conv(step)


PRINTERS: Mapping[type[Step], Callable[[Any], Printed]] = {
    Loop: print_loop, MatMul: print_matmul, Conv: _conv, Reduction: print_reduction,
    Softmax: print_softmax, Normalization: print_normalization, Pooling: print_pooling,
    Gather: print_gather, CumSum: print_cumsum,
}  # fmt: skip


@dataclass(frozen=True)
class Emitted:
    """`source` is the text of kernels.py; `weights` the tensors of the weights file by name."""

    source: str
    schedule: Schedule
    weights: Mapping[str, np.ndarray]

    def write(self, directory: Path) -> None:
        """Write the three files that an artifact runs from."""
        from safetensors.numpy import save_file

        (directory / KERNELS).write_text(self.source)
        self.schedule.write(directory)
        save_file(dict(self.weights), directory / WEIGHTS)


@dataclass
class Emitter:
    """Collects functions, specialisations, buffers and weights; equal ones are kept once."""

    lowered: Lowered
    functions: dict[str, str] = field(default_factory=dict[str, str])
    sources: list[str] = field(default_factory=list[str])
    specialisations: dict[str, Specialisation] = field(default_factory=dict[str, Specialisation])
    buffers: dict[str, BufferEntry] = field(default_factory=dict[str, BufferEntry])
    weights: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    names: dict[str, str] = field(default_factory=dict[str, str])
    launches: list[Launch] = field(default_factory=list[Launch])

    def add(self, step: Step) -> None:
        """Print one step."""
        if step.out.elements == 0:
            return
        printer = PRINTERS.get(type(step))
        if printer is None:
            raise UnsupportedOperatorError(
                f"the cuda backend prints no {type(step).__name__} step ({step.name} of nodes "
                f"{', '.join(step.nodes)}); use target onnxruntime."
            )
        printed = printer(step)
        kernel = self._specialise(printed)
        args = tuple(self.buffer(source) for _, _, source in printed.text.pointers)
        self.launches.append(Launch(step.name, kernel, (printed.grid, 1, 1), args))

    def _specialise(self, printed: Printed) -> str:
        text = printed.text.function(PLACEHOLDER)
        function = self.functions.get(text)
        if function is None:
            function = f"{printed.kind}_{len(self.functions)}"
            self.functions[text] = function
            self.sources.append(text.replace(f"def {PLACEHOLDER}(", f"def {function}(", 1))
        made = Specialisation(
            id="",
            function=function,
            signature=printed.text.signature(),
            constexprs=printed.text.constexprs,
            num_warps=printed.num_warps,
            num_stages=printed.num_stages,
        )
        known = self.specialisations.get(repr(made))
        if known is None:
            count = sum(s.function == function for s in self.specialisations.values())
            known = dataclasses.replace(made, id=f"{function}_{count}")
            self.specialisations[repr(made)] = known
        return known.id

    def buffer(self, source: Buffer | Packed) -> str:
        """The name of the device buffer that holds `source`."""
        if isinstance(source, Packed):
            return self._weight(source.array)
        if source.array is not None:
            return self._weight(source.array.reshape(-1))
        name = f"b{source.index}"
        place = "arena" if source.kind == "temp" else source.kind
        self.buffers[name] = BufferEntry(
            name, TORCH[source.dtype], (source.elements,), place, max(source.offset, 0)
        )
        return name

    def _weight(self, array: np.ndarray) -> str:
        array = np.ascontiguousarray(array)
        if array.dtype == np.bool_:
            array = array.view(np.uint8)
        digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        key = digest.hexdigest()
        if key not in self.names:
            name = f"w{len(self.weights)}"
            self.names[key] = name
            self.weights[name] = array
            self.buffers[name] = BufferEntry(name, array.dtype.name, array.shape, "weight")
        return self.names[key]

    def finished(self) -> Emitted:
        for port in (*self.lowered.inputs, *self.lowered.outputs):
            name = self.buffer(port.buffer)
            if port.buffer.array is None:
                self.buffers[name] = BufferEntry(
                    name,
                    TORCH[port.dtype],
                    port.shape,
                    port.buffer.kind,
                    port=port.name,
                    boolean=port.dtype == "BOOL",
                )
        schedule = Schedule(
            arena_bytes=self.lowered.arena_bytes,
            buffers=tuple(self.buffers[k] for k in sorted(self.buffers, key=_natural)),
            inputs=tuple(self.buffer_name(p.buffer) for p in self.lowered.inputs),
            outputs=tuple(self.buffer_name(p.buffer) for p in self.lowered.outputs),
            specialisations=tuple(self.specialisations.values()),
            launches=tuple(self.launches),
        )
        text = "\n\n".join([HEAD, *helpers_for(self.sources), *self.sources])
        return Emitted(text, schedule, self.weights)

    def buffer_name(self, buffer: Buffer) -> str:
        return f"b{buffer.index}"


def _natural(name: str) -> tuple[str, int]:
    return name[0], int(name[1:])


def emit(lowered: Lowered) -> Emitted:
    """Print every step of `lowered`.

    Raises `UnsupportedOperatorError` naming the step and its nodes.
    """
    emitter = Emitter(lowered)
    for step in lowered.steps:
        emitter.add(step)
    return emitter.finished()
