"""Weights of 4 bits in blocks along the axis that is summed over: their scales and their pairs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optcompiler.quantization import weight_scales
from optcompiler_passes._qdq import Editor, laid_out, table_of

BLOCKED_SINCE = 21
"""Operator set from which on DequantizeLinear takes 4 bits and blocks."""

LEAST_WEIGHTS = 1 << 16
"""Elements from which on a matrix is worth fewer bits: smaller ones stay in caches."""

_HALF = np.finfo(np.float16)


def is_large_matrix(weight: ir.Value | None, least: int = LEAST_WEIGHTS) -> bool:
    """Whether a weight is constant, has two axes and so many elements."""
    array = laid_out(weight)
    return array is not None and array.ndim == 2 and array.size >= least


def insert_blocks(
    editor: Editor, node: ir.Node, weight: ir.Value, axis: int, block_size: int
) -> None:
    """Let `node` read `weight`, a constant matrix, in blocks along `axis` as its second operand."""
    array = laid_out(weight)
    assert array is not None
    scales = _scales(weight, array, axis, block_size)
    parameters = editor.parameters(str(weight.name), scales, np.zeros_like(scales), "INT4")
    pair = editor.insert_pair(weight, *parameters, axis=axis, block_size=block_size)
    node.replace_input_with(1, pair.value)


def _scales(value: ir.Value, array: np.ndarray, axis: int, block_size: int) -> np.ndarray:
    """Scales of a weight, kept on its tensor: rewrites run many times in a search."""
    tensor = table_of(value).const_value
    assert tensor is not None
    key = f"optcompiler.blocks.{value.name}.{axis}.{block_size}"
    known = tensor.meta.get(key)
    if known is None:
        known = tensor.meta[key] = block_scales(array, axis, block_size)
    return known


def block_scales(array: np.ndarray, axis: int, block_size: int) -> np.ndarray:
    """Symmetric 4-bit scales of a matrix, one for each `block_size` elements along `axis`.

    The shape is that of `array` with ceil(size / block_size) along `axis`.
    """
    rows = np.moveaxis(np.asarray(array, np.float32), axis, 1)
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % block_size)))
    blocks = padded.reshape(-1, block_size)
    scales = weight_scales(blocks, "INT4", 0)

    def error(candidate: np.ndarray) -> np.ndarray:
        return np.square(blocks - _levels(blocks, candidate) * candidate[:, None]).sum(axis=1)

    levels = _levels(blocks, scales)
    energy = np.square(levels).sum(axis=1)
    fitted = np.where(energy > 0, (blocks * levels).sum(axis=1) / np.maximum(energy, 1), scales)
    fitted = np.where(fitted > 0, fitted, scales).astype(np.float32)
    scales = np.where(error(fitted) < error(scales), fitted, scales)
    fits = (scales >= _HALF.tiny) & (scales <= _HALF.max)
    rounded = np.where(fits, scales, 1).astype(np.float16).astype(np.float32)
    scales = np.where(fits, rounded, scales)
    return np.ascontiguousarray(np.moveaxis(scales.reshape(len(rows), -1), 1, axis))


def _levels(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(blocks / scales[:, None]), -8, 7)
