"""Backend cpu as a subject.

One process compiles each text once, without optimisation and for any x86-64: a tenth of the time of
what a user gets. With `OPTCOMPILER_CONFORMANCE=full`, and in nightly runs, every artifact is built
as `compile` builds it for this machine.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from optcompiler.binding import bind
from optcompiler.program import Program
from optcompiler.target import Target
from optcompiler_cpu.backend import CpuBackend, emit
from optcompiler_cpu.isa import ISAS
from optcompiler_cpu.module import describe
from optcompiler_cpu.runner import CpuRunner
from optcompiler_cpu.toolchain import compiler
from tests.conformance.cases import Case
from tests.conformance.runner import Exclusion, Subject, compare

FULL = os.environ.get("OPTCOMPILER_CONFORMANCE") == "full"


class Cpu(Subject):
    name: ClassVar[str] = "cpu"
    floors: ClassVar[Mapping[str, int]] = {
        "node": 1360,
        "simple": 7,
        "pytorch-converted": 80,
        "pytorch-operator": 34,
    }
    exclusions: ClassVar[Sequence[Exclusion]] = ()

    def check(self, case: Case) -> None:
        program = Program.from_onnx(case.model)
        sizes = {
            dim: np.shape(case.data[0][0][p.name])[axis]
            for p in program.inputs
            for axis, dim in enumerate(p.shape)
            if isinstance(dim, str) and p.name in case.data[0][0]
        }
        program = bind(program, sizes) if sizes else program
        with tempfile.TemporaryDirectory() as scratch:
            runner = (full if FULL else quick)(program, Path(scratch))
            try:
                for inputs, expected in case.data:
                    named = {p.name: np.asarray(inputs[p.name]) for p in program.inputs}
                    compare(runner.run(named), expected, case)
            finally:
                runner.close()

    def run(self, program: Program, inputs: Mapping[str, Any]) -> Sequence[Any]:
        raise AssertionError("a program is compiled once for all its inputs")


def full(program: Program, directory: Path) -> CpuRunner:
    backend = CpuBackend()
    info = backend.lower(program, Target("cpu"), directory)
    runner = backend.load(directory, info, threads=1)
    assert isinstance(runner, CpuRunner)
    return runner


def quick(program: Program, directory: Path) -> CpuRunner:
    (lowered,), module = emit(program, [ISAS["portable"]])
    (directory / f"{module.name}.weights").write_bytes(b"".join(module.weights))
    library = built(tuple(sorted(module.sources.items())), f"lib{module.name}.so")
    (directory / library.name).symlink_to(library)
    return CpuRunner(directory, module.name, describe(lowered), 1)


@functools.cache
def libraries() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="optcompiler-conformance-")


def built(sources: tuple[tuple[str, str], ...], name: str) -> Path:
    """The library of these texts, compiled as one translation unit."""
    key = hashlib.sha256(repr(sources).encode()).hexdigest()
    library = Path(libraries().name) / key / name
    if not library.exists():
        (library.parent / "src").mkdir(parents=True, exist_ok=True)
        units = [path for path, _ in sources if path.endswith(".c")]
        (library.parent / "unit.c").write_text("".join(f'#include "{u}"\n' for u in units))
        for path, text in sources:
            (library.parent / path).write_text(text, encoding="utf-8")
        flags = ["-std=c11", "-O0", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
                 "-D_POSIX_C_SOURCE=200809L"]  # fmt: skip
        done = subprocess.run(
            [*compiler(), *flags, f"-D{ISAS['portable'].macro}", "-shared", "-Wall", "-Werror",
             "unit.c", "-o", name, "-lm", "-lpthread"],
            cwd=library.parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert not done.returncode, done.stderr[:2000]
    return library
