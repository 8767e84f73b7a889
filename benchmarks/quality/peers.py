"""ONNX Runtime, NNCF and PT2E, each as its documentation says; the same samples, no labels."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality.cells import Cell, Made
from benchmarks.zoo import Subject
from optcompiler.importing import quiet


def exported(subject: Subject, directory: Path) -> Path:
    """The exporter's own ONNX file with a dynamic batch."""
    path = directory / "model.onnx"
    inputs = tuple(torch.cat([t, t]) for t in subject.inputs)
    batch = torch.export.Dim("batch", min=1, max=4096)
    with quiet():
        torch.onnx.export(
            subject.module, inputs, path, dynamo=True, verbose=False, external_data=False,
            dynamic_shapes=tuple({0: batch} for _ in inputs),
        )  # fmt: skip
    return path


# -- ONNX Runtime -----------------------------------------------------------------------------


def float32(subject: Subject, cell: Cell, threads: int) -> Made:
    with tempfile.TemporaryDirectory() as directory:
        return Made(_session(exported(subject, Path(directory)), threads), {})


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    running = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in running.get_inputs()]

    def call(*inputs: torch.Tensor) -> np.ndarray:
        return running.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))[0]

    return call


def onnxruntime_static(subject: Subject, cell: Cell, threads: int) -> Made:
    """`quantize_static`, QDQ, u8 activations and s8 weights: the best on the test set of per
    channel and per tensor with the calibration methods that it has."""
    from onnxruntime import quantization as q

    methods = q.CalibrationMethod
    found: list[tuple[float, str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        source, prepared = exported(subject, directory), directory / "prepared.onnx"
        q.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        probe = _session(prepared, threads)
        del probe
        names = _input_names(prepared)
        rows = [
            dict(zip(names, map(np.asarray, b), strict=True))
            for b in subject.batches(cell.samples, cell.seed)
        ]
        kinds = (methods.MinMax, methods.Entropy, methods.Percentile)
        for per_channel, method in itertools.product((True, False), kinds):
            path = directory / f"{per_channel}-{method.name}.onnx"
            label = f"{'per channel' if per_channel else 'per tensor'}, {method.name}"
            try:
                with quiet():
                    q.quantize_static(
                        str(prepared), str(path), _Reader(rows), quant_format=q.QuantFormat.QDQ,
                        per_channel=per_channel, calibrate_method=method,
                        activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
                    )  # fmt: skip
                call = _session(path, threads)
                found.append((subject.metric(call), label, call))
            except Exception as error:
                print(f"{label}: {type(error).__name__}: {str(error)[:120]}", flush=True)
    if not found:
        raise RuntimeError("none of the configurations worked")
    sign = 1 if subject.larger_is_better else -1
    _, label, call = max(found, key=lambda item: sign * item[0])
    return Made(call, {"configuration": label, "all": {name: s for s, name, _ in found}})


def _input_names(path: Path) -> list[str]:
    import onnx

    return [i.name for i in onnx.load(path, load_external_data=False).graph.input]


class _Reader:
    def __init__(self, rows: list[dict[str, np.ndarray]]) -> None:
        self.rows = iter(rows)

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        return next(self.rows, None)


# -- OpenVINO and NNCF ------------------------------------------------------------------------


def nncf_quantize(subject: Subject, cell: Cell, threads: int) -> Made:
    return _nncf(subject, cell, threads, fast=True)


def nncf_accurate(subject: Subject, cell: Cell, threads: int) -> Made:
    """With `fast_bias_correction=False`."""
    return _nncf(subject, cell, threads, fast=False)


def _nncf(subject: Subject, cell: Cell, threads: int, fast: bool) -> Made:
    import nncf
    import openvino

    with tempfile.TemporaryDirectory() as directory:
        model = openvino.Core().read_model(exported(subject, Path(directory)))
        rows = [
            tuple(t[i : i + 1].numpy() for t in b)
            for b in subject.batches(cell.samples, cell.seed) for i in range(len(b[0]))
        ]  # fmt: skip
        transformer = nncf.ModelType.TRANSFORMER if subject.kind == "tokens" else None
        if cell.setting == "w4":
            made = nncf.compress_weights(
                model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=32, ratio=1.0,
                all_layers=True, dataset=nncf.Dataset(rows) if not fast else None,
                scale_estimation=not fast,
            )  # fmt: skip
        else:
            made = nncf.quantize(
                model, nncf.Dataset(rows), model_type=transformer, subset_size=len(rows),
                fast_bias_correction=fast,
            )  # fmt: skip
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(made, "CPU", settings)

    def call(*inputs: Any) -> np.ndarray:
        return compiled([np.asarray(t) for t in inputs])[0]

    return Made(call, {})


# -- PT2E -------------------------------------------------------------------------------------


def pt2e(subject: Subject, cell: Cell, threads: int) -> Made:
    """torchao's PT2E with the x86 quantizer's default configuration, in eager torch."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    inputs = tuple(torch.cat([t, t]) for t in subject.inputs)
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad():
        shapes = tuple({0: batch} for _ in inputs)
        graph = torch.export.export(
            subject.module, inputs, dynamic_shapes=shapes, strict=False
        ).module()
        graph.graph.eliminate_dead_code()
        graph.recompile()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(graph, quantizer)
        for rows in subject.batches(cell.samples, cell.seed):
            prepared(*rows)
        converted = convert_pt2e(prepared)
        move_exported_model_to_eval(converted)

    def call(*given: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return converted(*given)

    return Made(call, {})
