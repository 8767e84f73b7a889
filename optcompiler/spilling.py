"""Large arrays that passes make, kept in files without a name instead of in memory.

The model's own weights may be mapped from a file far larger than the memory; so may what takes
their place. The pages of such a file are the system's to write back and to drop.
"""

from __future__ import annotations

import mmap
import tempfile

import numpy as np

SPILL_ABOVE_BYTES = 1 << 25
"""Of one array; what is smaller stays in memory."""


def spilled(array: np.ndarray) -> np.ndarray:
    """A read-only, mapped copy of a large array; any other, and one there is no room for, itself.

    The file lies in the system's temporary folder (`TMPDIR`) and goes with the last view of it.
    """
    if array.nbytes <= SPILL_ABOVE_BYTES or array.dtype.hasobject:
        return array
    try:
        with tempfile.TemporaryFile(prefix="optcompiler-weights-") as file:
            np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(file)
            file.flush()
            held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError:
        return array
    return np.frombuffer(held, array.dtype).reshape(array.shape)
