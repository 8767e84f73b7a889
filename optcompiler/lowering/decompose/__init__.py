"""Operators written with other operators, for every backend that prints the lowered form."""

from __future__ import annotations

from collections.abc import Mapping

from optcompiler.lowering.decompose.quantized import QUANTIZED
from optcompiler.lowering.decompose.recurrent import RECURRENT
from optcompiler.lowering.decompose.resample import RESAMPLE
from optcompiler.lowering.decompose.signal import SIGNAL
from optcompiler.lowering.decompose.simple import SIMPLE
from optcompiler.lowering.expand import Decomposition

DECOMPOSITIONS: Mapping[str, Decomposition] = {
    **SIMPLE, **QUANTIZED, **RECURRENT, **RESAMPLE, **SIGNAL
}  # fmt: skip
"""Operator → what takes its place, or None where that cannot be said."""

__all__ = ["DECOMPOSITIONS"]
