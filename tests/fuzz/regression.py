"""Programs that once failed, in ONNX's textual syntax with their inputs as metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx.printer

FOLDER = Path(__file__).parent / "regressions"
INPUT_KEY = "input:"


def as_text(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> str:
    """The model with its inputs; numbers are printed so that they are read back the same."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    del copy.metadata_props[:]
    for name, array in inputs.items():
        numbers = [str(x) for x in array.reshape(-1)]
        text = json.dumps([list(array.shape), array.dtype.name, " ".join(numbers)])
        copy.metadata_props.add(key=INPUT_KEY + name, value=text.replace('"', "'"))
    return onnx.printer.to_text(copy) + "\n"


def from_text(text: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    model = onnx.parser.parse_model(text)
    inputs = {}
    for entry in model.metadata_props:
        if entry.key.startswith(INPUT_KEY):
            shape, dtype, numbers = json.loads(entry.value.replace("'", '"'))
            words = numbers.split()
            if dtype == "bool":
                array = np.array([w == "True" for w in words])
            else:
                array = np.array([float(w) if "float" in dtype else int(w) for w in words])
            inputs[entry.key.removeprefix(INPUT_KEY)] = array.astype(dtype).reshape(shape)
    del model.metadata_props[:]
    return model, inputs


def known() -> list[Path]:
    return sorted(FOLDER.glob("*.onnxtxt"))
