"""Comparing the executor with ONNX Runtime and the ONNX reference on small programs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import torch

from optcompiler.executor import to_torch
from optcompiler.ops.types import numpy_of, tensor_of
from optcompiler.program import Program
from tests.support import assert_close, run_onnx


def single(
    op_type: str,
    inputs: str,
    outputs: str,
    attributes: str = "",
    constants: str = "",
    opset: int = 20,
    arguments: str | None = None,
) -> Program:
    """A program of one node: `inputs` are graph inputs, `constants` initializers.

    The node reads the inputs, then the constants, in order, or the names in `arguments`.
    """
    names = [part.split()[-1] for part in _parts(inputs)]
    names += [part.split("=")[0].split()[-1] for part in _parts(constants)]
    results = [part.split()[-1] for part in _parts(outputs)]
    text = f"""
        <ir_version: 10, opset_import: ["" : {opset}]>
        g ({inputs}) => ({outputs}) {f"<{constants}>" if constants else ""} {{
            [node] {", ".join(results)} = {op_type} {f"<{attributes}>" if attributes else ""}
                ({", ".join(names) if arguments is None else arguments})
        }}
    """
    return Program(ir.from_onnx_text(text))


def _parts(text: str) -> list[str]:
    """Split at commas outside brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "[{(") - (character in ")}]")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [p.strip() for p in (*parts, text[start:]) if p.strip()]


def seeded(program: Program, seed: int = 0, low: float = -2, high: float = 2) -> dict[str, Any]:
    """Uniform floats in [low, high), integers 0 to 5, random booleans."""
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for value in program.graph.inputs:
        shape = tuple(int(d) for d in value.shape)  # type: ignore[union-attr, arg-type]
        dtype = value.dtype.numpy()  # type: ignore[union-attr]
        if dtype == np.bool_:
            found[str(value.name)] = rng.random(shape) < 0.5
        elif np.issubdtype(dtype, np.integer):
            found[str(value.name)] = rng.integers(0, 5, shape).astype(dtype)
        else:
            found[str(value.name)] = rng.uniform(low, high, shape).astype(dtype)
    return found


def run_torch(program: Program, inputs: dict[str, Any]) -> list[np.ndarray]:
    """Outputs of the executor as numpy in their declared types."""
    module = to_torch(program, trainable=False)
    with torch.no_grad():
        results = module(*(tensor_of(inputs[p.name]) for p in program.inputs))
    return [
        numpy_of(result, ir.DataType[port.dtype])
        for result, port in zip(results, program.outputs, strict=True)
    ]


def check(
    program: Program,
    inputs: dict[str, Any] | None = None,
    *,
    reference: bool = False,
    rtol: float = 1e-5,
) -> None:
    """The executor agrees with ONNX Runtime (or with `onnx.reference`) on `inputs`."""
    inputs = seeded(program) if inputs is None else inputs
    if reference:
        evaluator = onnx.reference.ReferenceEvaluator(program.to_proto())
        expected = [np.asarray(v) for v in evaluator.run(None, inputs)]  # type: ignore[union-attr]
    else:
        expected = run_onnx(program, inputs)
    assert_close(run_torch(program, inputs), expected, rtol)
