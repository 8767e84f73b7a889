"""Shapes as values, and tensors made from shapes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from optcompiler.ops.costs import free_cost, movement_cost
from optcompiler.ops.declare import op
from optcompiler.ops.spec import OpSpec, TypeLookup
from optcompiler.ops.types import carrier_type, tensor_from_ir, whole_list

Tensor = torch.Tensor


def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """Sizes of the axes from `start` to `end`, int64, on the device of `x`."""
    return torch.tensor(tuple(x.shape)[start:end], dtype=torch.int64, device=x.device)


def size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64, device=x.device)


def constant_of_shape(sizes: Tensor, *, value: Any = None, dtype: int) -> Tensor:
    """A tensor of one value, given as a Python number."""
    fill = 0.0 if value is None else value
    return torch.full(whole_list(sizes), fill, dtype=carrier_type(dtype), device=sizes.device)


def _fill(node: ir.Node, type_of: TypeLookup) -> dict[str, Any]:
    attribute = node.attributes.get("value")
    if attribute is None or attribute.is_ref():
        return {"dtype": int(ir.DataType.FLOAT)}
    tensor = attribute.as_tensor()
    return {"value": tensor_from_ir(tensor).reshape(-1)[0].item(), "dtype": int(tensor.dtype)}


def arange(start: Tensor, limit: Tensor, delta: Tensor, *, stash_type: int = 1) -> Tensor:
    """Numbers from `start` to below `limit`; torch itself sees to it that halves do not drift."""
    return torch.arange(
        start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device
    )


def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """Ones on the `k`-th diagonal of a matrix shaped like `x`."""
    rows, columns = x.shape
    target = x.dtype if dtype is None else carrier_type(dtype)
    below = torch.arange(rows, device=x.device).unsqueeze(1) + k
    return (below == torch.arange(columns, device=x.device)).to(target)


SPECS: tuple[OpSpec, ...] = (
    op("Shape", shape, free_cost, levels="consumes"),
    op("Size", size, free_cost, levels="consumes"),
    op("ConstantOfShape", constant_of_shape, movement_cost, since=9, facts=_fill),
    op("Range", arange, movement_cost, since=11),
    op("EyeLike", eye_like, movement_cost, since=9),
)
