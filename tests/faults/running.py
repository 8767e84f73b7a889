"""Starting the process with the shim, and telling the shim what to do."""

from __future__ import annotations

import json
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

KILL, FULL = 1, 2
STATE = struct.Struct("lll4096s")
EVERY = 1 << 30


def write_state(state: mmap.mmap, under: str, at: int, kind: int) -> int:
    """Tell the shim where to look and which call to hit; the calls counted so far."""
    (count, *_) = STATE.unpack_from(state)
    STATE.pack_into(state, 0, 0, at, kind, under.encode())
    return count


def run(names: Sequence[str], folder: Path, most: int = EVERY) -> Iterator[dict[str, Any]]:
    """What each scenario came to, hit at `most` points spread evenly, or at every one."""
    library, state = folder / "shim.so", folder / "state"
    subprocess.run(
        [os.environ.get("CC", "cc"), "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared",
         "-fPIC", str(Path(__file__).with_name("shim.c")), "-o", str(library), "-ldl"],
        check=True,
    )  # fmt: skip
    state.write_bytes(bytes(STATE.size))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults", str(folder), str(most), *names],
        env=os.environ | {"LD_PRELOAD": str(library), "FAULTS": str(state), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)
    if process.wait():
        raise RuntimeError(f"the scenarios ended with {process.returncode}")
