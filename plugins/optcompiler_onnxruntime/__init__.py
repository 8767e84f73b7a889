"""The onnxruntime backend: standard ONNX that stock ONNX Runtime, OpenVINO and TensorRT load."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from optcompiler import hookimpl

if TYPE_CHECKING:
    from optcompiler.backend import Backend


@hookimpl
def optcompiler_backends() -> Iterable[Backend]:
    from optcompiler_onnxruntime.backend import OnnxRuntimeBackend

    return [OnnxRuntimeBackend()]


# read when ONNX Runtime is imported, which would write a device id into the home directory
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
