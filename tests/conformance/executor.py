"""The FX executor as a subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir
import torch

from optcompiler.executor import argument_of, to_torch
from optcompiler.ops.types import numpy_of
from optcompiler.program import Program
from tests.conformance.runner import Exclusion, Subject


class Executor(Subject):
    name: ClassVar[str] = "fx"
    floors: ClassVar[Mapping[str, int]] = {
        "node": 1531,
        "simple": 15,
        "pytorch-converted": 82,
        "pytorch-operator": 35,
    }
    exclusions: ClassVar[Sequence[Exclusion]] = ()

    def run(self, program: Program, inputs: Mapping[str, Any]) -> Sequence[Any]:
        module = to_torch(program, trainable=False)
        with torch.no_grad():
            results = module(*(argument_of(inputs[p.name]) for p in program.inputs))
        return [
            plain(result, ir.DataType[port.dtype])
            for result, port in zip(results, program.outputs, strict=True)
        ]


def plain(value: Any, dtype: ir.DataType) -> Any:
    """An output of the executor as numpy: lists stay lists, None stays None."""
    if value is None or isinstance(value, list):
        return value and [plain(item, dtype) for item in value]
    return numpy_of(value, dtype)
