"""What a C or C++ project finds and checks the library by: CMake, pkg-config, make, a check."""

from __future__ import annotations

import shlex
from pathlib import PurePath

from optcompiler._version import __version__
from optcompiler_cpu.code import template
from optcompiler_cpu.module import Module
from optcompiler_cpu.toolchain import FLAGS, LIBRARIES, LINKING, tuning


def package(module: Module) -> dict[str, str]:
    """Texts by path."""
    name = module.name
    small = "src/scalar.h" in module.sources
    flags = [flag for flag in FLAGS if not flag.startswith("-Wa,")]
    makefile = template(
        "Makefile.in",
        NAME=name,
        OBJECTS=" ".join(f"{PurePath(unit).stem}.o" for unit in module.units),
        FLAGS=shlex.join(flags),
        OWN_FLAGS=_own_flags(module),
        TUNING=shlex.join(tuning()),
        LINKING=shlex.join(LINKING),
        LIBRARIES=shlex.join(LIBRARIES),
    )
    return {
        f"{name}Config.cmake": template("Config.cmake.in", NAME=name),
        f"{name}.pc": template("net.pc.in", NAME=name, VERSION=__version__),
        "src/Makefile": makefile,
        "src/verify.c": template(
            "verify.c.in", NAME=name, SMALL='#include "scalar.h"' if small else ""
        ),
    }


def _own_flags(module: Module) -> str:
    """Rules that add the flags of an instruction set to what is compiled for it."""
    lines: list[str] = []
    for flags in dict.fromkeys(filter(None, module.units.values())):
        objects = (f"{PurePath(u).stem}.o" for u, own in module.units.items() if own == flags)
        lines.append(f"$(addprefix $(BUILD)/,{' '.join(objects)}): FLAGS += {shlex.join(flags)}")
    return "\n".join(lines)
