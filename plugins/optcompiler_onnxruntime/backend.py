"""Writing standard ONNX and saying what ONNX Runtime makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as ir_passes

from optcompiler.backend import Backend, Capabilities, Kernel, Runner
from optcompiler.choices import Choices
from optcompiler.errors import InputError, UnsupportedOperatorError, VerificationError
from optcompiler.files import inside
from optcompiler.program import PASS_KEY, SOURCE_KEY, Program, static_shape
from optcompiler.reading import check_file
from optcompiler.target import Target

MODEL = "model.onnx"
DATA = "model.onnx.data"
EXTERNAL_ABOVE_BYTES = 1 << 30
"""Weights beyond this go to a file beside the model; a protobuf cannot hold 2 GiB."""

EXTERNAL_TENSOR_BYTES = 1024

DOMAINS = ("", "ai.onnx.ml")
"""Operator sets that every ONNX runtime is expected to know."""

INTEGER_OPS = frozenset(
    {
        "Add", "AveragePool", "Concat", "Conv", "Gemm", "GlobalAveragePool", "LeakyRelu", "MatMul",
        "MaxPool", "Mul", "Sigmoid", "Softmax", "Where",
    }
)  # fmt: skip
"""Operators for which ONNX Runtime's QDQ fusion has an integer kernel on the CPU (1.20 to 1.32)."""


class OnnxRuntimeBackend(Backend):
    """Programs as ONNX files run by ONNX Runtime on the CPU.

    Functions are inlined, since every runtime reads what has none; ONNX Runtime then fuses on its
    own. Quantised programs stay in QDQ form, from which ONNX Runtime and OpenVINO make integer
    kernels.
    """

    name: ClassVar[str] = "onnxruntime"
    summary: ClassVar[str] = "standard ONNX, run by stock ONNX Runtime on the CPU"

    def capabilities(self, target: Target) -> Capabilities:
        if target.options:
            unknown = next(iter(target.options))
            raise InputError(
                f"target {target}: onnxruntime has no option {unknown!r}; it takes threads alone."
            )
        return Capabilities(
            precisions=frozenset({"fp32", "int8", "int4"}),
            integer_ops=INTEGER_OPS,
            activation_dtype="UINT8",
            weight_dtype="INT8",
            per_channel=True,
            dynamic_shapes=True,
            any_port=True,
            float_outputs=frozenset({"MatMul", "Gemm"}),
            stored_weight_ops=frozenset({"MatMul"}),
            emulated=frozenset({"w4a8", "w4a4", "fp8", "codebook4", "codebook3"}),
        )

    def kernels(self, program: Program, target: Target) -> Sequence[Kernel]:
        from optcompiler_onnxruntime.kernels import kernels_of

        if program.functions:
            program = program.inlined()
            program.infer_shapes()
        return kernels_of(program)

    def lower(
        self, program: Program, target: Target, directory: Path, choices: Choices | None = None
    ) -> Mapping[str, Any]:
        self.capabilities(target)
        copy = program.inlined()
        for node in copy.all_nodes():
            if node.domain not in DOMAINS:
                raise UnsupportedOperatorError(
                    f"operator {node.domain}::{node.op_type} of node {node.name!r} is not standard "
                    f"ONNX; replace it, or compile for a backend that declares it."
                )
        for port in (*copy.inputs, *copy.outputs):
            if port.dtype == "BFLOAT16":
                raise UnsupportedOperatorError(
                    f"{port.name!r} is bfloat16, which ONNX Runtime neither takes nor gives in "
                    f"Python; cast it to float32 in the model."
                )
        _explicit_zero_points(copy)
        _spell_out_bounds(copy)
        copy.sweep()
        _strip(copy.model)
        path = directory / MODEL
        external = copy.weight_bytes > EXTERNAL_ABOVE_BYTES
        if external:
            ir.save(
                copy.model,
                path,
                external_data=DATA,
                size_threshold_bytes=EXTERNAL_TENSOR_BYTES,
            )
        else:
            path.write_bytes(copy.to_proto().SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(str(path), full_check=not external)
        except onnx.checker.ValidationError as error:
            raise VerificationError(f"{MODEL} is not valid ONNX: {error}") from error
        return {
            "model": MODEL,
            "external_data": DATA if external else None,
            "opset": copy.opset,
            "nodes": len(copy.graph),
            "weights_of_bytes": _multiplies_bytes(copy),
        }

    def load(self, directory: Path, info: Mapping[str, Any], *, threads: int) -> Runner:
        from optcompiler_onnxruntime.runner import OnnxRuntimeRunner

        path = inside(directory, str(info["model"]))
        check_file(path)
        return OnnxRuntimeRunner(path, threads, as_written=not info.get("weights_of_bytes"))

    def versions(self) -> Mapping[str, str]:
        from importlib.metadata import version

        return {"onnxruntime": version("onnxruntime"), "onnx": version("onnx")}


def _explicit_zero_points(program: Program) -> None:
    """Give each 8-bit DequantizeLinear and QuantizeLinear node an explicit zero point of its own.

    ONNX Runtime makes integer Gemm and MatMul kernels only of nodes that have one (QGemm in
    `qdq_selectors.cc`); the value, 0, is what its absence means. A signed one is not shared: where
    ONNX Runtime makes uint8 of int8 it cannot open a model with shared ones (1.32, without VNNI).
    """
    for node in list(program.graph):
        if node.domain != "" or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        given = node.inputs[2] if len(node.inputs) > 2 else None
        if given is not None:
            held = given.const_value
            shared = given.is_initializer() and len(given.uses()) > 1
            if shared and held is not None and held.dtype == ir.DataType.INT8:
                own = program.add_weight(given.name or "zero_point", held.numpy())
                node.replace_input_with(2, own)
            continue
        quantized = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
        scale = node.inputs[1]
        if quantized is None or scale is None or quantized.dtype is None:
            continue
        shape = static_shape(scale)
        if shape is None or quantized.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
            continue
        zero = program.add_weight("zero_point", np.zeros(shape, dtype=quantized.dtype.numpy()))
        node.resize_inputs(3)
        node.replace_input_with(2, zero)


def _multiplies_bytes(program: Program) -> bool:
    """Whether a MatMul of floats has a constant weight in integers of 8 bits."""
    for node in program.graph:
        if node.domain != "" or node.op_type != "MatMul":
            continue
        data, weight = (v.producer() if v is not None else None for v in node.inputs[:2])
        if weight is None or weight.op_type != "DequantizeLinear" or weight.inputs[0] is None:
            continue
        bits = weight.inputs[0].dtype in (ir.DataType.INT8, ir.DataType.UINT8)
        if bits and (data is None or data.op_type != "DequantizeLinear"):
            return True
    return False


BYTES = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16})
"""Levels whose bounds ONNX Runtime compares with those of an activation."""


def _spell_out_bounds(program: Program) -> None:
    """Write Relu and Clip before quantisers to other types than `BYTES` as Max and Min.

    ONNX Runtime (1.32) leaves out a Relu before a quantiser to 4 bits or to floats of 8 bits whose
    zero point is 0, though that keeps negative numbers, and cannot open a model where a Clip
    between a Conv and such a quantiser has other bounds than that (`relu_quantizelinear.cc`,
    `clip_quantizelinear.cc`).
    """
    for node in list(program.graph):
        if node.domain != "" or node.op_type not in ("Relu", "Clip"):
            continue
        result, data = node.outputs[0], node.inputs[0]
        levels = [n.outputs[0].dtype for n in result.consumers() if n.op_type == "QuantizeLinear"]
        if data is None or not set(levels) - BYTES - {None} or data.dtype != ir.DataType.FLOAT:
            continue
        low, high = [*node.inputs[1:3], None, None][:2]
        if node.op_type == "Relu":
            low = program.add_weight("zero", np.zeros((), np.float32))
        if low is not None and high is not None:
            above = ir.node("Max", [data, low], name=program.fresh_name(f"{node.name}_max"))
            made = above.outputs[0]
            made.name, made.type, made.shape = f"{above.name}_out", data.type, data.shape
            program.graph.insert_before(node, above)
            data, low = made, None
        bound = high if low is None else low
        if bound is not None:
            node.op_type = "Max" if low is not None else "Min"
            node.resize_inputs(2)
            node.replace_input_with(0, data)
            node.replace_input_with(1, bound)


def _strip(model: ir.Model) -> None:
    """Leave no metadata but which pass made a node and from which module it was traced."""
    provenance = [
        (node, {k: v for k, v in node.metadata_props.items() if k in (PASS_KEY, SOURCE_KEY)})
        for node in model.graph.all_nodes()
    ]
    ir_passes.ClearMetadataAndDocStringPass()(model)
    for node, kept in provenance:
        node.metadata_props.update(kept)
    ir_passes.RemoveUnusedOpsetsPass()(model)
    model.producer_name = "optcompiler"
    model.producer_version = None
    model.doc_string = None
