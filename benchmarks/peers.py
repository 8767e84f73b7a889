"""The tools that engineers compare with, each as its documentation says to use it.

A maker takes a case, the batch's inputs and the number of threads, and gives a callable of the
case's inputs; each imports its tool when called, so that a missing one costs only its own rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import Case

from optcompiler.importing import quiet

Inputs = tuple[torch.Tensor, ...]
Call = Callable[..., Any]
Maker = Callable[[Case, Inputs, int], Call]


def exported(case: Case, inputs: Inputs) -> Path:
    """The exporter's own ONNX file at the shapes of `inputs`."""
    path = Path(tempfile.mkdtemp()) / "model.onnx"
    with quiet():
        torch.onnx.export(
            case.module, inputs, path, dynamo=True, verbose=False, external_data=False
        )
    return path


def samples(case: Case, inputs: Inputs, most: int = 16) -> list[Inputs]:
    """Calibration data in batches of the size of `inputs`."""
    size = len(inputs[0])
    together = [torch.cat(parts) for parts in zip(*case.calibration, strict=True)]
    whole = [tuple(t[i : i + size] for t in together) for i in range(0, len(together[0]), size)]
    return [b for b in whole if len(b[0]) == size][:most] or [inputs]


# -- ONNX Runtime -----------------------------------------------------------------------------


def session(path: Path, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    running = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in running.get_inputs()]

    def call(*inputs: torch.Tensor) -> np.ndarray:
        return running.run(None, dict(zip(names, (t.numpy() for t in inputs), strict=True)))[0]

    return call


def onnxruntime_fp32(case: Case, inputs: Inputs, threads: int) -> Call:
    return session(exported(case, inputs), threads)


def onnxruntime_int8(case: Case, inputs: Inputs, threads: int) -> Call:
    """`quantize_static`: QDQ, unsigned activations, signed weights per channel, min-max."""
    import onnxruntime
    from onnxruntime import quantization as q

    path = exported(case, inputs)
    prepared, quantized = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
    names = [i.name for i in onnxruntime.InferenceSession(path).get_inputs()]
    q.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    rows = iter([dict(zip(names, map(np.asarray, b), strict=True)) for b in samples(case, inputs)])

    class Reader(q.CalibrationDataReader):
        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(rows, None)

    q.quantize_static(
        str(prepared), str(quantized), Reader(), quant_format=q.QuantFormat.QDQ, per_channel=True,
        activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
    )  # fmt: skip
    return session(quantized, threads)


# -- OpenVINO ---------------------------------------------------------------------------------


def _openvino(model: Any, threads: int) -> Call:
    import openvino

    compiled = openvino.Core().compile_model(
        model, "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )  # fmt: skip
    request = compiled.create_infer_request()

    def call(*inputs: torch.Tensor) -> np.ndarray:
        return request.infer([t.numpy() for t in inputs], share_inputs=True)[0]

    return call


def openvino_fp32(case: Case, inputs: Inputs, threads: int) -> Call:
    import openvino

    return _openvino(openvino.convert_model(exported(case, inputs)), threads)


def openvino_int8(case: Case, inputs: Inputs, threads: int) -> Call:
    """`nncf.quantize` with its defaults, told that a transformer is one."""
    import nncf
    import openvino

    model = openvino.convert_model(exported(case, inputs))
    rows = [[t.numpy() for t in b] for b in samples(case, inputs)]
    kind = nncf.ModelType.TRANSFORMER if case.transformer else None
    quantized = nncf.quantize(model, nncf.Dataset(rows), model_type=kind, subset_size=len(rows))
    return _openvino(quantized, threads)


# -- torch.compile ----------------------------------------------------------------------------


def _inductor(module: Any, inputs: Inputs, threads: int) -> Call:
    import torch._inductor.config as inductor

    torch.set_num_threads(threads)
    inductor.freezing = True
    compiled = torch.compile(module, dynamic=False)

    def call(*given: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return compiled(*given)

    call(*inputs)
    return call


def inductor_fp32(case: Case, inputs: Inputs, threads: int) -> Call:
    return _inductor(case.module, inputs, threads)


def inductor_int8(case: Case, inputs: Inputs, threads: int) -> Call:
    """PT2E with the x86 quantizer's default configuration."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    with torch.no_grad():
        graph = torch.export.export(case.module, inputs, strict=False).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(graph, quantizer)
        for batch in samples(case, inputs):
            prepared(*batch)
        converted = convert_pt2e(prepared)
        move_exported_model_to_eval(converted)
        return _inductor(converted, inputs, threads)


PEERS: Mapping[str, Mapping[str, Maker]] = {
    "fp32": {
        "ONNX Runtime": onnxruntime_fp32, "OpenVINO": openvino_fp32, "torch.compile": inductor_fp32,
    },
    "int8": {
        "ONNX Runtime": onnxruntime_int8, "OpenVINO": openvino_int8, "torch.compile": inductor_int8,
    },
}  # fmt: skip


def made(
    makers: Mapping[str, Maker], case: Case, inputs: Inputs, threads: int
) -> tuple[dict[str, Call], dict[str, str]]:
    """Those that could be made, and why the others could not."""
    calls: dict[str, Call] = {}
    failed: dict[str, str] = {}
    for name, maker in makers.items():
        try:
            calls[name] = maker(case, inputs, threads)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return calls, failed
