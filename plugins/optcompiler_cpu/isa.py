"""Instruction sets that the emitted C can use, and which of them this machine has."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from optcompiler.errors import InputError


@dataclass(frozen=True)
class Tiling:
    """Register tiles of one kind: the greatest number of rows by vectors across.

    `step` elements of K are taken at a time, so runs of weights are padded to it. A product of
    fewer than `least_rows` rows is left to the next kind.
    """

    kind: str
    heights: Mapping[int, int]
    step: int = 1
    least_rows: int = 1

    @property
    def widest(self) -> int:
        return max(self.heights)


@dataclass(frozen=True)
class Isa:
    """`lanes` floats a vector; register tiles for floats, bfloat16, and integers by preference.

    Heights leave registers for the vectors of weights and one broadcast: with 32 registers
    6 x 4 accumulators, with 16 registers 6 x 2; integers without VNNI, and bfloat16 without
    products of its own, hold each vector of weights twice. NEON holds four steps of K of each row.
    AMX has eight registers of 16 x 16: two
    by two accumulators, two of either operand.

    `needs` are features as Linux names them, of a `processor`; empty: any. `flags` are what the
    compiler is told. `chosen` names, by step, the kernels to print in place of those of the rules.
    """

    name: str
    macro: str
    flags: tuple[str, ...]
    lanes: int
    floats: Tiling
    halves: Tiling
    integers: tuple[Tiling, ...]
    needs: frozenset[str]
    processor: str = "x86_64"
    chosen: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def multiplies_bf16(self) -> bool:
        """Whether bfloat16 is multiplied as it is, in place of being widened first."""
        return "avx512_bf16" in self.needs

    @property
    def condition(self) -> str:
        """In C, by `processor.h`: whether the processor has it and the system lets it be used."""
        if self.processor == "aarch64":
            return " && ".join(f"HAS({need.upper()})" for need in sorted(self.needs))
        features = [f[2:] for f in self.flags if f.startswith("-m") and "=" not in f]
        tests = [f'HAS("{feature}")' for feature in features]
        if "amx_tile" in self.needs:
            tests.append("may_use_tiles()")
        return " && ".join(tests) or "1"

    def tiling(self, dtype: str, rows: int) -> Tiling:
        """The register tiles for a product of so many rows of elements of type `dtype`."""
        if dtype in {"FLOAT", "BFLOAT16"}:
            return self.floats if dtype == "FLOAT" else self.halves
        return next(t for t in self.integers if rows >= t.least_rows)


_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma",
           "-mprefer-vector-width=512")  # fmt: skip
_AVX512_NEEDS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma"})
_BF16 = ("-DOC_AVX512_VNNI", *_AVX512, "-mavx512bf16")
_BF16_NEEDS = _AVX512_NEEDS | {"avx512_bf16"}
_OF_32 = {4: 6, 3: 8, 2: 12, 1: 16}
_PORTABLE = {4: 2, 3: 2, 2: 4, 1: 6}
"""As many columns as AVX2 and NEON, so that a library has one copy of the weights for them all."""
_VNNI = Tiling("u8", _OF_32, step=4)

ISAS = {
    isa.name: isa
    for isa in (
        Isa(
            "amx_int8",
            "OC_AMX",
            ("-DOC_AVX512_BF16", *_BF16, "-mamx-tile", "-mamx-int8"),
            16,
            Tiling("f32", _OF_32),
            Tiling("bf16", _OF_32, step=2),
            (Tiling("amx", {2: 32, 1: 32}, step=64, least_rows=8), _VNNI),
            _BF16_NEEDS | {"amx_tile", "amx_int8"},
        ),
        Isa(
            "avx512_bf16",
            "OC_AVX512_BF16",
            _BF16,
            16,
            Tiling("f32", _OF_32),
            Tiling("bf16", _OF_32, step=2),
            (_VNNI,),
            _BF16_NEEDS,
        ),
        Isa(
            "avx512_vnni",
            "OC_AVX512_VNNI",
            _AVX512,
            16,
            Tiling("f32", _OF_32),
            Tiling("bf16", {3: 7, 2: 12, 1: 16}, step=2),
            (_VNNI,),
            _AVX512_NEEDS,
        ),
        Isa(
            "avx_vnni",
            "OC_AVX_VNNI",
            ("-DOC_AVX2", "-mavx2", "-mfma", "-mf16c", "-mavxvnni"),
            8,
            Tiling("f32", {2: 6, 1: 8}),
            Tiling("bf16", {2: 4, 1: 8}, step=2),
            (Tiling("u8", {2: 6, 1: 12}, step=4),),
            frozenset({"avx2", "fma", "f16c", "avx_vnni"}),
        ),
        Isa(
            "avx2",
            "OC_AVX2",
            ("-mavx2", "-mfma", "-mf16c"),
            8,
            Tiling("f32", {2: 6, 1: 8}),
            Tiling("bf16", {2: 4, 1: 8}, step=2),
            (Tiling("u8", {2: 4, 1: 8}, step=4),),
            frozenset({"avx2", "fma", "f16c"}),
        ),
        Isa(
            "neon_dotprod",
            "OC_NEON_DOTPROD",
            ("-march=armv8.2-a+dotprod",),
            4,
            Tiling("f32", _OF_32),
            Tiling("bf16", {3: 7, 2: 12, 1: 16}, step=2),
            (Tiling("s8", {4: 5, 3: 7, 2: 9, 1: 14}, step=4),),
            frozenset({"asimddp"}),
            processor="aarch64",
        ),
        Isa(
            "portable",
            "OC_PORTABLE",
            (),
            4,
            Tiling("f32", _PORTABLE),
            Tiling("bf16", {2: 4, 1: 6}, step=2),
            (Tiling("u8", _PORTABLE, step=4),),
            frozenset(),
            processor="",
        ),
    )
}
"""By name, best first."""


MULTI = {
    "x86_64": "avx512_vnni+avx_vnni+avx2+portable",
    "aarch64": "neon_dotprod+portable",
}
"""What `isa=multi` stands for, by processor."""


def processor_of(name: str) -> str:
    """A processor's name as Linux and GNU triples have it."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name.lower(), name.lower())


def supported(isa: Isa) -> bool:
    """Whether this machine can run code for `isa`."""
    return isa.needs <= cpu_flags() and ("amx_tile" not in isa.needs or _may_use_tiles())


def best_here(isas: Sequence[Isa]) -> Isa | None:
    """The one that a library with code for all of `isas` picks on this machine."""
    return next(filter(supported, isas), None)


@functools.cache
def _may_use_tiles() -> bool:
    """Whether the kernel lets this process use AMX's registers, which it must be asked for."""
    if not sys.platform.startswith("linux"):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def cpu_flags() -> frozenset[str]:
    """What Linux says that the processor has."""
    title = {"x86_64": "flags", "aarch64": "Features"}.get(processor_of(platform.machine()))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    line = next((row for row in lines if title and row.startswith(title)), "")
    return frozenset(line.partition(":")[2].split())


def named_isas(text: str) -> tuple[Isa, ...]:
    """Names joined by `+`, or "native", this machine's best; best first. Raises `InputError`."""
    if text == "native":
        return (next(filter(supported, ISAS.values())),)
    names = text.split("+")
    for name in names:
        if name not in ISAS:
            raise InputError(
                f"target cpu: isa={name!r} is not known; give native, multi, {', '.join(ISAS)}, or "
                f"several joined by +."
            )
    return tuple(isa for isa in ISAS.values() if isa.name in names)
