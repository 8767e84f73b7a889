"""Compiling the kernels of an artifact ahead of time, without a GPU.

`python -m optcompiler_cuda.precompile DIRECTORY ARCH PART PARTS` compiles every PARTS-th kernel, in
a process of its own, so that neither the caller's `TRITON_INTERPRET` nor its imports matter and
several kernels compile at once.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from optcompiler.children import Children
from optcompiler.errors import InputError, ToolchainError
from optcompiler.files import no_room
from optcompiler_cuda.executor import FUSE_MULTIPLY_ADD
from optcompiler_cuda.schedule import Schedule, Specialisation, load_kernels
from optcompiler_cuda.worker import clean_environment

FOLDER = "cubins"
WARP_SIZE = 32
POINTER_ALIGNMENT = 16


def precompile(directory: Path, arch: int) -> None:
    """Write `cubins/ID.cubin` and `cubins/ID.json` for every specialisation of the schedule.

    `arch` is the compute capability times ten (90 for Hopper). Triton's own cache, shared by all
    artifacts of this user, answers for kernels seen before. Raises `ToolchainError` with the
    compiler's last words.
    """
    (directory / FOLDER).mkdir()
    count = len(Schedule.read(directory).specialisations)
    parts = max(1, min(os.cpu_count() or 1, 8, (count + 3) // 4))
    command = [sys.executable, "-m", "optcompiler_cuda.precompile", str(directory), str(arch)]
    with tempfile.TemporaryFile("w+") as messages, Children() as children:
        running = [
            children.start(
                [*command, str(part), str(parts)],
                env=clean_environment(TRITON_DISABLE_LINE_INFO="1", TRITON_DEFAULT_FP_FUSION="0"),
                stdout=messages,
                stderr=messages,
            )
            for part in range(parts)
        ]
        if any([process.wait() for process in running]):
            messages.seek(0)
            printed = messages.read().strip()[-1200:]
            if remedy := no_room(printed):
                raise InputError(
                    f"triton found no room to write: {printed.splitlines()[-1]}; {remedy}, or set "
                    f"TMPDIR and TRITON_CACHE_DIR to folders with more."
                )
            raise ToolchainError(
                f"triton could not compile a kernel for sm_{arch}: {printed}\n"
                f"Compile with precompile=0 to leave it to the machine that runs the artifact."
            )


def compile_one(kernels: Any, kernel: Specialisation, arch: int) -> tuple[bytes, dict[str, Any]]:
    """The cubin of one specialisation and what a launcher must know of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(kernels, kernel.function)
    position = {name: (i,) for i, name in enumerate(function.arg_names)}
    signature = {n: kernel.signature.get(n, "constexpr") for n in function.arg_names}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={position[n]: v for n, v in kernel.constexprs.items()},
        attrs={
            position[n]: [["tt.divisibility", POINTER_ALIGNMENT]]
            for n, t in kernel.signature.items()
            if t.startswith("*")
        },
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, WARP_SIZE),
        options={
            "num_warps": kernel.num_warps,
            "num_stages": kernel.num_stages,
            "enable_fp_fusion": FUSE_MULTIPLY_ADD,
        },
    )
    metadata = compiled.metadata
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
    parameters = entry.group(1).count(".param") if entry else len(kernel.signature)
    description = {
        "entry": metadata.name,
        "arch": arch,
        "block": [metadata.num_warps * WARP_SIZE, 1, 1],
        "num_warps": metadata.num_warps,
        "num_ctas": metadata.num_ctas,
        "shared_bytes": metadata.shared,
        "global_scratch_bytes": metadata.global_scratch_size,
        "signature": kernel.signature,
        "constexprs": kernel.constexprs,
        "pointer_alignment": POINTER_ALIGNMENT,
        "null_pointers_after_arguments": parameters - len(kernel.signature),
        "triton": triton.__version__,
    }
    return compiled.asm["cubin"], description


def main(directory: Path, arch: int, part: int, parts: int) -> None:
    kernels = load_kernels(directory)
    for kernel in Schedule.read(directory).specialisations[part::parts]:
        cubin, description = compile_one(kernels, kernel, arch)
        (directory / FOLDER / f"{kernel.id}.cubin").write_bytes(cubin)
        (directory / FOLDER / f"{kernel.id}.json").write_text(
            json.dumps(description, indent=1, sort_keys=True) + "\n"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
