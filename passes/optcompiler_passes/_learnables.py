"""Initializers that training may change, by the role that they play."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optcompiler.program import Program, constant
from optcompiler_passes._qdq import laid_out

_CONTRACTIONS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_NORMALIZATIONS = frozenset(
    {"GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization"}
)
_ENDS = {"UINT8": (0, 255), "INT8": (-128, 127), "UINT4": (0, 15), "INT4": (-8, 7)}
_LARGEST = 1e30


@dataclass(frozen=True)
class Learnable:
    """An initializer that training changes; `most` bounds a scale from above."""

    name: str
    role: str
    most: float = math.inf
    bounds: tuple[int, int] = (0, 0)


def learnables(program: Program, roles: Sequence[str]) -> list[Learnable]:
    """The initializers of the given roles, in the order of the graph's nodes."""
    found: dict[str, Learnable] = {}
    for node in program.graph:
        for index, value in enumerate(node.inputs):
            array = constant(value)
            if value is None or array is None or value.is_graph_output():
                continue
            item = _learnable(node, index, value, array)
            name = str(value.name)
            if item is None or item.role not in roles:
                continue
            if name in found and found[name].most < item.most:
                continue
            found[name] = item
    return list(found.values())


def _learnable(node: ir.Node, index: int, value: ir.Value, array: np.ndarray) -> Learnable | None:
    name = str(value.name)
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        if index == 0:
            return _through_quantizer(node, name, array)
        source = node.inputs[0]
        if source is None or (constant(source) is not None and node.op_type == "DequantizeLinear"):
            return None
        if index == 1 and array.dtype == np.float32:
            return Learnable(name, "scales", _most(node, array))
        kind = value.dtype.name if value.dtype is not None else ""
        if index == 2 and array.ndim == 0 and kind in _ENDS and int(array) not in _ENDS[kind]:
            symmetric = laid_out(source) is not None
            return None if symmetric else Learnable(name, "zero_points", bounds=_ENDS[kind])
        return None
    role = _role(node, index, array)
    return Learnable(name, role) if role is not None and _trainable(array) else None


def _through_quantizer(node: ir.Node, name: str, array: np.ndarray) -> Learnable | None:
    """A float weight or bias whose dequantised form a node reads."""
    if node.op_type != "QuantizeLinear" or not _trainable(array):
        return None
    for dequantize in node.outputs[0].consumers():
        for use in dequantize.outputs[0].uses():
            role = _role(use.node, use.idx, array)
            if role is not None:
                return Learnable(name, role)
    return None


def _role(node: ir.Node, index: int, array: np.ndarray) -> str | None:
    if node.domain != "":
        return None
    if node.op_type in _CONTRACTIONS:
        return "weights" if index < 2 else "biases"
    if node.op_type in _NORMALIZATIONS:
        return "weights" if index == 1 else "biases"
    if array.size > 1 and node.op_type in ("Add", "Sub"):
        return "biases"
    if array.size > 1 and node.op_type in ("Mul", "PRelu"):
        return "weights"
    return None


def _trainable(array: np.ndarray) -> bool:
    return array.dtype == np.float32 and bool((np.abs(array) < _LARGEST).all())


def _most(node: ir.Node, scale: np.ndarray) -> float:
    """The largest scale with which a quantiser after a Clip implies the clip's upper bound."""
    source = node.inputs[0]
    clip = source.producer() if source is not None else None
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if clip is None or clip.op_type != "Clip" or len(clip.inputs) < 3 or scale.ndim:
        return math.inf
    bound, zero_point = constant(clip.inputs[2]), constant(zero)
    if bound is None or zero is None or zero_point is None or zero.dtype is None:
        return math.inf
    above = _ENDS.get(zero.dtype.name, (0, 255))[1] - int(zero_point)
    return float(bound) / above * (1 - 1e-6) if above > 0 and float(bound) > 0 else math.inf
