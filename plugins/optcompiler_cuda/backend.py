"""`CudaBackend`: programs as Triton kernels, compiled for Hopper ahead of time."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from optcompiler.backend import Backend, Capabilities, Kernel, Runner
from optcompiler.errors import InputError, ToolchainError
from optcompiler.target import Target

if TYPE_CHECKING:
    from optcompiler.choices import Choices
    from optcompiler.cost import DeviceProfile
    from optcompiler.program import Program

OPTIONS = {"precompile": ("0", "1"), "interpret": ("0", "1"), "arch": None}


class CudaBackend(Backend):
    """Triton kernels: `kernels.py`, `schedule.json`, `weights.safetensors` and `cubins/`.

    Options of the target: `arch`, the compute capability times ten that cubins are made for
    ("90"); `precompile` ("0" or "1"; "1" where triton is installed); `interpret` ("1": without a
    GPU the artifact runs under Triton's interpreter, slowly, which is for tests).
    """

    name: ClassVar[str] = "cuda"
    summary: ClassVar[str] = "Triton kernels for NVIDIA GPUs"

    def capabilities(self, target: Target) -> Capabilities:
        options_of(target)
        return Capabilities(
            precisions=frozenset({"fp32", "int8"}),
            integer_ops=frozenset(
                {"Conv", "MatMul", "Gemm", "Add", "MaxPool", "AveragePool", "GlobalAveragePool"}
            ),
            activation_dtype="INT8",
            weight_dtype="INT8",
            per_channel=True,
            fusions=frozenset({"contraction", "pointwise", "normalization", "softmax"}),
            dynamic_shapes=False,
            float_outputs=frozenset({"Conv", "MatMul", "Gemm", "AveragePool", "GlobalAveragePool"}),
        )

    def kernels(self, program: Program, target: Target) -> Sequence[Kernel]:
        from optcompiler.lowering.kernels import kernels_of
        from optcompiler.lowering.lower import lower

        return kernels_of(lower(program))

    def lower(
        self, program: Program, target: Target, directory: Path, choices: Choices | None = None
    ) -> Mapping[str, Any]:
        from optcompiler.lowering.lower import lower
        from optcompiler_cuda.emit import emit

        options = options_of(target)
        present = importlib.util.find_spec("triton") is not None
        if not present and options.get("precompile") != "0":
            raise ToolchainError(
                "the cuda backend needs triton, which is not installed; "
                "pip install optcompiler[cuda]."
            )
        emitted = emit(lower(program))
        emitted.write(directory)
        arch = int(options.get("arch", "90"))
        compiled = options.get("precompile", "1") == "1"
        if compiled:
            from optcompiler_cuda.precompile import precompile

            precompile(directory, arch)
        return {
            "arch": arch,
            "precompiled": compiled,
            "interpret": options.get("interpret") == "1",
            "kernels": len(emitted.schedule.launches),
            "functions": len({s.function for s in emitted.schedule.specialisations}),
            "specialisations": len(emitted.schedule.specialisations),
            "arena_bytes": emitted.schedule.arena_bytes,
        }

    def runs_here(self, target: Target) -> bool:
        """Whether there is a GPU, or the kernels are to be interpreted."""
        if os.environ.get("TRITON_INTERPRET") == "1" or target.options.get("interpret", "0") == "1":
            return True
        import torch

        return torch.cuda.is_available()

    def load(self, directory: Path, info: Mapping[str, Any], *, threads: int) -> Runner:
        """Open an artifact on the GPU, or under Triton's interpreter.

        Runs `kernels.py` of the artifact; the core compares the hashes of all files with the
        manifest before it calls this. Raises `ToolchainError` without torch, triton or a GPU.
        """
        if importlib.util.find_spec("triton") is None:
            raise ToolchainError(
                "running a cuda artifact needs triton, which is not installed; "
                "pip install optcompiler[cuda]."
            )
        import torch

        from optcompiler_cuda.runner import GpuRunner, InterpretedRunner

        wanted = os.environ.get("TRITON_INTERPRET") == "1"
        if torch.cuda.is_available() and not wanted:
            return GpuRunner(directory)
        if wanted or info.get("interpret"):
            return InterpretedRunner(directory, threads)
        raise ToolchainError(
            "torch sees no CUDA device to run this artifact on; run it on a machine with a GPU, or "
            "interpret its kernels on the CPU, slowly: target cuda:interpret=1, or the environment "
            "variable TRITON_INTERPRET=1."
        )

    def nominal_profile(self, target: Target) -> DeviceProfile | None:
        """An H100 by its data sheet, whichever `arch` is compiled for."""
        from optcompiler_cuda.nominal import hopper

        return hopper(target.threads)

    def versions(self) -> Mapping[str, str]:
        found = {}
        for name in ("triton", "torch"):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found


def options_of(target: Target) -> Mapping[str, str]:
    """The target's options; raises `InputError` for a name or value that there is not."""
    for name, value in target.options.items():
        if name not in OPTIONS:
            raise InputError(f"target {target}: no option {name!r}; there is {', '.join(OPTIONS)}.")
        allowed = OPTIONS[name]
        if allowed is not None and value not in allowed:
            raise InputError(f"target {target}: {name}={value!r}; give {' or '.join(allowed)}.")
    arch = target.options.get("arch", "90")
    if not arch.isdigit() or int(arch) < 75:
        raise InputError(f"target {target}: arch={arch!r}; give a number from 75 up, such as 90.")
    return target.options
