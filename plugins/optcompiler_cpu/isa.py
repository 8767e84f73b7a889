"""Instruction sets that the emitted C can use, and which of them this machine has."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from optcompiler.errors import InputError


@dataclass(frozen=True)
class Isa:
    """`lanes` floats a vector; `heights` rows of accumulators by vectors across a tile.

    Heights leave registers for the vectors of weights and one broadcast: with 32 registers
    6 x 4 accumulators, with 16 registers 6 x 2; integers without VNNI hold each vector of weights
    twice.
    """

    name: str
    macro: str
    flags: tuple[str, ...]
    lanes: int
    heights: Mapping[int, int]
    integer_heights: Mapping[int, int]
    needs: frozenset[str]

    @property
    def widest(self) -> int:
        return max(self.heights)


ISAS = {
    isa.name: isa
    for isa in (
        Isa(
            "avx512_vnni",
            "OC_AVX512_VNNI",
            ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma",
             "-mprefer-vector-width=512"),
            16,
            {4: 6, 3: 8, 2: 12, 1: 16},
            {4: 6, 3: 8, 2: 12, 1: 16},
            frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma"}),
        ),
        Isa(
            "avx2",
            "OC_AVX2",
            ("-mavx2", "-mfma"),
            8,
            {2: 6, 1: 8},
            {2: 4, 1: 8},
            frozenset({"avx2", "fma"}),
        ),
        Isa("portable", "OC_PORTABLE", (), 4, {2: 4, 1: 6}, {2: 4, 1: 6}, frozenset()),
    )
}  # fmt: skip
"""By name, best first."""


def supported(isa: Isa) -> bool:
    """Whether this machine can run code for `isa`."""
    return isa.needs <= cpu_flags()


def cpu_flags() -> frozenset[str]:
    if platform.machine() not in {"x86_64", "AMD64"}:
        return frozenset()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((row for row in text.splitlines() if row.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


def pick_isa(options: Mapping[str, str]) -> Isa:
    """The instruction set that the target's options ask for; by default this machine's best."""
    unknown = sorted(set(options) - {"isa"})
    if unknown:
        raise InputError(f"target cpu: unknown option {unknown[0]!r}; it knows isa.")
    name = options.get("isa", "native")
    if name == "native":
        return next(isa for isa in ISAS.values() if supported(isa))
    if name not in ISAS:
        raise InputError(f"target cpu: isa={name!r} is not known; give native, {', '.join(ISAS)}.")
    return ISAS[name]
