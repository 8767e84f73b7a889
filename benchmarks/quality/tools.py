"""The tools by name, and at which settings each takes part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.quality import ours, peers
from benchmarks.quality.cells import Cell, Made
from benchmarks.zoo import Subject


@dataclass(frozen=True)
class Tool:
    title: str
    make: Callable[[Subject, Cell, int], Made]
    settings: Sequence[str]
    packages: Sequence[str] = ()
    needs_data: bool = True
    seeded: bool = True


TOOLS = {
    "fp32": Tool("float32", peers.float32, ("fp32",), needs_data=False, seeded=False),
    "ours": Tool("optcompiler", ours.make, ("w8a8", "w4a8", "w4a4", "w4"), needs_data=False),
    "onnxruntime": Tool(
        "ONNX Runtime, its best", peers.onnxruntime_static, ("w8a8",), ("onnxruntime",)
    ),
    "nncf": Tool("NNCF", peers.nncf_quantize, ("w8a8", "w4"), ("nncf", "openvino")),
    "nncf-accurate": Tool(
        "NNCF, accurate bias correction; scale estimation at 4 bits", peers.nncf_accurate,
        ("w8a8", "w4"), ("nncf", "openvino"),
    ),
    "pt2e": Tool("PT2E, x86 quantizer", peers.pt2e, ("w8a8",), ("torchao",)),
}  # fmt: skip
