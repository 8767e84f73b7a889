"""The C compiler: found by `CC`, run by argument list, several files at a time.

`CC` may be a cross compiler or hold `--sysroot` and `--target`; `CFLAGS`, `LDFLAGS` and `AR` are
honoured as by make.
"""

from __future__ import annotations

import functools
import os
import platform
import shlex
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from optcompiler.children import Children
from optcompiler.errors import InputError, ToolchainError
from optcompiler.files import no_room
from optcompiler_cpu.isa import ISAS, Isa, processor_of

FLAGS = (
    "-std=c11", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-Wall", "-Wextra", "-Wa,-I.",
)  # fmt: skip
"""What the code needs; `-Wa,-I` is where the assembler finds the weights."""

TUNING = ("-O3", "-g0")

GCC_TUNING = ("-fno-tree-coalesce-vars", "-fno-schedule-insns")
"""Or GCC copies and spills the accumulators of tiles that are followed by their epilogue, and on
AArch64 loads more at once than there are registers."""

LINKING = (
    "-shared", "-Wl,-Bsymbolic-functions", "-Wl,--build-id=none", "-s",
)  # fmt: skip

LIBRARIES = ("-lm", "-lpthread")


def compiler() -> list[str]:
    """The compiler's command: `CC`, else cc or gcc. Raises `ToolchainError` when there is none."""
    named = os.environ.get("CC")
    if named:
        command = shlex.split(named)
        if command and shutil.which(command[0]):
            return command
        raise ToolchainError(
            f"the C compiler CC={named!r} was not found; install it, or set CC to one that is."
        )
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise ToolchainError(
        "no C compiler (cc, gcc or clang) was found; install one, or set CC to its command."
    )


def user_flags(name: str) -> list[str]:
    """The words of `CFLAGS` or `LDFLAGS`."""
    return shlex.split(os.environ.get(name, ""))


def versions() -> dict[str, str]:
    """The first line of `cc --version`, the machine it compiles for, and the user's flags."""
    with Children() as children:
        text = _run([*compiler(), "--version"], Path.cwd(), children).splitlines()[0]
    found = {"cc": text, "cc machine": target_machine()}
    return found | {n: " ".join(user_flags(n)) for n in ("CFLAGS", "LDFLAGS") if user_flags(n)}


def tuning() -> tuple[str, ...]:
    """What makes the code fast, for this compiler."""
    gcc = "Free Software Foundation" in _asked(tuple(compiler()), "--version")
    return TUNING + (GCC_TUNING if gcc else ())


def target_machine() -> str:
    """What the compiler compiles for, such as "x86_64-linux-gnu"."""
    return _asked((*compiler(), *user_flags("CFLAGS")), "-dumpmachine")


def target_processor() -> str:
    """The processor that the compiler compiles for, such as "x86_64"."""
    return processor_of(target_machine().partition("-")[0])


def require_machine(isas: Sequence[Isa]) -> None:
    """Raise `InputError` when the compiler is for a machine that never has one of `isas`."""
    processor = target_processor()
    for isa in isas:
        if isa.processor not in ("", processor):
            others = [i.name for i in ISAS.values() if i.processor in ("", processor)]
            raise InputError(
                f"target cpu: isa={isa.name} is of {isa.processor}, but the C compiler makes code "
                f"for {target_machine()}; give isa={' or '.join(others)}."
            )


def is_here(machine: str) -> bool:
    """Whether this machine's processor and system are those of the triple `machine`."""
    triple = machine.lower()
    if processor_of(triple.partition("-")[0]) != processor_of(platform.machine()):
        return False
    musl = "musl" in triple
    return platform.system().lower() in triple and musl == (platform.libc_ver()[0] != "glibc")


@functools.cache
def _asked(command: tuple[str, ...], question: str) -> str:
    with Children() as children:
        return _run([*command, question], Path.cwd(), children).strip()


def archiver() -> list[str]:
    """The archiver's command: `AR`, else what the compiler brings, else ar."""
    named = os.environ.get("AR")
    if named:
        command = shlex.split(named)
    else:
        command = [_asked(tuple(compiler()), "-print-prog-name=ar") or "ar"]
    if command and shutil.which(command[0]):
        return command
    raise ToolchainError(
        f"the archiver {' '.join(command)!r} was not found; install binutils, or set AR to one "
        f"that is."
    )


def build(
    directory: Path, units: Mapping[str, Sequence[str]], library: str, archive: str | None = None
) -> str:
    """Compile `units` of `directory`, each with its own flags, and link them into `library` there,
    and put them into `archive`; return the warnings.

    The bytes depend on the sources, the flags and the compiler: commands name files relative to
    `directory`, objects carry no debug information and archives no dates.
    """
    command = compiler()
    own = user_flags("CFLAGS")
    objects = [f"{Path(unit).stem}.o" for unit in units]

    try:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool, Children() as children:

            def compile_one(unit: str, target: str) -> str:
                flags = units[unit]
                steps = [*command, *FLAGS, *tuning(), *flags, *own, "-c", unit, "-o", target]
                return _run(steps, directory, children)

            warnings = list(pool.map(compile_one, units, objects))
            _run(
                [*command, *own, *LINKING, f"-Wl,-soname,{Path(library).name}", "-o", library,
                 *objects, *user_flags("LDFLAGS"), *LIBRARIES],
                directory, children,
            )  # fmt: skip
            if archive is not None:
                _run([*archiver(), "rcsD", archive, *objects], directory, children)
    finally:
        for name in objects:
            (directory / name).unlink(missing_ok=True)
    return "".join(warnings)


def _run(command: list[str], directory: Path, children: Children) -> str:
    """What the compiler printed. Its temporary files lie in `directory` too, and go with it."""
    environment = {**os.environ, "LC_ALL": "C", "TMPDIR": str(directory)}
    try:
        status, output = children.run(command, env=environment, cwd=directory)
    except OSError as error:
        raise ToolchainError(
            f"the C compiler {command[0]!r} did not start ({error.strerror}); set CC to another."
        ) from error
    if status:
        lines = [line for line in output.splitlines() if line.strip()]
        full = next((line for line in lines if no_room(line)), "")
        if remedy := no_room(full):
            raise InputError(
                f"{command[0]} found no room to write: {full[:300]}; {remedy}, or set TMPDIR to a "
                f"folder with more."
            )
        first = next((line for line in lines if "error" in line), lines[0] if lines else "")
        raise ToolchainError(
            f"{command[0]} failed with exit status {status}: {first[:300]}; "
            f"check the compiler, or set CC to another."
        )
    return output
