"""Noticing that somebody wrote to arrays that everybody shares.

They are read-only in numpy, but `torch.from_numpy` and others write through all the same. What is
mapped from a file cannot be written to and is left out, so that it need not be read.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from optcompiler.errors import PluginError
from optcompiler.program import Program


class Seal:
    """Checksums of some batches, always, and of the weights of some programs."""

    def __init__(self, batches: Sequence[Mapping[str, Any]], *programs: Program) -> None:
        self._batches = batches
        self._held: dict[int, tuple[str, Any, int]] = {}
        self.hold(*programs)

    def hold(self, *programs: Program) -> None:
        """Hold the weights of these programs, and no others."""
        known = self._held
        self._held = {}
        for name, shared in self._shared(programs):
            if id(shared) not in known:
                known[id(shared)] = (name, shared, _checksum(shared))
            self._held[id(shared)] = known[id(shared)]

    def check(self, who: Iterable[str]) -> None:
        """Raise `PluginError` naming `who` ran since when something held has changed."""
        for name, shared, checksum in self._held.values():
            if _checksum(shared) != checksum:
                raise PluginError(
                    f"{name} was written to, which all passes share, by {' or '.join(who)}; copy "
                    f"arrays before changing them (torch.from_numpy does not)."
                )

    def _shared(self, programs: Sequence[Program]) -> Iterator[tuple[str, Any]]:
        for batch in self._batches:
            for name, array in batch.items():
                if isinstance(array, np.ndarray):
                    yield f"calibration input {name!r}", array
        for program in programs:
            for name, tensor in program.weights().items():
                if not isinstance(tensor, ir.ExternalTensor) and not _mapped(tensor.numpy()):
                    yield f"weight {name!r}", tensor


def _mapped(array: np.ndarray) -> bool:
    """Whether the memory is that of a file."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)


def _checksum(shared: Any) -> int:
    array = shared if isinstance(shared, np.ndarray) else shared.numpy()
    if array.dtype.hasobject:
        return 0
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
