"""Backend `cpu`: a program as C source and libraries that need libc and threads alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from optcompiler.backend import Backend, Capabilities, Kernel, Runner
from optcompiler.choices import Choices
from optcompiler.cost import DeviceProfile, nominal_profile
from optcompiler.errors import InputError
from optcompiler.lowering import Bounds, kernel_of, lower, lower_sized, plan
from optcompiler.lowering.ir import Conv, Lowered, Step
from optcompiler.program import Program
from optcompiler.target import Target
from optcompiler_cpu.attention import Attention, fused, kernel_of_attention
from optcompiler_cpu.isa import ISAS, Isa, pick_isa, supported
from optcompiler_cpu.legalize import legalize
from optcompiler_cpu.module import Module, describe, print_module
from optcompiler_cpu.naming import DEFAULT, checked_name, library_name
from optcompiler_cpu.packaging import package
from optcompiler_cpu.runner import CpuRunner
from optcompiler_cpu.toolchain import (
    build,
    compiler,
    is_here,
    require_machine,
    target_machine,
    versions,
)
from optcompiler_cpu.weights import STORED
from optcompiler_cpu.winograd import is_winograd, multiplications

_lowered = functools.partial(
    lower, plan=False, computed_integers=True, narrow=frozenset({"BFLOAT16"}), stored=STORED
)
"""Lowering for the kernels there are here."""

OPTIONS = {"isa": ("native", *ISAS), "weights": ("file", "embedded")}


def emit(
    program: Program, isa: Isa, name: str = DEFAULT, *, embedded: bool = False,
    bounds: Bounds = MappingProxyType({}),
) -> tuple[Lowered, Module]:  # fmt: skip
    """The program in the form that is printed, and the text and weights of its artifact.

    `bounds` are those of dimensions that stay symbolic until it runs.
    """
    lowered, symbols = lower_sized(program, bounds, _lowered) if bounds else (_lowered(program), ())
    legalize(lowered, isa)
    plan(lowered)
    return lowered, print_module(lowered, isa, name, embedded=embedded, symbols=symbols)


def checked_options(target: Target) -> Mapping[str, str]:
    """The target's options. Raises `InputError` for one that there is not."""
    checked_name(target.name)
    for option, value in target.options.items():
        if option not in OPTIONS:
            raise InputError(
                f"target cpu: unknown option {option!r}; it knows name, {', '.join(OPTIONS)}."
            )
        if value not in OPTIONS[option]:
            raise InputError(
                f"target cpu: {option}={value!r} is not known; give {', '.join(OPTIONS[option])}."
            )
    return target.options


class CpuBackend(Backend):
    """Writes C11 with GCC's intrinsics and compiles it with `CC`, `CFLAGS` and `LDFLAGS`.

    Option `isa`: "amx_int8", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx2", "portable", or
    "native" (the default: the best that the compiler's machine has). Integer arithmetic gives the
    same numbers on each; bfloat16 is offered as a precision where it has instructions. Option
    `weights`: "file" (the default: beside the library, mapped) or "embedded" (in the library). The
    target's `name` begins the names of files and symbols.
    """

    name = "cpu"
    summary = "C source and libraries for x86-64, specialised on shapes and weights"

    def spelled_out(self, target: Target) -> Target:
        options = dict(checked_options(target))
        native = options.get("isa", "native") == "native"
        options["isa"] = (
            "portable" if native and not is_here(target_machine()) else pick_isa(options).name
        )
        return Target(
            "cpu", threads=target.threads, sizes=target.all_sizes, name=target.name, **options
        )

    def name_for(self, text: str) -> str | None:
        return library_name(text)

    def runs_here(self, target: Target) -> bool:
        return supported(pick_isa(target.options)) and is_here(target_machine())

    def nominal_profile(self, target: Target) -> DeviceProfile | None:
        return None if self.runs_here(target) else nominal_profile(self.name, target.threads)

    def capabilities(self, target: Target) -> Capabilities:
        isa = pick_isa(checked_options(target))
        return Capabilities(
            precisions=frozenset(
                {"fp32", "int8", "int4", "w4a8", *(("bf16",) if isa.multiplies_bf16 else ())}
            ),
            integer_ops=frozenset(
                {"Conv", "MatMul", "Gemm", "Add", "MaxPool", "AveragePool", "GlobalAveragePool"}
            ),
            fusions=frozenset(
                {"contraction", "pointwise", "normalization", "softmax", "attention"}
            ),
            symmetric_multipliers=True,
            stored_weight_ops=frozenset({"MatMul", "Gemm"}),
            reference=True,
        )

    def kernels(self, program: Program, target: Target) -> Sequence[Kernel]:
        isa = pick_isa(target.options)
        lowered = _lowered(program, values=False)
        return [_as_printed(step, isa) for step in fused(lowered.steps)]

    def lower(
        self, program: Program, target: Target, directory: Path, choices: Choices | None = None
    ) -> Mapping[str, Any]:
        options = checked_options(target)
        isa, name = pick_isa(options), checked_name(target.name)
        compiler()
        require_machine(isa)
        embedded = options.get("weights") == "embedded"
        lowered, module = emit(program, isa, name, embedded=embedded, bounds=target.bounds)
        (directory / "src").mkdir()
        for path, text in (*module.sources.items(), *package(module, isa).items()):
            (directory / path).write_text(text, encoding="utf-8")
        with (directory / f"{name}.weights").open("wb") as file:
            file.writelines(module.weights)
        build(
            directory, module.units, (f"-D{isa.macro}", *isa.flags), f"lib{name}.so",
            f"lib{name}.a",
        )  # fmt: skip
        return {
            "machine": target_machine(),
            "isa": isa.name,
            "name": name,
            "embedded": embedded,
            "steps": list(module.steps),
            "arena_bytes": lowered.arena_bytes,
            "ports": describe(lowered),
            **({"sizes": sizes} if (sizes := _sizes(program, target.bounds)) else {}),
        }

    def load(self, directory: Path, info: Mapping[str, Any], *, threads: int) -> Runner:
        if not is_here(str(info["machine"])):
            raise InputError(
                f"the artifact is for {info['machine']!r}, which this machine is not; compile it "
                f"here, or check it there with its Makefile."
            )
        isa = ISAS.get(str(info["isa"]))
        if isa is None or not supported(isa):
            raise InputError(
                f"the artifact is for isa={info['isa']!r}, which this machine does not have; "
                f"compile with isa=portable."
            )
        name = checked_name(str(info["name"]))
        return CpuRunner(
            directory, name, info["ports"], info["steps"], threads, info.get("sizes", ())
        )

    def versions(self) -> Mapping[str, str]:
        return versions()


def _sizes(program: Program, bounds: Bounds) -> list[dict[str, Any]]:
    """The sizes that are set before a run, and the axes of inputs that say what they are."""
    return [
        {
            "name": name, "least": least, "most": most,
            "axes": [
                [port.name, axis]
                for port in program.inputs
                for axis, dim in enumerate(port.shape)
                if dim == name
            ],
        }
        for name, (least, most) in bounds.items()
    ]  # fmt: skip


def _as_printed(step: Step, isa: Isa) -> Kernel:
    """The step as a kernel with the work that the C printed for it does."""
    if isinstance(step, Attention):
        return kernel_of_attention(step)
    kernel = kernel_of(step)
    if isinstance(step, Conv) and is_winograd(step, isa):
        return replace(kernel, kind="winograd", macs=multiplications(step))
    return kernel
