"""The C of many programs in one library, so that the compiler starts once for all of them."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.lowering.ir import Lowered
from optcompiler.program import Program
from optcompiler_cpu.backend import emit
from optcompiler_cpu.code import Pointer
from optcompiler_cpu.isa import ISAS, Isa
from optcompiler_cpu.module import PRINTERS, print_tile
from optcompiler_cpu.runner import NUMPY
from optcompiler_cpu.toolchain import compiler
from tests.fuzz.oracles import Judged, Statistics, Wrong, agreement, typical

ALIGNMENT = 64
GUARD = 64
"""Bytes around every output that a kernel must not touch."""
FILL = 0xA5
FLAGS = ("-std=gnu11", "-O1", "-fPIC", "-shared", "-w", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math")  # fmt: skip

Found = tuple[Judged, Exception]
_COUNT = itertools.count()


@dataclass
class Batch:
    """Programs that wait for the compiler; kernels of equal text are compiled once."""

    isa: Isa = ISAS["portable"]
    kernels: dict[str, str] = field(default_factory=dict)
    tiles: set[tuple[str, int, int]] = field(default_factory=set)
    waiting: list[tuple[Judged, Prepared]] = field(default_factory=list)

    def add(self, judged: Judged, statistics: Statistics) -> None:
        """Print the program's kernels. An operator without a kernel is counted, not wrong."""
        try:
            prepared = self._prepare(judged.program)
        except UnsupportedOperatorError as error:
            statistics.unsupported[str(error).split(":")[0].split(" '")[0]] += 1
            return
        self.waiting.append((judged, prepared))
        statistics.compiled += 1

    def _prepare(self, program: Program) -> Prepared:
        (lowered,), _ = emit(program, [self.isa])
        steps: list[tuple[str, list[Pointer]]] = []
        scratch = ALIGNMENT
        for step in lowered.steps:
            code = PRINTERS[type(step)](step, self.isa)
            self.tiles |= code.tiles
            scratch = max(scratch, code.scratch_bytes)
            name = self.kernels.setdefault(code.text, f"kernel_{len(self.kernels)}")
            steps.append((name, code.pointers))
        return Prepared(lowered, steps, scratch)

    def run(self, directory: Path) -> Iterator[Found]:
        """What is wrong with the programs that wait. They run in another process, which may die."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        try:
            library = self._build(directory)
        except Wrong as error:
            if len(waiting) == 1:
                yield waiting[0][0], error
                return
            for part in (waiting[: len(waiting) // 2], waiting[len(waiting) // 2 :]):
                half = Batch(self.isa)
                for judged, _ in part:
                    half.add(judged, Statistics())
                yield from half.run(directory)
            return
        begin = 0
        while begin < len(waiting):
            done = begin
            for index, outputs in _outside(lambda i: waiting[i][1].run(library, waiting[i][0]),
                                           range(begin, len(waiting))):  # fmt: skip
                done = index + 1
                try:
                    _judge(waiting[index][0], outputs)
                except Wrong as error:
                    yield waiting[index][0], error
            if done < len(waiting):
                yield waiting[done][0], Wrong("cpu", "the process that ran it died")
                done += 1
            begin = done

    def _build(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        runtime = resources.files("optcompiler_cpu") / "runtime"
        headers = [p.name for p in runtime.iterdir() if p.name.endswith(".h")]
        for name in headers:
            (directory / name).write_text((runtime / name).read_text())
        headers.sort(key=lambda name: (name != "simd.h", name))
        text = "\n".join(
            [
                "#include <stdint.h>",
                "struct oc_block { int n, stop, vectors, rows, tiles; long init, a, w; };",
                *(f'#include "{name}"' for name in headers),
                *(print_tile(*tile) for tile in sorted(self.tiles)),
                *(text.replace("@", name) for text, name in self.kernels.items()),
            ]
        )
        # a library that is loaded is not read again from the same path
        stem = f"batch{next(_COUNT)}"
        source, library = directory / f"{stem}.c", directory / f"{stem}.so"
        source.write_text(text, encoding="utf-8")
        command = [*compiler(), *FLAGS, f"-D{self.isa.macro}", *self.isa.flags, source.name,
                   "-o", library.name, "-lm"]  # fmt: skip
        made = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
        if made.returncode:
            raise Wrong("cpu", f"the C does not compile: {made.stderr[:2000]}")
        return library


@dataclass(frozen=True)
class Prepared:
    """A program whose kernels are in the library: which of them in order, and on what."""

    lowered: Lowered
    steps: Sequence[tuple[str, list[Pointer]]]
    scratch_bytes: int

    def run(self, library: Path, judged: Judged) -> list[np.ndarray]:
        functions = ctypes.CDLL(str(library))
        arena = _aligned(self.lowered.arena_bytes + 2 * ALIGNMENT)
        scratch = _aligned(self.scratch_bytes)
        kept: list[np.ndarray] = []
        outputs: list[np.ndarray] = []
        places: dict[int, int] = {}
        for port in self.lowered.inputs:
            array = np.ascontiguousarray(judged.case.inputs[port.name])
            kept.append(array)
            places[port.buffer.index] = array.ctypes.data
        for port in self.lowered.outputs:
            held = _aligned(2 * GUARD + port.buffer.size_bytes)
            held[:] = FILL
            outputs.append(held)
            places[port.buffer.index] = held.ctypes.data + GUARD

        def place(pointer: Pointer) -> int:
            array, buffer = pointer.data, pointer.buffer
            if pointer.params is not None:
                array = np.array(pointer.params.values, np.float64).astype(np.float32)
            if buffer is not None and buffer.kind == "constant":
                array = buffer.array
            if array is not None:
                data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
                held = _aligned(len(data) + 2 * ALIGNMENT)
                held[: len(data)] = data
                kept.append(held)
                return held.ctypes.data
            assert buffer is not None
            if buffer.kind == "temp":
                return arena.ctypes.data + buffer.offset
            return places[buffer.index]

        for name, pointers in self.steps:
            table = (ctypes.c_void_p * max(len(pointers), 1))(*map(place, pointers))
            getattr(functions, name)(0, 1, table, ctypes.c_void_p(scratch.ctypes.data))
        results: list[np.ndarray] = []
        for port, held in zip(self.lowered.outputs, outputs, strict=True):
            if (held[:GUARD] != FILL).any() or (
                held[GUARD + port.buffer.size_bytes :] != FILL
            ).any():
                raise Wrong("cpu", f"output {port.name!r} is written outside its memory")
            inside = held[GUARD : GUARD + port.buffer.size_bytes]
            results.append(inside.view(NUMPY[port.dtype]).reshape(port.shape).copy())
        return results


def _aligned(size: int) -> np.ndarray:
    held = np.zeros(size + ALIGNMENT, np.uint8)
    begin = -held.ctypes.data % ALIGNMENT
    return held[begin : begin + size]


def _outside(task: Callable[[int], Any], indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """`task` of each index in a forked process; ends early where that dies."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(task, indices, sender))
    process.start()
    sender.close()
    try:
        while True:
            yield receiver.recv()
    except EOFError:
        process.join()


def _serve(task: Callable[[int], Any], indices: Sequence[int], sender: Connection) -> None:
    for index in indices:
        try:
            result: Any = task(index)
        except Wrong as error:
            result = error
        sender.send((index, result))


def _judge(judged: Judged, outputs: Sequence[np.ndarray] | Wrong) -> None:
    if isinstance(outputs, Wrong):
        raise outputs
    if judged.loose:
        typical("cpu", outputs, judged.outputs)
    else:
        agreement("cpu", judged.case, outputs)
