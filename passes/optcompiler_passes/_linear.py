"""Contractions with constant weights, and folding a scale and a shift per channel into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from optcompiler.errors import Declined
from optcompiler.program import Program, constant
from optcompiler_passes._regions import is_constant, is_op, sole_consumer

BLOCK_ELEMENTS = 1 << 20
"""Of a weight that are worked on at once."""

CONTRACTIONS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Linear:
    """A contraction y = w · x + b with constant w and b.

    `last` is the node that makes y: the contraction itself, or the Add of a MatMul's bias. The
    output channels lie along axis `axis` of y; `channels` counts them.
    """

    node: ir.Node
    last: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    axis: int
    channels: int

    @property
    def label(self) -> str:
        return f"{self.node.op_type} {self.node.name!r}"


def linear(last: ir.Node | None) -> Linear | str | None:
    """The contraction that ends in `last`; or why it cannot take a fold; None: there is none."""
    if last is None:
        return None
    if is_op(last, "Add"):
        return _matmul_with_bias(last)
    if not is_op(last, *CONTRACTIONS):
        return None
    weight = last.inputs[1]
    bias = last.inputs[2] if len(last.inputs) > 2 else None
    where = f"{last.op_type} {last.name!r}"
    if weight is None or not is_constant(weight) or weight.shape is None:
        return f"the weights of {where} are not constant"
    if bias is not None and not is_constant(bias):
        return f"the bias of {where} is not constant"
    result = last.outputs[0]
    if result.shape is None:
        return f"the rank of {result.name!r} is unknown"
    shape = [int(d) for d in weight.shape if isinstance(d, int)]
    if is_op(last, "Conv"):
        return Linear(last, last, weight, bias, 1, shape[0])
    if is_op(last, "ConvTranspose"):
        return Linear(last, last, weight, bias, 1, shape[1] * _int(last, "group", 1))
    if is_op(last, "MatMul"):
        if len(shape) != 2:
            return f"the weights of {where} have rank {len(shape)}"
        return Linear(last, last, weight, None, len(result.shape) - 1, shape[1])
    channels = shape[0 if _int(last, "transB", 0) else 1]
    if bias is not None and per_channel(constant(bias), 2, 1, channels) is None:
        return f"the bias of {where} is not one number per channel"
    return Linear(last, last, weight, bias, 1, channels)


def _matmul_with_bias(add: ir.Node) -> Linear | str | None:
    for data, bias in (add.inputs, add.inputs[::-1]):
        producer = data.producer() if data is not None else None
        if data is None or not is_op(producer, "MatMul") or not is_constant(bias):
            continue
        found = linear(producer)
        if not isinstance(found, Linear):
            return found
        if sole_consumer(data) is not add:
            return f"the result {data.name!r} of {found.label} is also read elsewhere"
        if per_channel(constant(bias), found.axis + 1, found.axis, found.channels) is None:
            return None
        return Linear(found.node, add, found.weight, bias, found.axis, found.channels)
    return None


def per_channel(array: np.ndarray | None, rank: int, axis: int, channels: int) -> np.ndarray | None:
    """`array` as float64 [channels] when it broadcasts along `axis` of a tensor of `rank` only."""
    if array is None or array.ndim > rank:
        return None
    if array.size == 1:
        return np.full(channels, float(array.reshape(())))
    shape = (1,) * (rank - array.ndim) + array.shape
    if any(d != (channels if i == axis else 1) for i, d in enumerate(shape)):
        return None
    return array.reshape(channels).astype(np.float64)


def scale_outputs(
    program: Program, target: Linear, scale: np.ndarray, shift: np.ndarray | None
) -> None:
    """Make the contraction compute scale · y + shift, with one number per output channel.

    Computed in float64 and rounded once to the type of the weights. A weight that another node
    reads is copied. Raises `Declined` when the result is not finite.
    """
    node = target.node
    array = constant(target.weight)
    assert array is not None
    if is_op(node, "ConvTranspose"):
        groups = _int(node, "group", 1)
        per_input = np.repeat(scale.reshape(groups, -1), array.shape[0] // groups, axis=0)
        factors = per_input.reshape(*array.shape[:2], *(1,) * (array.ndim - 2))
    elif is_op(node, "Conv") or (is_op(node, "Gemm") and _int(node, "transB", 0)):
        factors = scale.reshape(-1, *(1,) * (array.ndim - 1))
    else:
        factors = scale.reshape(1, -1)
    _put(program, node, 1, target.weight, _scaled(array, factors, node))
    _set_bias(program, target, scale, shift)


def scale_inputs(program: Program, target: Linear, scale: np.ndarray, shift: np.ndarray) -> None:
    """Make a Conv or Gemm read x where it read scale · x + shift, one number per input channel."""
    array = _floats(target.weight)
    node = target.node
    if is_op(node, "Conv"):
        groups = _int(node, "group", 1)
        per_output = np.repeat(scale.reshape(groups, -1), array.shape[0] // groups, axis=0)
        moved = np.repeat(shift.reshape(groups, -1), array.shape[0] // groups, axis=0)
        lift = (array.sum(axis=tuple(range(2, array.ndim))) * moved).sum(axis=1)
        array = array * per_output.reshape(*array.shape[:2], *(1,) * (array.ndim - 2))
    else:
        alpha = _float(node, "alpha", 1.0)
        rows = array.T if _int(node, "transB", 0) else array
        lift = alpha * (shift @ rows)
        array = array * (scale[None, :] if _int(node, "transB", 0) else scale[:, None])
    _store(program, node, 1, target.weight, array)
    _set_bias(program, target, np.ones_like(lift), lift)


def input_factors(target: Linear, scale: np.ndarray) -> np.ndarray:
    """One number per input channel as an array that broadcasts to the weight."""
    node = target.node
    array = constant(target.weight)
    assert array is not None
    spatial = (1,) * (array.ndim - 2)
    if is_op(node, "Conv"):
        groups = _int(node, "group", 1)
        per_output = np.repeat(scale.reshape(groups, -1), array.shape[0] // groups, axis=0)
        return per_output.reshape(*array.shape[:2], *spatial)
    if is_op(node, "Gemm") and _int(node, "transB", 0):
        return scale.reshape(1, -1)
    return scale.reshape(-1, 1, *spatial)


def multiply_inputs(program: Program, target: Linear, scale: np.ndarray) -> None:
    """Make the contraction read scale · x where it read x, one number per input channel.

    A weight that another node reads is copied. Raises `Declined` when the result is not finite.
    """
    array = constant(target.weight)
    assert array is not None
    result = _scaled(array, input_factors(target, scale), target.node)
    _put(program, target.node, 1, target.weight, result)


def _set_bias(
    program: Program, target: Linear, scale: np.ndarray, shift: np.ndarray | None
) -> None:
    old = np.zeros(target.channels)
    if target.bias is not None:
        rank = target.axis + 1
        known = constant(target.bias)
        if is_op(target.node, "Conv", "ConvTranspose"):
            rank, axis = 1, 0
        else:
            axis = target.axis
        per = per_channel(known, rank, axis, target.channels)
        assert per is not None
        old = per * (_float(target.node, "beta", 1.0) if is_op(target.node, "Gemm") else 1.0)
    elif shift is None:
        return
    new = old * scale + (0.0 if shift is None else shift)
    if target.last is not target.node:
        assert target.bias is not None
        index = target.last.inputs.index(target.bias)
        _store(program, target.last, index, target.bias, new)
        return
    if is_op(target.node, "Gemm"):
        target.node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
    if target.bias is not None:
        _store(program, target.node, 2, target.bias, new)
        return
    dtype = target.weight.dtype
    assert dtype is not None
    value = program.add_weight(
        f"{target.node.name}.bias", _rounded(new, dtype.numpy(), target.node)
    )
    target.node.resize_inputs(3)
    target.node.replace_input_with(2, value)


def _scaled(array: np.ndarray, factors: np.ndarray, node: ir.Node) -> np.ndarray:
    """array * factors in the type of `array`, a block at a time, since it may be a mapped file."""
    result = np.empty_like(array, subok=False)
    step = max(1, BLOCK_ELEMENTS * len(array) // max(1, array.size))
    for start in range(0, len(array), step):
        rows = slice(start, start + step)
        mine = factors[rows] if len(factors) > 1 else factors
        result[rows] = _rounded(array[rows].astype(np.float64) * mine, array.dtype, node)
    return result


def _store(program: Program, node: ir.Node, index: int, value: ir.Value, array: np.ndarray) -> None:
    assert value.dtype is not None
    _put(program, node, index, value, _rounded(array, value.dtype.numpy(), node))


def _put(program: Program, node: ir.Node, index: int, value: ir.Value, rounded: np.ndarray) -> None:
    if len(value.uses()) == 1:
        program.set_weight(value, rounded)
    else:
        node.replace_input_with(index, program.add_weight(f"{value.name}.{node.name}", rounded))


def _rounded(array: np.ndarray, dtype: np.dtype[Any], node: ir.Node) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype)
    if not np.isfinite(rounded.astype(np.float64)).all():
        raise Declined(f"weights of {node.name!r} would not be finite after folding.")
    return rounded


def _floats(value: ir.Value) -> np.ndarray:
    array = constant(value)
    assert array is not None
    return array.astype(np.float64)


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _float(node: ir.Node, name: str, default: float) -> float:
    return node.attributes[name].as_float() if name in node.attributes else default
