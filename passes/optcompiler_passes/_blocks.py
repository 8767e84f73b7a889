"""Weights in blocks along the axis that is summed over, or in channels: scales and pairs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optcompiler.quantization import QuantizationScheme, weight_scales
from optcompiler_passes._qdq import Editor, laid_out, pair_of, table_of

BLOCKED_SINCE = 21
"""Operator set from which on DequantizeLinear takes 4 bits and blocks."""

LEAST_WEIGHTS = 1 << 16
"""Elements from which on a matrix is worth fewer bits: smaller ones stay in caches."""

_HALF = np.finfo(np.float16)
_GREATEST, _MIDDLE = 15, 8
"""Of the levels of UINT4."""

_AT_ONCE = 1 << 15
"""Blocks whose candidates are in memory together."""


def is_large_matrix(weight: ir.Value | None, least: int = LEAST_WEIGHTS) -> bool:
    """Whether a weight is constant, has two axes and so many elements."""
    array = laid_out(weight)
    return array is not None and array.ndim == 2 and array.size >= least


def insert_blocks(
    editor: Editor, node: ir.Node, weight: ir.Value, scheme: QuantizationScheme
) -> None:
    """Let `node` read `weight`, a constant matrix, in the blocks of `scheme` as second operand."""
    array = laid_out(weight)
    assert array is not None
    scales, zeros = blocks_of(weight, array, scheme)
    parameters = editor.parameters(str(weight.name), scales, zeros, scheme.dtype)
    pair = editor.insert_pair(weight, *parameters, axis=scheme.axis, block_size=scheme.block)
    node.replace_input_with(1, pair.value)


def insert_channels(
    editor: Editor, node: ir.Node, weight: ir.Value, scheme: QuantizationScheme
) -> None:
    """Let `node` read `weight`, a constant, with a scale for each index of an axis as `scheme`
    says; a pair that is there already is shared."""
    array = laid_out(weight)
    assert array is not None
    pair = pair_of(weight, scheme.axis)
    if pair is None or pair.quantize.outputs[0].dtype != ir.DataType[scheme.dtype]:
        scales = weight_scales(array, scheme.dtype, scheme.axis)
        parameters = editor.parameters(
            str(weight.name), scales, np.zeros_like(scales), scheme.dtype
        )
        pair = editor.insert_pair(weight, *parameters, axis=scheme.axis)
    node.replace_input_with(1, pair.value)


def blocks_of(
    value: ir.Value, array: np.ndarray, scheme: QuantizationScheme
) -> tuple[np.ndarray, np.ndarray]:
    """`block_parameters` of a weight, kept on its tensor: rewrites run many times in a search."""
    tensor = table_of(value).const_value
    assert tensor is not None
    key = f"optcompiler.blocks.{value.name}.{scheme.axis}.{scheme}"
    known = tensor.meta.get(key)
    if known is None:
        known = tensor.meta[key] = block_parameters(array, scheme)
    return known


def block_parameters(
    array: np.ndarray, scheme: QuantizationScheme
) -> tuple[np.ndarray, np.ndarray]:
    """Scales (float32) and zero points of a matrix in blocks of INT4, or of UINT4 if asymmetric.

    Both have the shape of `array` with ceil(size / block) along the axis of `scheme`.
    """
    axis = scheme.axis
    assert axis is not None
    scales = block_scales(array, axis, scheme.block)
    if scheme.symmetric:
        return scales, np.zeros_like(scales)
    blocks = _blocks(array, axis, scheme.block)
    flat = np.moveaxis(scales, axis, 1)
    shape, best = flat.shape, flat.reshape(-1).copy()
    zeros = np.full(best.shape, _MIDDLE, np.float32)
    for start in range(0, len(blocks), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        best[some], zeros[some] = _shifted(blocks[some], best[some])

    def laid(flat: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.moveaxis(flat.reshape(shape), 1, axis))

    return laid(best), laid(zeros)


def _shifted(blocks: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points of least error: between the ends of each block times factors in
    [0.6, 1], or else `scales` around the middle. Then the scale is fitted to the levels found."""
    low = np.minimum(blocks.min(axis=1), 0)
    width = np.maximum(blocks.max(axis=1), 0) - low
    below = -low * _GREATEST / np.where(width > 0, width, 1)
    best, zeros = scales, np.full(scales.shape, _MIDDLE, np.float32)
    least = _error(blocks, best, zeros)

    def take(candidate: np.ndarray, zero: np.ndarray) -> None:
        nonlocal best, zeros, least
        candidate = _halves(candidate)
        error = _error(blocks, candidate, zero)
        better = (error < least) & (candidate > 0)
        best, zeros = np.where(better, candidate, best), np.where(better, zero, zeros)
        least = np.where(better, error, least)

    for factor in np.linspace(1.0, 0.6, 21, dtype=np.float32):
        for zero in (np.floor(below), np.ceil(below)):
            take(width * (factor / _GREATEST), zero.astype(np.float32))
    centred = _centred(blocks, best, zeros)
    energy = np.square(centred).sum(axis=1)
    take((blocks * centred).sum(axis=1) / np.maximum(energy, 1), zeros)
    return best, zeros


def _error(blocks: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    safe = np.where(scales > 0, scales, 1)
    return np.square(blocks - _centred(blocks, safe, zeros) * safe[:, None]).sum(axis=1)


def _centred(blocks: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    least = -zeros[:, None]
    return np.clip(np.rint(blocks / scales[:, None]), least, least + _GREATEST)


def _halves(scales: np.ndarray) -> np.ndarray:
    """Scales rounded to half floats, where those can hold them."""
    fits = (scales >= _HALF.tiny) & (scales <= _HALF.max)
    return np.where(fits, np.where(fits, scales, 1).astype(np.float16), scales).astype(np.float32)


def _blocks(array: np.ndarray, axis: int, block_size: int) -> np.ndarray:
    """A row for each block; zeros fill the last ones up."""
    rows = np.moveaxis(np.asarray(array, np.float32), axis, 1)
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % block_size))).reshape(-1, block_size)


def block_scales(array: np.ndarray, axis: int, block_size: int) -> np.ndarray:
    """Symmetric 4-bit scales of a matrix, one for each `block_size` elements along `axis`.

    The shape is that of `array` with ceil(size / block_size) along `axis`.
    """
    blocks = _blocks(array, axis, block_size)
    scales = weight_scales(blocks, "INT4", 0)

    def error(candidate: np.ndarray) -> np.ndarray:
        return np.square(blocks - _levels(blocks, candidate) * candidate[:, None]).sum(axis=1)

    levels = _levels(blocks, scales)
    energy = np.square(levels).sum(axis=1)
    fitted = np.where(energy > 0, (blocks * levels).sum(axis=1) / np.maximum(energy, 1), scales)
    fitted = np.where(fitted > 0, fitted, scales).astype(np.float32)
    scales = np.where(error(fitted) < error(scales), fitted, scales)
    scales = _halves(scales).reshape(array.shape[1 - axis], -1)
    return np.ascontiguousarray(np.moveaxis(scales, 1, axis))


def _levels(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(blocks / scales[:, None]), -8, 7)
