"""The C compiler: found by `CC`, run by argument list, several files at a time."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from optcompiler.children import Children
from optcompiler.errors import InputError, ToolchainError

FLAGS = (
    "-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-Wall", "-Wextra", "-g0",
)  # fmt: skip


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


def compiler_version() -> str:
    """The first line of `cc --version`."""
    with Children() as children:
        return _run([*compiler(), "--version"], Path.cwd(), children).splitlines()[0]


def build(directory: Path, sources: Sequence[str], flags: Sequence[str], library: str) -> str:
    """Compile and link `sources` of `directory` into `library` there; return the warnings.

    The bytes depend on the sources, the flags and the compiler: commands name files relative to
    `directory`, and objects carry no debug information.
    """
    command = compiler()
    objects = [f"{Path(s).stem}.o" for s in sources]

    try:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool, Children() as children:

            def compile_one(pair: tuple[str, str]) -> str:
                source, target = pair
                steps = [*command, *FLAGS, *flags, "-c", source, "-o", target]
                return _run(steps, directory, children)

            warnings = list(pool.map(compile_one, zip(sources, objects, strict=True)))
            _run(
                [*command, "-shared", "-o", library, *objects, "-Wl,--build-id=none", "-s", "-lm",
                 "-lpthread"],
                directory, children,
            )  # fmt: skip
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
        full = next((line for line in lines if os.strerror(errno.ENOSPC) in line), None)
        if full is not None:
            raise InputError(
                f"{command[0]} found the disk full: {full[:300]}; free some space, or set TMPDIR "
                f"to a folder with more."
            )
        first = next((line for line in lines if "error" in line), lines[0] if lines else "")
        raise ToolchainError(
            f"{command[0]} failed with exit status {status}: {first[:300]}; "
            f"check the compiler, or set CC to another."
        )
    return output
