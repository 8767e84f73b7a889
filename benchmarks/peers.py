"""The tools that engineers compare with, each as its documentation says to use it.

A maker takes a `Job` and gives a callable of the case's inputs; it imports its tool when called, so
that a missing one costs only its own rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import Case

from optcompiler.importing import quiet

Inputs = tuple[torch.Tensor, ...]
Call = Callable[..., Any]


@dataclass(frozen=True)
class Job:
    """What is to be run: a case on inputs of one batch size, with so many threads.

    `directory` keeps what does not depend on the threads, for the next job of the same batch.
    """

    case: Case
    inputs: Inputs
    threads: int
    directory: Path


def kept(path: Path, write: Callable[[Path], object]) -> Path:
    """The file, written if it is not there yet; one half written is never taken for whole."""
    if not path.exists():
        partial = path.with_name(f"partial-{path.name}")
        write(partial)
        os.replace(partial, path)
    return path


def exported(job: Job) -> Path:
    """The exporter's own ONNX file at the shapes of the inputs."""

    def write(path: Path) -> None:
        with quiet():
            torch.onnx.export(
                job.case.module, job.inputs, path, dynamo=True, verbose=False, external_data=False
            )

    return kept(job.directory / "model.onnx", write)


def samples(job: Job, most: int = 8) -> list[Inputs]:
    """Calibration data in batches of the size of the inputs, at most `most` rows or one batch."""
    size = len(job.inputs[0])
    together = [torch.cat(parts)[:most] for parts in zip(*job.case.calibration, strict=True)]
    whole = range(0, len(together[0]) - size + 1, size)
    return [tuple(t[i : i + size] for t in together) for i in whole] or [job.inputs]


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


def onnxruntime_fp32(job: Job) -> Call:
    return session(exported(job), job.threads)


def onnxruntime_int8(job: Job) -> Call:
    """`quantize_static`: QDQ, unsigned activations, signed weights per channel, min-max."""
    from onnxruntime import quantization as q

    source = exported(job)

    def write(path: Path) -> None:
        import onnxruntime

        prepared = job.directory / "prepared.onnx"
        names = [i.name for i in onnxruntime.InferenceSession(source).get_inputs()]
        q.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        rows = iter([dict(zip(names, map(np.asarray, b), strict=True)) for b in samples(job)])

        class Reader(q.CalibrationDataReader):
            def get_next(self) -> Mapping[str, np.ndarray] | None:
                return next(rows, None)

        q.quantize_static(
            str(prepared), str(path), Reader(), quant_format=q.QuantFormat.QDQ, per_channel=True,
            activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
        )  # fmt: skip

    return session(kept(job.directory / "onnxruntime-int8.onnx", write), job.threads)


# -- OpenVINO ---------------------------------------------------------------------------------


def _openvino(path: Path, threads: int, arithmetic: str) -> Call:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(path), "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": arithmetic,
        },
    )  # fmt: skip
    request = compiled.create_infer_request()

    def call(*inputs: torch.Tensor) -> np.ndarray:
        return request.infer([t.numpy() for t in inputs], share_inputs=True)[0]

    return call


def openvino_fp32(job: Job) -> Call:
    return _openvino(exported(job), job.threads, "f32")


def openvino_bf16(job: Job) -> Call:
    """Float weights; the plugin computes in bfloat16 where it holds that to be quicker."""
    return _openvino(exported(job), job.threads, "bf16")


def openvino_int8(job: Job) -> Call:
    """`nncf.quantize` with its defaults, told that a transformer is one."""
    source = exported(job)

    def write(path: Path) -> None:
        import nncf
        import openvino

        model = openvino.Core().read_model(source)
        rows = [[t.numpy() for t in b] for b in samples(job)]
        kind = nncf.ModelType.TRANSFORMER if job.case.transformer else None
        quantized = nncf.quantize(model, nncf.Dataset(rows), model_type=kind, subset_size=len(rows))
        openvino.save_model(quantized, path, compress_to_fp16=False)
        os.replace(path.with_suffix(".bin"), job.directory / "openvino-int8.bin")

    path = kept(job.directory / "openvino-int8.xml", write)
    return _openvino(path, job.threads, "f32")


# -- torch.compile ----------------------------------------------------------------------------


def _inductor(module: Any, job: Job, arithmetic: torch.dtype | None = None) -> Call:
    import torch._inductor.config as inductor

    inductor.freezing = True
    compiled = torch.compile(module, dynamic=False)

    def call(*given: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", arithmetic, enabled=arithmetic is not None):
            return compiled(*given)

    call(*job.inputs)
    return call


def inductor_fp32(job: Job) -> Call:
    return _inductor(job.case.module, job)


def inductor_bf16(job: Job) -> Call:
    """Autocast to bfloat16, compiled with it."""
    return _inductor(job.case.module, job, torch.bfloat16)


def inductor_int8(job: Job) -> Call:
    """PT2E with the x86 quantizer's default configuration."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    with torch.no_grad():
        graph = torch.export.export(job.case.module, job.inputs, strict=False).module()
        # The quantizer fails on a layer whose result nobody reads, as BERT's unused pooler.
        graph.graph.eliminate_dead_code()
        graph.recompile()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(graph, quantizer)
        for batch in samples(job):
            prepared(*batch)
        converted = convert_pt2e(prepared)
        move_exported_model_to_eval(converted)
        return _inductor(converted, job)


# -- all of them ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """A tool by its own name, what it takes to run it, and how by precision."""

    title: str
    packages: Mapping[str, Sequence[str]]
    makers: Mapping[str, Callable[[Job], Call]]


PEERS: Mapping[str, Peer] = {
    "onnxruntime": Peer(
        "ONNX Runtime",
        {"fp32": ["onnxruntime"], "int8": ["onnxruntime"]},
        {"fp32": onnxruntime_fp32, "int8": onnxruntime_int8},
    ),
    "openvino": Peer(
        "OpenVINO",
        {"fp32": ["openvino"], "bf16": ["openvino"], "int8": ["openvino", "nncf"]},
        {"fp32": openvino_fp32, "bf16": openvino_bf16, "int8": openvino_int8},
    ),
    "inductor": Peer(
        "torch.compile",
        {"fp32": ["torch"], "bf16": ["torch"], "int8": ["torch", "torchao"]},
        {"fp32": inductor_fp32, "bf16": inductor_bf16, "int8": inductor_int8},
    ),
}


@dataclass(frozen=True)
class Made:
    """A call and the seconds its making took, or why there is none."""

    call: Call | None
    seconds: float
    reason: str = ""


def made(maker: Callable[[], Call]) -> Made:
    """What the maker gives, called once; a failure of any kind becomes one line."""
    start = time.perf_counter()
    try:
        call = maker()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return Made(None, time.perf_counter() - start, f"{type(error).__name__}: {first[:160]}")
    return Made(call, time.perf_counter() - start)
