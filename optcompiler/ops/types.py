"""ONNX element types in torch: what carries them, their integer ranges, and conversion both ways.

torch has no arithmetic for some ONNX types. While a program runs, a value of such a type lives in a
*carrier* that holds every value of it: uint16 in int32, uint32 and uint64 in int64 (uint64 wraps
from 2**63 on), 2- and 4-bit integers in int8 or uint8, float4e2m1 in float32. `from_carrier` makes
the declared type at the program's outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch

from optcompiler.errors import UnsupportedOperatorError

_D = ir.DataType

TORCH_TYPES: dict[ir.DataType, torch.dtype] = {
    _D.FLOAT: torch.float32,
    _D.DOUBLE: torch.float64,
    _D.FLOAT16: torch.float16,
    _D.BFLOAT16: torch.bfloat16,
    _D.BOOL: torch.bool,
    _D.INT8: torch.int8,
    _D.INT16: torch.int16,
    _D.INT32: torch.int32,
    _D.INT64: torch.int64,
    _D.UINT8: torch.uint8,
    _D.UINT16: torch.uint16,
    _D.UINT32: torch.uint32,
    _D.UINT64: torch.uint64,
    _D.INT4: torch.int8,
    _D.UINT4: torch.uint8,
    _D.INT2: torch.int8,
    _D.UINT2: torch.uint8,
    _D.FLOAT4E2M1: torch.float32,
    _D.FLOAT8E4M3FN: torch.float8_e4m3fn,
    _D.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    _D.FLOAT8E5M2: torch.float8_e5m2,
    _D.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    _D.FLOAT8E8M0: torch.float8_e8m0fnu,
    _D.COMPLEX64: torch.complex64,
    _D.COMPLEX128: torch.complex128,
}

_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}

FLOAT8 = frozenset(
    {
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    }
)

INTEGER_RANGES: dict[ir.DataType, tuple[int, int]] = {
    _D.INT2: (-2, 1),
    _D.UINT2: (0, 3),
    _D.INT4: (-8, 7),
    _D.UINT4: (0, 15),
    _D.INT8: (-128, 127),
    _D.UINT8: (0, 255),
    _D.INT16: (-32768, 32767),
    _D.UINT16: (0, 65535),
    _D.INT32: (-(2**31), 2**31 - 1),
    _D.UINT32: (0, 2**32 - 1),
    _D.INT64: (-(2**63), 2**63 - 1),
    _D.UINT64: (0, 2**64 - 1),
}
"""Lowest and highest level of each integer type, inclusive."""

_VIEWS: dict[ir.DataType, Any] = {
    _D.BFLOAT16: np.int16,
    _D.FLOAT8E4M3FN: np.uint8,
    _D.FLOAT8E4M3FNUZ: np.uint8,
    _D.FLOAT8E5M2: np.uint8,
    _D.FLOAT8E5M2FNUZ: np.uint8,
    _D.FLOAT8E8M0: np.uint8,
    _D.UINT64: np.int64,
}
_CASTS: dict[ir.DataType, Any] = {
    _D.UINT16: np.int32,
    _D.UINT32: np.int64,
    _D.INT4: np.int8,
    _D.UINT4: np.uint8,
    _D.INT2: np.int8,
    _D.UINT2: np.uint8,
    _D.FLOAT4E2M1: np.float32,
}


def torch_type(dtype: ir.DataType | int) -> torch.dtype:
    """The torch type a value of ONNX type `dtype` has at a program's boundary.

    Raises `UnsupportedOperatorError` for strings and other types torch cannot hold.
    """
    known = TORCH_TYPES.get(ir.DataType(dtype))
    if known is None:
        raise UnsupportedOperatorError(
            f"torch has no type for {ir.DataType(dtype).name}; keep such values out of the program."
        )
    return known


def carrier_type(dtype: ir.DataType | int) -> torch.dtype:
    """The torch type that values of ONNX type `dtype` have inside a running program."""
    declared = torch_type(dtype)
    return _WIDER.get(declared, declared)


def onnx_type(dtype: torch.dtype) -> ir.DataType:
    """The ONNX type that torch calls `dtype` (the first of those that share a carrier)."""
    return next(kind for kind, known in TORCH_TYPES.items() if known == dtype)


def to_carrier(value: Any) -> Any:
    """A program input (or a list) of a type that torch cannot compute with, in its carrier."""
    if value is None or isinstance(value, list):
        return value and [to_carrier(item) for item in cast("list[Any]", value)]
    if value.dtype == torch.uint64:
        return value.view(torch.int64)
    return value.to(_WIDER.get(value.dtype, value.dtype))


def from_carrier(value: Any, dtype: torch.dtype) -> Any:
    """A value of the program, or the quantised levels that stand for it, in its declared type."""
    if value is None or isinstance(value, list):
        return value and [from_carrier(item, dtype) for item in cast("list[Any]", value)]
    if value.dtype == dtype:
        return value
    if dtype == torch.uint64 and value.dtype == torch.int64:
        return value.view(torch.uint64)
    return value.to(dtype)


def tensor_from_ir(tensor: ir.TensorProtocol) -> torch.Tensor:
    """A torch tensor in the carrier type that shares the initializer's memory where it can.

    The memory may be read-only (a mapped file): clone before writing to the result.
    """
    dtype = ir.DataType(tensor.dtype)
    declared = torch_type(dtype)
    array = tensor.numpy()
    if dtype in _CASTS:
        array = array.astype(_CASTS[dtype])
    elif dtype in _VIEWS:
        array = np.ascontiguousarray(array).view(_VIEWS[dtype]).reshape(array.shape)
    result = shared(array)
    if dtype in _VIEWS and dtype != _D.UINT64:
        result = result.view(declared)
    return result


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor of the same declared type, ml_dtypes included, sharing its memory."""
    tensor = ir.tensor(array)
    return from_carrier(tensor_from_ir(tensor), torch_type(ir.DataType(tensor.dtype)))


_torch: Any = torch
_from_numpy = cast("Callable[[np.ndarray], torch.Tensor]", _torch.from_numpy)


def shared(array: np.ndarray) -> torch.Tensor:
    """`torch.from_numpy` for arrays that may be read-only or strided backwards."""
    if any(stride < 0 for stride in array.strides) or not array.dtype.isnative:
        array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))
    if array.flags.writeable:
        return _from_numpy(array)
    if array.size == 0:
        return _from_numpy(array.copy())
    # from_numpy warns about read-only memory, by design the common case here.
    return _from_numpy(np.asarray(_Alias(array)))


class _Alias:
    """An array's memory without its read-only flag; keeps the owner alive."""

    def __init__(self, owner: np.ndarray) -> None:
        interface = dict(owner.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.owner = owner
        self.__array_interface__ = interface


def numpy_of(value: torch.Tensor, dtype: ir.DataType) -> np.ndarray:
    """The value as numpy in ONNX type `dtype` (ml_dtypes where numpy has none)."""
    value = value.detach().cpu().contiguous()
    target = dtype.numpy()
    if dtype in _VIEWS:
        bits = (
            value.view(torch.int16 if dtype == _D.BFLOAT16 else torch.uint8)
            if (dtype != _D.UINT64)
            else value
        )
        return bits.numpy().view(target).reshape(tuple(value.shape))
    return value.numpy().astype(target, copy=False)


def numbers(value: Any) -> list[Any]:
    """A structural input, which is a Python number, a sequence or a tensor, as a list."""
    flat: Any = value.reshape(-1) if isinstance(value, torch.Tensor) else None
    found: Any = value if flat is None else flat.tolist()
    return list(cast("list[Any]", found)) if isinstance(found, list | tuple) else [found]


def whole_list(value: Any) -> list[int]:
    """A structural input as a list of ints; a scalar becomes a list of one."""
    return [int(v) for v in numbers(value)]


def first(value: Any) -> Any:
    """The only number of a structural input."""
    return numbers(value)[0]
