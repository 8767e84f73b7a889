"""`python -m optcompiler_cuda.worker DIRECTORY`: runs an artifact under Triton's interpreter.

Triton reads `TRITON_INTERPRET` when it is imported, so interpreting happens in a process that
started with it. Requests come on standard input and answers go to standard output, each a frame:
one byte of status, the length in eight bytes (little-endian), then tensors in the safetensors
format, or for status "e" a message in UTF-8.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np

from optcompiler.children import Children
from optcompiler.errors import ToolchainError

TENSORS = b"t"
ERROR = b"e"


class Worker:
    """The caller's end: a process interpreting one artifact."""

    def __init__(self, directory: Path, threads: int) -> None:
        self.children = Children()
        self.process = self.children.start(
            [sys.executable, "-m", "optcompiler_cuda.worker", str(directory.resolve())],
            env=clean_environment(TRITON_INTERPRET="1", OMP_NUM_THREADS=str(threads)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs in graph order; raises `ToolchainError` with the worker's last words."""
        from safetensors.numpy import load, save

        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            arrays = {k: np.ascontiguousarray(v) for k, v in inputs.items()}
            write_frame(self.process.stdin, TENSORS, save(arrays))
            status, payload = read_frame(self.process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise ToolchainError(
                f"the Triton interpreter ended with exit code {self.process.wait()}; "
                f"what it printed is on standard error."
            ) from error
        if status == ERROR:
            raise ToolchainError(
                f"the Triton interpreter failed: {payload.decode()}; "
                f"check that triton, torch and numpy fit together (triton 3.6 needs numpy < 2.4)."
            )
        outputs = load(payload)
        return [outputs[str(i)] for i in range(len(outputs))]

    def close(self) -> None:
        """End the process; harmless when it has ended."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        self.children.end()
        if self.process.stdout is not None:
            self.process.stdout.close()


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment and import path for a child, without its interpreter switch."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    return environment | changes


def write_frame(stream: IO[bytes], status: bytes, payload: bytes) -> None:
    stream.write(status + len(payload).to_bytes(8, "little"))
    stream.write(payload)
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[bytes, bytes]:
    """Status and payload; raises `EOFError` when the other side has closed."""
    head = stream.read(9)
    if len(head) < 9:
        raise EOFError
    size = int.from_bytes(head[1:], "little")
    payload = stream.read(size)
    if len(payload) < size:
        raise EOFError
    return head[:1], payload


def main(directory: str) -> None:
    # Whatever prints in this process must not land between frames.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # Masked lanes hold anything, as they do on a GPU.
    np.seterr(all="ignore")
    from safetensors.numpy import load, save

    from optcompiler_cuda.executor import Executor

    executor = None
    while True:
        try:
            _, payload = read_frame(sys.stdin.buffer)
        except EOFError:
            return
        try:
            executor = executor or Executor(Path(directory), "cpu")
            executor.put(load(payload))
            executor.launch()
            outputs = {str(i): np.ascontiguousarray(a) for i, a in enumerate(executor.get())}
            write_frame(answers, TENSORS, save(outputs))
        except Exception:
            write_frame(answers, ERROR, traceback.format_exc(limit=-4).strip().encode())


if __name__ == "__main__":
    main(sys.argv[1])
