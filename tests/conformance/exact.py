"""The exact passes of the default pipeline, applied as a compile for ONNX Runtime applies them."""

from __future__ import annotations

import functools

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
    name="any", backend="onnxruntime", threads=1, mac_rate={"any/fp32": ((1.0, 1e9),)}, flop_rate={"any/fp32": ((1.0, 1e9),)},
    bandwidth=((1.0, 1e10),), launch_us=1.0, overhead_us=1.0,
)  # fmt: skip


@functools.cache
def registry() -> Registry:
    return Registry()


def apply_exact_passes(program: Program, check: Batch) -> tuple[Program, list[str]]:
    """`program` after every exact pass of the default pipeline, and why any patch was rolled back.

    `check` is the batch on which a compile compares the numbers.
    """
    target = Target("onnxruntime", threads=1)
    backend = registry().backend("onnxruntime")
    context = make_context(
        program, capabilities=backend.capabilities(target), precisions=frozenset({"fp32"}),
        calibration=[], holdout=[], ops=registry().ops,
    )  # fmt: skip
    session = Session(
        program, backend, target, registry().cost_model("roofline"), PROFILE, context, check
    )
    for pass_ in resolve(None, registry()):
        if pass_.stage in (Stage.CLEAN, Stage.FUSE):
            program = session.apply_exact(pass_, program)
    return program, [f"{r.pass_name}: {r.reason}" for r in session.ledger if r.outcome == ROLLED_BACK]
