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
from optcompiler.device import machine_name
from optcompiler.errors import InputError
from optcompiler.lowering import Bounds, kernel_of, lower, lower_sized, plan
from optcompiler.lowering.extents import Symbol
from optcompiler.lowering.ir import Conv, Lowered, Step
from optcompiler.program import Program
from optcompiler.target import Target
from optcompiler_cpu.attention import Attention, fused, kernel_of_attention
from optcompiler_cpu.isa import ISAS, MULTI, Isa, best_here, named_isas
from optcompiler_cpu.legalize import legalize
from optcompiler_cpu.module import Module, describe, print_module
from optcompiler_cpu.naming import DEFAULT, checked_name, library_name
from optcompiler_cpu.packaging import package
from optcompiler_cpu.runner import CpuRunner
from optcompiler_cpu.search import searched
from optcompiler_cpu.toolchain import (
    build,
    compiler,
    is_here,
    require_machine,
    target_machine,
    target_processor,
    versions,
)
from optcompiler_cpu.weights import STORED
from optcompiler_cpu.winograd import is_winograd, multiplications

_lowered = functools.partial(
    lower, plan=False, computed_integers=True, narrow=frozenset({"BFLOAT16"}), stored=STORED
)
"""Lowering for the kernels there are here."""

OPTIONS = ("isa", "weights", "search")
VALUES = {"weights": ("file", "embedded"), "search": ("none", "kernels")}


def emit(
    program: Program, isas: Sequence[Isa], name: str = DEFAULT, *, embedded: bool = False,
    bounds: Bounds = MappingProxyType({}),
) -> tuple[list[Lowered], Module]:  # fmt: skip
    """The program in the form that is printed for each of `isas`, and the text and weights of its
    artifact.

    `bounds` are those of dimensions that stay symbolic until it runs.
    """
    forms: list[Lowered] = []
    symbols: tuple[Symbol, ...] = ()
    for isa in isas:
        if bounds:
            lowered, symbols = lower_sized(program, bounds, _lowered)
        else:
            lowered = _lowered(program)
        legalize(lowered, isa)
        plan(lowered)
        forms.append(lowered)
    variants = list(zip(isas, forms, strict=True))
    return forms, print_module(variants, name, embedded=embedded, symbols=symbols)


def checked_options(target: Target) -> Mapping[str, str]:
    """The target's options. Raises `InputError` for one that there is not."""
    checked_name(target.name)
    for option, value in target.options.items():
        if option not in OPTIONS:
            raise InputError(
                f"target cpu: unknown option {option!r}; it knows name, {', '.join(OPTIONS)}."
            )
        if value not in VALUES.get(option, (value,)):
            raise InputError(
                f"target cpu: {option}={value!r} is not known; give {', '.join(VALUES[option])}."
            )
    chosen_isas(target.options)
    return target.options


def chosen_isas(options: Mapping[str, str]) -> tuple[Isa, ...]:
    """What code is made for, best first. Raises `InputError` for what is not known."""
    text = options.get("isa", "native")
    return named_isas(MULTI.get(target_processor(), "portable") if text == "multi" else text)


def judged_isa(options: Mapping[str, str]) -> Isa:
    """The instruction set that prices and precisions are of: the best this machine has of those
    chosen, for another machine the best of all."""
    isas = chosen_isas(options)
    return best_here(isas) or isas[0]


class CpuBackend(Backend):
    """Writes C11 with GCC's intrinsics and compiles it with `CC`, `CFLAGS` and `LDFLAGS`.

    Option `isa`: "amx_int8", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx2", "neon_dotprod",
    "portable", or "native" (the default: the best that the compiler's machine has). Several joined
    by `+`, or "multi" for what the processors of a kind have, make one library that picks when it
    is used. Integer arithmetic gives the same numbers on each; bfloat16 is offered as a precision
    where it has instructions. Option `weights`: "file" (the default: beside the library, mapped) or
    "embedded" (in the library). Option `search`: "none" (the default: rules choose among kernels)
    or "kernels" (others are measured as well). The target's `name` begins the names of files and
    symbols.
    """

    name = "cpu"
    summary = "C source and libraries for x86-64 and AArch64, specialised on shapes and weights"

    def spelled_out(self, target: Target) -> Target:
        options = dict(checked_options(target))
        native = options.get("isa", "native") == "native"
        if native and not is_here(target_machine()):
            options["isa"] = "portable"
        options["isa"] = "+".join(isa.name for isa in chosen_isas(options))
        return Target(
            "cpu", threads=target.threads, sizes=target.all_sizes, name=target.name, **options
        )

    def name_for(self, text: str) -> str | None:
        return library_name(text)

    def runs_here(self, target: Target) -> bool:
        return best_here(chosen_isas(target.options)) is not None and is_here(target_machine())

    def profiled_as(self, target: Target) -> Target:
        options = {**target.options, "isa": judged_isa(target.options).name}
        options.pop("search", None)
        return Target(
            "cpu", threads=target.threads, sizes=target.all_sizes, name=target.name, **options
        )

    def nominal_profile(self, target: Target) -> DeviceProfile | None:
        return None if self.runs_here(target) else nominal_profile(self.name, target.threads)

    def capabilities(self, target: Target) -> Capabilities:
        isa = judged_isa(checked_options(target))
        return Capabilities(
            precisions=frozenset(
                {"fp32", "int8", "int4", "w4a8", "w8", *(("bf16",) if isa.multiplies_bf16 else ())}
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
        isa = judged_isa(target.options)
        lowered = _lowered(program, values=False)
        return [_as_printed(step, isa) for step in fused(lowered.steps)]

    def lower(
        self, program: Program, target: Target, directory: Path, choices: Choices | None = None
    ) -> Mapping[str, Any]:
        options = checked_options(target)
        isas = chosen_isas(options)
        compiler()
        require_machine(isas)
        rows: list[dict[str, Any]] = []
        if options.get("search") == "kernels" and choices is not None and not target.bounds:
            isas, rows = self._searched(program, target, isas, choices)
        info = self._write(program, target, isas, directory)
        return {**info, "search": rows} if rows else info

    def _write(
        self, program: Program, target: Target, isas: Sequence[Isa], directory: Path
    ) -> Mapping[str, Any]:
        name = checked_name(target.name)
        embedded = target.options.get("weights") == "embedded"
        forms, module = emit(program, isas, name, embedded=embedded, bounds=target.bounds)
        (directory / "src").mkdir()
        for path, text in (*module.sources.items(), *package(module).items()):
            (directory / path).write_text(text, encoding="utf-8")
        with (directory / f"{name}.weights").open("wb") as file:
            file.writelines(module.weights)
        build(directory, module.units, f"lib{name}.so", f"lib{name}.a")
        return {
            "machine": target_machine(),
            "isa": "+".join(isa.name for isa in isas),
            "name": name,
            "embedded": embedded,
            "arena_bytes": max(lowered.arena_bytes for lowered in forms),
            "ports": describe(forms[0]),
            **({"sizes": sizes} if (sizes := _sizes(program, target.bounds)) else {}),
        }

    def _searched(
        self, program: Program, target: Target, isas: Sequence[Isa], choices: Choices
    ) -> tuple[Sequence[Isa], list[dict[str, Any]]]:
        """`isas`, of which that of this machine has its kernels measured."""
        here = judged_isa(target.options)
        if not self.runs_here(target) and not choices.locked:
            raise InputError(
                f"target {target}: search=kernels measures on the machine that compiles, and "
                f"{here.name} does not run here; give the lock of a compile where it does."
            )

        def make(isa: Isa, place: Path) -> Runner:
            info = self._write(program, target, (isa,), place)
            return self.load(place, info, threads=target.threads)

        lowered = _lowered(program)
        legalize(lowered, here)
        machine = {"name": machine_name(), "threads": target.threads, "versions": versions()}
        best, rows = searched(lowered, here, make, machine, choices)
        return [best if isa.name == here.name else isa for isa in isas], rows

    def load(self, directory: Path, info: Mapping[str, Any], *, threads: int) -> Runner:
        if not is_here(str(info["machine"])):
            raise InputError(
                f"the artifact is for {info['machine']!r}, which this machine is not; compile it "
                f"here, or check it there with its Makefile."
            )
        stated = str(info["isa"])
        if best_here([isa for isa in ISAS.values() if isa.name in stated.split("+")]) is None:
            raise InputError(
                f"the artifact is for isa={stated!r}, which this machine does not have; "
                f"compile with isa=portable."
            )
        name = checked_name(str(info["name"]))
        return CpuRunner(directory, name, info["ports"], threads, info.get("sizes", ()))

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
