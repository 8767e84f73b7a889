"""Models with inputs and expected outputs: those of `onnx.backend.test` that the onnx wheel holds.

The node models are made in memory, the others read from the wheel. Tensors are numpy arrays (with
ml_dtypes where numpy has no type), sequences are lists, an empty optional is None.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from optcompiler_passes._folding import RANDOM

NEWEST_OPSET = 26
"""What ONNX Runtime and onnx_ir know; models of later operator sets are drafts."""

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")


@dataclass(frozen=True)
class Case:
    """One model with what it is run on. `random` cases promise types and shapes alone."""

    name: str
    kind: str
    model: onnx.ModelProto
    data: Sequence[tuple[Mapping[str, Any], Sequence[Any]]]
    rtol: float
    atol: float
    random: bool

    def __repr__(self) -> str:
        return self.name


@functools.cache
def cases(kind: str) -> tuple[Case, ...]:
    """The cases of one of `KINDS` by name, of opset 26 or earlier."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tests = sorted(load_model_tests(kind=kind), key=lambda test: str(test.name))
    found: list[Case] = []
    for test in tests:
        model = test.model or onnx.load(Path(test.model_dir or "") / "model.onnx")
        if any(o.version > NEWEST_OPSET for o in model.opset_import if not o.domain):
            continue
        known = {i.name for i in model.graph.initializer}
        ports = [v for v in model.graph.input if v.name not in known or test.model is not None]
        data = [
            (
                {p.name: _plain(i) for p, i in zip(ports, inputs, strict=False)},
                [_plain(o) for o in outputs],
            )
            for inputs, outputs in test.data_sets or _data_sets(Path(test.model_dir or ""), model)
        ]
        random = any(node.op_type in RANDOM for node in _nodes(model.graph))
        found.append(Case(test.name, kind, model, data, test.rtol, test.atol, random))
    return tuple(found)


def _plain(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None else np.asarray(value)


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    found = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                found += _nodes(inner)
    return found


def _data_sets(directory: Path, model: onnx.ModelProto) -> list[tuple[list[Any], list[Any]]]:
    return [
        (
            [_read(folder / f"input_{i}.pb", v) for i, v in enumerate(_fed(folder, model))],
            [_read(folder / f"output_{i}.pb", v) for i, v in enumerate(model.graph.output)],
        )
        for folder in sorted(directory.glob("test_data_set_*"))
    ]


def _fed(folder: Path, model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs that the files of a data set are for: the first ones, initializers left out."""
    known = {i.name for i in model.graph.initializer}
    ports = [v for v in model.graph.input if v.name not in known]
    return ports[: len(list(folder.glob("input_*.pb")))]


def _read(path: Path, info: onnx.ValueInfoProto) -> Any:
    kind = info.type.WhichOneof("value")
    data = path.read_bytes()
    if kind == "sequence_type":
        return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if kind == "optional_type":
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return numpy_helper.to_array(onnx.TensorProto.FromString(data))
