"""Backend `cpu`: a program as C source and a shared library that needs libc and threads alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from optcompiler.backend import Backend, Capabilities, Kernel, Runner
from optcompiler.choices import Choices
from optcompiler.errors import InputError
from optcompiler.lowering import kernel_of, lower, plan
from optcompiler.lowering.ir import Conv, Lowered, Step
from optcompiler.program import Program
from optcompiler.target import Target
from optcompiler_cpu.isa import ISAS, Isa, pick_isa, supported
from optcompiler_cpu.legalize import legalize
from optcompiler_cpu.module import Module, describe, print_module
from optcompiler_cpu.runner import CpuRunner
from optcompiler_cpu.toolchain import build, compiler, compiler_version
from optcompiler_cpu.winograd import is_winograd, multiplications

LIBRARY = "libnet.so"
WEIGHTS = "net.weights"


def emit(program: Program, isa: Isa) -> tuple[Lowered, Module]:
    """The program in the form that is printed, and the text and weights of its artifact."""
    lowered = lower(program, plan=False)
    legalize(lowered, isa)
    plan(lowered)
    return lowered, print_module(lowered, isa)


class CpuBackend(Backend):
    """Writes C11 with GCC's intrinsics and compiles it with `CC`.

    Option `isa`: "amx_int8", "avx512_vnni", "avx2", "portable", or "native" (the default: the best
    this machine has). Integer arithmetic gives the same numbers on each.
    """

    name = "cpu"
    summary = "C source and a shared library for x86-64, specialised on shapes and weights"

    def spelled_out(self, target: Target) -> Target:
        isa = pick_isa(target.options).name
        options = {**target.options, "isa": isa}
        return Target("cpu", threads=target.threads, sizes=target.sizes, **options)

    def capabilities(self, target: Target) -> Capabilities:
        pick_isa(target.options)
        return Capabilities(
            precisions=frozenset({"fp32", "int8"}),
            integer_ops=frozenset(
                {"Conv", "MatMul", "Gemm", "Add", "MaxPool", "AveragePool", "GlobalAveragePool"}
            ),
            fusions=frozenset(
                {"contraction", "pointwise", "normalization", "softmax", "attention"}
            ),
        )

    def kernels(self, program: Program, target: Target) -> Sequence[Kernel]:
        isa = pick_isa(target.options)
        lowered = lower(program, plan=False, values=False)
        return [_as_printed(step, kernel_of(step), isa) for step in lowered.steps]

    def lower(
        self, program: Program, target: Target, directory: Path, choices: Choices | None = None
    ) -> Mapping[str, Any]:
        isa = pick_isa(target.options)
        compiler()
        lowered, module = emit(program, isa)
        for name, text in module.sources.items():
            (directory / name).write_text(text, encoding="utf-8")
        (directory / WEIGHTS).write_bytes(module.weights)
        sources = [name for name in module.sources if name.endswith(".c")]
        build(directory, sources, (f"-D{isa.macro}", *isa.flags), LIBRARY)
        return {
            "isa": isa.name,
            "library": LIBRARY,
            "header": "net.h",
            "weights": WEIGHTS,
            "sources": sorted(module.sources),
            "steps": list(module.steps),
            "arena_bytes": lowered.arena_bytes,
            "ports": describe(lowered),
        }

    def load(self, directory: Path, info: Mapping[str, Any], *, threads: int) -> Runner:
        isa = ISAS.get(str(info["isa"]))
        if isa is None or not supported(isa):
            raise InputError(
                f"the artifact is for isa={info['isa']!r}, which this machine does not have; "
                f"compile with isa=portable."
            )
        return CpuRunner(
            directory / LIBRARY, directory / WEIGHTS, info["ports"], info["steps"], threads
        )

    def versions(self) -> Mapping[str, str]:
        return {"cc": compiler_version()}


def _as_printed(step: Step, kernel: Kernel, isa: Isa) -> Kernel:
    """The kernel with the work that the C printed for it does."""
    if isinstance(step, Conv) and is_winograd(step, isa):
        return replace(kernel, kind="winograd", macs=multiplications(step))
    return kernel
