"""Helpers of the test suite: running programs with ONNX Runtime, contexts for passes, comparing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from optcompiler.artifact import Contents, assemble
from optcompiler.backend import Capabilities
from optcompiler.ledger import DECLINED, REJECTED, TAKEN, Ledger, Row
from optcompiler.program import Program
from optcompiler.rewriting import (
    Candidate,
    Decline,
    Pass,
    PassContext,
    Patch,
    apply_candidate,
)
from optcompiler.signature import Signature
from optcompiler.target import Target
from tests.toy import ToyBackend

NUMPY_TYPES = {
    "FLOAT": np.float32,
    "DOUBLE": np.float64,
    "FLOAT16": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}

INT8 = Capabilities(
    precisions=frozenset({"fp32", "int8"}),
    integer_ops=frozenset({"Conv", "MatMul", "Gemm", "Add"}),
    fusions=frozenset({"contraction", "pointwise", "normalization", "softmax", "attention"}),
)


def filled_program(text: str, seed: int = 0, **weights: np.ndarray) -> Program:
    """A program from ONNX text whose declared but undefined tensors become weights.

    `float[8,3,3,3] w` between angle brackets gets seeded values of variance 1 / fan-in (names that
    begin with "var" are positive), unless `weights` gives them.
    """
    model = onnx.parser.parse_model(text)
    graph = model.graph
    known = {i.name for i in graph.initializer} | {v.name for v in graph.input}
    known |= {name for node in graph.node for name in node.output}
    rng = np.random.default_rng(seed)
    for info in [v for v in graph.value_info if v.name not in known]:
        shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
        fan_in = max(1, int(np.prod(shape[1:])) if len(shape) != 2 else shape[0])
        array = rng.standard_normal(shape) / np.sqrt(fan_in)
        array = np.abs(array) + 0.1 if info.name.startswith("var") else array
        array = weights.get(info.name, array).astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(array, info.name))
        graph.value_info.remove(info)
    return Program.from_onnx(model)


class Silent:
    """A progress reporter that shows nothing."""

    def track(self, items: Sequence[Any], description: str) -> Iterator[Any]:
        yield from items

    def note(self, message: str) -> None:
        pass


def random_inputs(program: Program, seed: int = 0, dynamic: int = 2) -> dict[str, np.ndarray]:
    """Seeded inputs for every port; floats are standard normal, integers below 4."""
    rng = np.random.default_rng(seed)
    inputs = {}
    for p in program.inputs:
        shape = tuple(d if isinstance(d, int) else dynamic for d in p.shape)
        dtype = NUMPY_TYPES[p.dtype]
        if np.issubdtype(dtype, np.floating):
            inputs[p.name] = rng.standard_normal(shape).astype(dtype)
        else:
            inputs[p.name] = rng.integers(0, 2 if dtype is np.bool_ else 4, shape).astype(dtype)
    return inputs


def run_onnx(
    program: Program, inputs: dict[str, np.ndarray] | None = None, *, optimize: bool = False
) -> list[np.ndarray]:
    """Outputs of stock ONNX Runtime, by default with its own graph optimisations off."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        program.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs if inputs is not None else random_inputs(program))


def make_context(program: Program, **changes: Any) -> PassContext:
    """A context for `program` as its own teacher: int8 allowed, four random calibration batches."""
    from optcompiler.ops import builtin_table

    if "calibration" not in changes:
        changes["calibration"] = [random_inputs(program, seed) for seed in range(4)]
    if "holdout" not in changes:
        changes["holdout"] = [random_inputs(program, 99)]
    context = PassContext(
        target=Target("onnxruntime", threads=1),
        capabilities=INT8,
        precisions=frozenset({"fp32", "int8"}),
        teacher=program,
        calibration=changes.pop("calibration", None) or [],
        holdout=changes.pop("holdout", None) or [],
        ops=builtin_table(),
        seed=0,
        progress=Silent(),
        kernels=lambda p: [],
        price_us=lambda p: float(len(p.graph)),
    )
    return replace(context, **changes)


def proposals(
    pass_: Pass, program: Program, context: PassContext | None = None
) -> tuple[list[Candidate], list[Decline]]:
    """What the pass proposes and what it declines, in order."""
    found = list(pass_.propose(program, context or make_context(program)))
    return (
        [c for c in found if isinstance(c, Candidate)],
        [d for d in found if isinstance(d, Decline)],
    )


def apply_all(
    pass_: Pass, program: Program, context: PassContext | None = None
) -> tuple[Program, list[Patch]]:
    """Apply every candidate in order (the last of alternatives at a site), verifying each patch.

    Exact candidates are checked on seeded inputs by ONNX Runtime within their declared tolerance.
    """
    candidates, _ = proposals(pass_, program, context)
    chosen = {c.site: c for c in candidates}
    patches = []
    for candidate in chosen.values():
        patch = apply_candidate(type(pass_).name, candidate, program)
        patch.after.verify(like=program)
        if candidate.exact:
            inputs = random_inputs(program, 7)
            assert_close(run_onnx(patch.after, inputs), run_onnx(program, inputs), candidate.rtol)
        patches.append(patch)
        program = patch.after
    return program, patches


def assert_close(
    got: Sequence[np.ndarray], expected: Sequence[np.ndarray], rtol: float = 1e-5
) -> None:
    """Equal within `rtol` of the largest magnitude of each output; NaNs in equal places."""
    assert len(got) == len(expected)
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        assert g.dtype == e.dtype
        if not np.issubdtype(e.dtype, np.floating):
            np.testing.assert_array_equal(g, e)
            continue
        scale = float(np.max(np.abs(e), initial=0.0, where=np.isfinite(e))) or 1.0
        np.testing.assert_allclose(g, e, rtol=0, atol=rtol * scale, equal_nan=True)


def op_types(program: Program) -> list[str]:
    """Operator types of the main graph, in order."""
    return [node.op_type for node in program.graph]


MLP = """
<ir_version: 10, opset_import: ["" : 20]>
mlp (float[2,4] x) => (float[2,3] y)
<float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}, float[3] b = {0.5,-1,2}>
{
  [gemm] h = MatMul(x, w)
  [bias] s = Add(h, b)
  [act] y = Relu(s)
}
"""

ROWS = [
    Row("fuse", "gemm", "with bias", TAKEN, "a kernel less", True, 2.5, None, ("gemm", "bias")),
    Row("insert-qdq", "gemm", "int8", REJECTED, "over the limit", False, 1.0, 0.2, ("gemm",)),
    Row("insert-qdq", "act", "-", DECLINED, "no integer kernel for Relu", nodes=("act",)),
]


def make_artifact(directory: Path, program: Program | None = None, **changes: Any) -> Path:
    """An artifact of `program` (`MLP`) for `ToyBackend`; `changes` go to `Contents`."""
    program = program or Program.from_text(MLP)
    code = directory.with_name(f"{directory.name}-code")
    code.mkdir(parents=True)
    contents = Contents(
        program=program, teacher=program,
        target=Target("toy", threads=1),
        backend_info=ToyBackend().lower(program, Target("toy"), code),
        signature=Signature.of_program(program), ledger=Ledger(list(ROWS)),
        options={"precision": "fp32", "budget": {"max_damage": 0.01}, "seed": 0},
        versions={"onnx": "1"},
        measurements={
            "predicted_us": 9.0, "measured_us": 10.5, "baseline_us": 34.4,
            "kernels": [{"name": "k0", "kind": "gemm", "dtype": "fp32", "nodes": ["gemm", "bias"],
                         "predicted_us": 8.0, "measured_us": 10.0}],
            "damage": 0.004, "damage_measure": "kl", "macs": {"before": 24, "after": 24},
            "gates": [{"name": "damage", "limit": 0.01, "value": 0.004, "passed": True}],
        },
    )  # fmt: skip
    assemble(code, replace(contents, **changes), directory)
    return directory
