"""Running an ONNX file with ONNX Runtime."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from optcompiler import scratch
from optcompiler.backend import Runner
from optcompiler.errors import InputError, UnsupportedOperatorError

_AS_WRITTEN = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""ONNX Runtime multiplies weights of 4 bits with activations that it rounds to 8 bits, by itself
(level 4). Level 1 leaves them in float, as the program says, for which it has no kernel with
weights of 8 bits: those take 70 times as long as floats (1.32)."""

_RENAMED = re.compile(r"^fused |(_token_\d+|/MatMulAddFusion\w*|/\w+Fusion\w*|_nchwc)$")
"""What ONNX Runtime adds to the name of a node that it fuses."""


class OnnxRuntimeRunner(Runner):
    """One session on the CPU with `threads` threads inside operators and one between them."""

    def __init__(self, path: Path, threads: int, as_written: bool = True) -> None:
        self._path = path
        self._threads = threads
        self._entries = _AS_WRITTEN if as_written else {}
        self._session: onnxruntime.InferenceSession | None = _session(path, threads, self._entries)
        self._outputs = [o.name for o in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if self._session is None:
            raise InputError(f"{self._path.name}: the runner is closed; load the artifact again.")
        errors = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
        try:
            outputs: list[Any] = list(self._session.run(self._outputs, dict(inputs)))
        except errors.InvalidArgument as error:
            raise InputError(
                f"{self._path.name}: the inputs are not those of the model "
                f"({' '.join(str(error).split())[:300]}); compile or copy the artifact again."
            ) from error
        for index, value in enumerate(outputs):
            if value is not None and not isinstance(value, list):
                outputs[index] = np.asarray(value)
        return outputs

    def kernel_times_us(self, inputs: Mapping[str, np.ndarray]) -> dict[str, float] | None:
        """Times of the nodes of ONNX Runtime's optimised graph in its third run.

        A node that ONNX Runtime fused goes by the name of the node it grew from; those that it
        inserts itself (layout changes) keep the names it gives them.
        """
        with scratch.directory() as directory:
            session = _session(self._path, self._threads, self._entries, str(directory / "profile"))
            for _ in range(3):
                session.run(self._outputs, dict(inputs))
            events = json.loads(Path(session.end_profiling()).read_text())
        return _last_run(events)

    def close(self) -> None:
        self._session = None


def _last_run(events: list[dict[str, Any]]) -> dict[str, float]:
    runs = [e for e in events if e.get("name") == "model_run"]
    start = runs[-1]["ts"] if runs else 0
    times: dict[str, float] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith("_kernel_time") or event["ts"] < start:
            continue
        node = name.removesuffix("_kernel_time")
        while (shorter := _RENAMED.sub("", node)) != node:
            node = shorter
        node = node or str(event.get("args", {}).get("op_name", "node"))
        times[node] = times.get(node, 0.0) + float(event["dur"])
    return times


PRECISE = {"session.x64quantprecision": "1"}
"""Where a processor lacks VNNI, products of uint8 and int8 would saturate at 16 bits."""

FLOATS = {"session.disable_quant_qdq": "1"}
"""Quantised layers in float: slow and right. ONNX Runtime 1.32 cannot make precise products of
every model, for one where weights are shared."""


def _session(
    path: Path, threads: int, entries: Mapping[str, str], profile: str = ""
) -> onnxruntime.InferenceSession:
    errors = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    try:
        try:
            return _opened(path, threads, profile, {**entries, **PRECISE})
        except errors.Fail:
            return _opened(path, threads, profile, {**entries, **FLOATS})
    except errors.NotImplemented as error:
        raise UnsupportedOperatorError(
            f"{path.name}: ONNX Runtime {onnxruntime.__version__} has no kernel: "
            f"{' '.join(str(error).split())[:300]}; compile for another backend."
        ) from error
    except (errors.InvalidProtobuf, errors.NoSuchFile, errors.Fail, errors.InvalidGraph) as error:
        raise InputError(
            f"{path.name}: ONNX Runtime cannot open it: {' '.join(str(error).split())[:300]}; "
            f"the file is damaged, or written for a newer runtime."
        ) from error


def _opened(
    path: Path, threads: int, profile: str, entries: Mapping[str, str]
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong comes as an exception too
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
