"""Registers backend `cpu`: C source and a shared library."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from optcompiler.hookspecs import hookimpl

if TYPE_CHECKING:
    from optcompiler.backend import Backend


@hookimpl
def optcompiler_backends() -> Iterable[Backend]:
    from optcompiler_cpu.backend import CpuBackend

    return [CpuBackend()]
