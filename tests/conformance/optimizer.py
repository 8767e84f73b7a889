"""Import, the exact passes of the default pipeline and `onnxruntime` as a subject.

What it is compared with is the model as it came, run by ONNX Runtime with its own optimisations
off: models that ONNX Runtime does not run say nothing about the optimiser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import onnx
import onnxruntime

from optcompiler.program import Program
from optcompiler.target import Target
from tests.conformance.cases import Case
from tests.conformance.exact import apply_exact_passes, registry
from tests.conformance.runner import Exclusion, Subject, compare


class Optimizer(Subject):
    name: ClassVar[str] = "optimizer"
    floors: ClassVar[Mapping[str, int]] = {
        "node": 1431, "simple": 17, "pytorch-converted": 59, "pytorch-operator": 24,
    }  # fmt: skip
    exclusions: ClassVar[Sequence[Exclusion]] = ()

    def applies(self, case: Case) -> bool:
        return baseline(case) is not None

    def run(self, program: Program, inputs: Mapping[str, Any]) -> Sequence[Any]:
        optimized, rolled_back = apply_exact_passes(program, inputs)
        assert not rolled_back, "; ".join(rolled_back)
        backend = registry().backend("onnxruntime")
        with TemporaryDirectory() as directory:
            info = backend.lower(optimized, Target("onnxruntime", threads=1), Path(directory))
            made = onnx.load(Path(directory) / str(info["model"]))
            runner = backend.load(Path(directory), info, threads=1)
            outputs = runner.run(inputs)
            runner.close()
        self.made = made
        return outputs

    def check(self, case: Case) -> None:
        expected = baseline(case)
        assert expected is not None
        program = Program.from_onnx(case.model)
        for (inputs, _), outputs in zip(case.data, expected, strict=True):
            compare(self.run(program, inputs), outputs, case)
            same_interface(case.model, self.made)


_BASELINES: dict[tuple[str, str], list[Sequence[Any]] | None] = {}


def baseline(case: Case) -> list[Sequence[Any]] | None:
    """Outputs of stock ONNX Runtime for each data set, None where it cannot run the model."""
    key = (case.kind, case.name)
    if key not in _BASELINES:
        try:
            _BASELINES[key] = _stock(case)
        except Exception:  # whatever ONNX Runtime raises, it does not run the model
            _BASELINES[key] = None
    return _BASELINES[key]


def _stock(case: Case) -> list[Sequence[Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        case.model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [session.run(None, dict(inputs)) for inputs, _ in case.data]


def same_interface(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Raise `AssertionError` where names, order, types or stated dimensions changed."""
    given = {i.name for i in before.graph.initializer}
    wanted = [v for v in before.graph.input if v.name not in given]
    for kind, old, new in (
        ("inputs", wanted, after.graph.input),
        ("outputs", before.graph.output, after.graph.output),
    ):
        assert [v.name for v in old] == [v.name for v in new], f"{kind} changed names"
        for o, n in zip(old, new, strict=True):
            assert _fits(o.type, n.type), f"{o.name} was {o.type}, is {n.type}"


def _fits(old: onnx.TypeProto, new: onnx.TypeProto) -> bool:
    kind = old.WhichOneof("value")
    if kind is None:
        return True
    if kind != new.WhichOneof("value"):
        return False
    if kind in ("sequence_type", "optional_type"):
        return _fits(getattr(old, kind).elem_type, getattr(new, kind).elem_type)
    o, n = old.tensor_type, new.tensor_type
    if o.elem_type != n.elem_type:
        return False
    if not o.HasField("shape"):
        return True
    return (
        n.HasField("shape")
        and len(o.shape.dim) == len(n.shape.dim)
        and all(
            (not a.HasField("dim_value") or a.dim_value == b.dim_value)
            and (not a.dim_param or b.dim_param == a.dim_param or b.HasField("dim_value"))
            for a, b in zip(o.shape.dim, n.shape.dim, strict=True)
        )
    )
