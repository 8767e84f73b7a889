"""Ours: the default pipeline with everything in low precision, or a part of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import optcompiler as oc
from benchmarks import integers_first
from benchmarks.quality.cells import Cell, Made
from benchmarks.zoo import Subject
from optcompiler.pipeline import resolve
from optcompiler_onnxruntime.backend import MODEL, OnnxRuntimeBackend

PRECISIONS = {"w8a8": "int8", "w4a8": "w4a8", "w4a4": "w4a4", "w4": "int4"}
TUNING = ("equalize", "correct-bias", "reconstruct", "distill")
VARIANTS = ("min-max", "mse", *TUNING)
"""Pipelines by their last step: each holds all before it."""


def make(subject: Subject, cell: Cell, threads: int) -> Made:
    """Compiled without a clock and without a limit, so that nothing is left in float; the program
    as it was lowered is scored in ONNX Runtime."""
    registry = oc.Registry(extra=[integers_first])
    target: Any = "onnxruntime"
    if cell.setting != "w4a4":
        target = oc.Target("cpu", threads=threads, sizes={"batch": 1})
    calibration = subject.batches(cell.samples, cell.seed) if cell.samples else oc.synthetic(
        count=64, seed=cell.seed)  # fmt: skip
    compiled = oc.compile(
        subject.module, subject.inputs, target=target, precision=PRECISIONS[cell.setting],
        dynamic="batch", calibration=calibration, budget=oc.Budget(max_damage=float("inf")),
        registry=registry, cost_model=integers_first.IntegersFirst.name, timing=False,
        passes=pipeline(cell.variant, registry), seed=cell.seed,
    )  # fmt: skip
    assert compiled.program is not None
    left = [r.site for r in compiled.ledger if r.outcome != "taken" and r.choice in CHOICES]
    facts = {
        "hash": compiled.program.content_hash(), "left": left,
        "tuned": [f"{r.pass_name}: {r.outcome}, {r.reason}" for r in compiled.ledger
                  if r.pass_name in TUNING],
    }  # fmt: skip
    return Made(session(compiled.program, threads), facts)


CHOICES = tuple(PRECISIONS.values())


def pipeline(variant: str, registry: oc.Registry) -> list[oc.Pass]:
    """The default passes up to a step of `VARIANTS`."""
    passes = resolve(None, registry)
    if not variant:
        return passes
    kept = VARIANTS[: VARIANTS.index(variant) + 1]
    chosen = [p for p in passes if p.name not in TUNING or p.name in kept]
    if variant == "min-max":
        plain = registry.pass_class("insert-qdq")(observer="minmax", weight_observer="minmax")
        chosen = [plain if p.name == plain.name else p for p in chosen]
    return chosen


def session(program: oc.Program, threads: int) -> Any:
    """A call of the program in ONNX Runtime, row by row where it is for a batch of 1."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # Weights of 4 bits against activations in float, as they are in the program.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    with tempfile.TemporaryDirectory() as directory:
        OnnxRuntimeBackend().lower(program, oc.Target("onnxruntime"), Path(directory))
        path = Path(directory) / MODEL
        running = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in running.get_inputs()]

    def call(*inputs: Any) -> np.ndarray:
        return running.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))[0]

    def by_row(*inputs: Any) -> np.ndarray:
        count = len(inputs[0])
        return np.concatenate([call(*(t[i : i + 1] for t in inputs)) for i in range(count)])

    return by_row if program.inputs[0].shape[0] == 1 else call
