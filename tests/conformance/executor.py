"""The FX executor as a subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir
import torch

from optcompiler.executor import to_torch
from optcompiler.ops.types import numpy_of, tensor_of
from optcompiler.program import Program
from tests.conformance.runner import Exclusion, Subject


class Executor(Subject):
    name: ClassVar[str] = "fx"
    floors: ClassVar[Mapping[str, int]] = {
        "node": 1350,
        "simple": 0,
        "pytorch-converted": 70,
        "pytorch-operator": 20,
    }
    exclusions: ClassVar[Sequence[Exclusion]] = ()

    def run(self, program: Program, inputs: Mapping[str, Any]) -> Sequence[Any]:
        module = to_torch(program, trainable=False)
        with torch.no_grad():
            results = module(*(tensor_of(inputs[p.name]) for p in program.inputs))
        return [
            numpy_of(result, ir.DataType[port.dtype])
            for result, port in zip(results, program.outputs, strict=True)
        ]
