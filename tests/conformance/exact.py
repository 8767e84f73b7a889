"""What a compile for ONNX Runtime does without choosing: the exact passes, lowering and running."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np

from optcompiler import Registry
from optcompiler.cost import DeviceProfile
from optcompiler.ledger import ROLLED_BACK
from optcompiler.pipeline import resolve
from optcompiler.program import Program
from optcompiler.rewriting import Batch, Stage
from optcompiler.session import Session
from optcompiler.target import Target
from tests.support import make_context

PROFILE = DeviceProfile(
    name="any", backend="onnxruntime", threads=1, mac_rate={"any/fp32": ((1.0, 1e9),)},
    flop_rate={"any/fp32": ((1.0, 1e9),)},
    bandwidth=((1.0, 1e10),), launch_us=1.0, overhead_us=1.0,
)  # fmt: skip

TARGET = Target("onnxruntime", threads=1)


@functools.cache
def registry() -> Registry:
    return Registry()


def apply_exact_passes(program: Program, check: Batch) -> tuple[Program, list[str]]:
    """`program` after every exact pass of the default pipeline, and why any patch was rolled back.

    `check` is the batch on which a compile compares the numbers.
    """
    backend = registry().backend("onnxruntime")
    context = make_context(
        program, capabilities=backend.capabilities(TARGET), precisions=frozenset({"fp32"}),
        calibration=[], holdout=[], ops=registry().ops,
    )  # fmt: skip
    session = Session(
        program, backend, TARGET, registry().cost_model("roofline"), PROFILE, context, check
    )
    for pass_ in resolve(None, registry()):
        if pass_.stage in (Stage.CLEAN, Stage.FUSE):
            program = session.apply_exact(pass_, program)
    return program, [
        f"{r.pass_name}: {r.reason}" for r in session.ledger if r.outcome == ROLLED_BACK
    ]


def run_by_backend(program: Program, inputs: Batch) -> list[np.ndarray]:
    """Outputs of the artifact that the backend makes of `program`."""
    backend = registry().backend("onnxruntime")
    with tempfile.TemporaryDirectory() as name:
        info = backend.lower(program, TARGET, Path(name))
        runner = backend.load(Path(name), info, threads=1)
        try:
            return list(runner.run(inputs))
        finally:
            runner.close()
