"""The schedule of an artifact: which kernels run, on which buffers, in which order.

`schedule.json` beside `kernels.py` and `weights.safetensors` is all that running needs.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

FORMAT = 1
SCHEDULE = "schedule.json"
KERNELS = "kernels.py"
WEIGHTS = "weights.safetensors"

ITEM_BYTES = {
    "float32": 4, "float64": 8, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True)
class BufferEntry:
    """A tensor in device memory.

    `place` is "arena" (at `offset` bytes), "weight" (the tensor `name` of the weights file),
    "input" or "output" (the port named `port`). A port of truth values is `boolean`, its bytes 0
    or 1.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    place: str
    offset: int = 0
    port: str = ""
    boolean: bool = False


@dataclass(frozen=True)
class Specialisation:
    """A function of `kernels.py` with its compile-time arguments.

    `signature` gives the type of each run-time argument, in order; `constexprs` the values of the
    others by name.
    """

    id: str
    function: str
    signature: dict[str, str]
    constexprs: dict[str, int]
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Launch:
    """One launch: `args` are buffer names, in the order of the signature."""

    name: str
    kernel: str
    grid: tuple[int, int, int]
    args: tuple[str, ...]


@dataclass(frozen=True)
class Schedule:
    """Everything about an artifact but code and weights."""

    arena_bytes: int
    buffers: tuple[BufferEntry, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    specialisations: tuple[Specialisation, ...]
    launches: tuple[Launch, ...]
    format: int = FORMAT
    notes: dict[str, Any] = field(default_factory=dict[str, Any])

    def write(self, directory: Path) -> None:
        text = json.dumps(asdict(self), indent=1, sort_keys=True)
        (directory / SCHEDULE).write_text(text + "\n")

    @classmethod
    def read(cls, directory: Path) -> Schedule:
        data = json.loads((directory / SCHEDULE).read_text())
        if data["format"] != FORMAT:
            from optcompiler.errors import InputError

            raise InputError(
                f"{directory / SCHEDULE}: format {data['format']}, this version reads {FORMAT}; "
                f"compile the model again."
            )
        buffers: list[dict[str, Any]] = [b | {"shape": tuple(b["shape"])} for b in data["buffers"]]
        launches: list[dict[str, Any]] = [
            l | {"grid": tuple(l["grid"]), "args": tuple(l["args"])} for l in data["launches"]
        ]
        return cls(
            arena_bytes=data["arena_bytes"],
            buffers=tuple(BufferEntry(**b) for b in buffers),
            inputs=tuple(data["inputs"]),
            outputs=tuple(data["outputs"]),
            specialisations=tuple(Specialisation(**s) for s in data["specialisations"]),
            launches=tuple(Launch(**launch) for launch in launches),
            notes=data["notes"],
        )


def load_kernels(directory: Path) -> ModuleType:
    """Import `kernels.py` of the artifact, under a name of its own.

    This runs code from the artifact. The core has compared the hashes of all its files with the
    manifest before a backend loads it, so it runs what the compiler wrote.
    """
    spec = importlib.util.spec_from_file_location("optcompiler_kernels", directory / KERNELS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module
