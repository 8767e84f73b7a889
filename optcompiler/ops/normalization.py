"""Normalisations, dropout at inference, and what BatchNormalization computes when trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F

from optcompiler.errors import UnsupportedOperatorError
from optcompiler.ops.costs import DIVISION, reading_cost
from optcompiler.ops.declare import op, output_count
from optcompiler.ops.spec import OpSpec, TypeLookup
from optcompiler.ops.types import carrier_type, first

Tensor = torch.Tensor


def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    spatial: int = 1,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Normalise axis 1 with the given statistics, or with the batch's when `training_mode` is 1."""
    if not training_mode:
        if mean.requires_grad or variance.requires_grad:
            shape = [-1 if a == 1 else 1 for a in range(x.dim())]
            gain = (scale * torch.rsqrt(variance + epsilon)).to(x.dtype)
            shift = (bias - mean * gain).to(x.dtype)
            return x * gain.reshape(shape) + shift.reshape(shape)
        return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)
    axes = [a for a in range(x.dim()) if a != 1]
    var, mu = torch.var_mean(x, dim=axes, correction=0)
    y = F.batch_norm(x, mu.detach(), var.detach(), scale, bias, False, 0.0, epsilon)
    return y, mean * momentum + mu * (1 - momentum), variance * momentum + var * (1 - momentum)


def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """Normalise over the axes from `axis` on; also mean and inverse deviation when asked for."""
    shape = x.shape[axis % x.dim() :]
    stash = carrier_type(stash_type)
    whole = scale.shape == shape and (bias is None or bias.shape == shape)
    if outputs == 1 and whole and (stash == x.dtype or x.dtype.itemsize == 2):
        return F.layer_norm(x, list(shape), scale, bias, epsilon)
    axes = list(range(axis % x.dim(), x.dim()))
    wide = x.to(stash)
    variance, mean = torch.var_mean(wide, dim=axes, correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + epsilon)
    y = ((wide - mean) * inverse).to(x.dtype) * scale
    y = y if bias is None else y + bias
    return (y, mean, inverse)[:outputs] if outputs > 1 else y


def rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Divide by the root of the mean square over the axes from `axis` on, then scale."""
    axes = list(range(axis % x.dim(), x.dim()))
    wide = x.to(carrier_type(stash_type))
    square = torch.mean(wide * wide, dim=axes, keepdim=True)
    return (wide * torch.rsqrt(square + epsilon)).to(x.dtype) * scale


def instance_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5
) -> Tensor:
    axes = list(range(2, x.dim()))
    variance, mean = torch.var_mean(x, dim=axes, correction=0, keepdim=True)
    shape = [-1] + [1] * len(axes)
    normal = (x - mean) * torch.rsqrt(variance + epsilon)
    return normal * scale.reshape(shape) + bias.reshape(shape)


def group_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    """Normalise groups of channels; scale and bias for each channel, or each group (opset 18)."""
    wide = F.group_norm(x.to(carrier_type(stash_type)), num_groups, eps=epsilon).to(x.dtype)
    repeat = x.shape[1] // scale.numel()
    shape = [-1] + [1] * (x.dim() - 2)
    if repeat > 1:
        scale, bias = scale.repeat_interleave(repeat), bias.repeat_interleave(repeat)
    return wide * scale.reshape(shape) + bias.reshape(shape)


def lrn(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    """Local response normalisation over `size` channels."""
    squares = (x * x).unsqueeze(1).flatten(3) if x.dim() > 2 else (x * x).unsqueeze(1).unsqueeze(-1)
    before = (size - 1) // 2
    padded = F.pad(squares, (0, 0, before, size - 1 - before))
    window = F.avg_pool2d(padded, (size, 1), stride=1).squeeze(1).reshape(x.shape)
    return x / torch.pow(bias + alpha * window, beta)


def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """Divide by the 1- or 2-norm along `axis`; a zero vector stays zero."""
    size = torch.abs(x)
    norm = torch.sum(size if p == 1 else size * size, dim=axis, keepdim=True)
    norm = norm if p == 1 else torch.sqrt(norm)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def mean_variance_normalization(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    variance, mean = torch.var_mean(x, dim=list(axes), correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(variance) + 1e-9)


def dropout(
    x: Tensor,
    ratio: Any = 0.5,
    training_mode: Any = False,
    *,
    seed: int | None = None,
    outputs: int = 1,
    node: str = "",
) -> Tensor | tuple[Tensor, Tensor]:
    """The identity, with a mask of ones when it is asked for.

    Raises `UnsupportedOperatorError` in training mode, which drops at random.
    """
    if bool(first(training_mode)) and float(first(ratio)) > 0:
        raise UnsupportedOperatorError(
            f"operator Dropout of node {node!r} in training mode with ratio {first(ratio)} has no "
            f"fixed result; export the model for inference."
        )
    return (x, torch.ones_like(x, dtype=torch.bool)) if outputs > 1 else x


def _dropout_facts(node: ir.Node, type_of: TypeLookup) -> dict[str, Any]:
    return {"outputs": len(node.outputs), "node": node.name}


SPECS: tuple[OpSpec, ...] = (
    op("BatchNormalization", batch_normalization, reading_cost(2), since=9),
    op("LayerNormalization", layer_normalization, reading_cost(8), since=17, facts=output_count),
    op("RMSNormalization", rms_normalization, reading_cost(5), since=23),
    op("InstanceNormalization", instance_normalization, reading_cost(8), since=6),
    op("GroupNormalization", group_normalization, reading_cost(8), since=18),
    op("LRN", lrn, reading_cost(4 * DIVISION)),
    op("LpNormalization", lp_normalization, reading_cost(3 + DIVISION)),
    op("MeanVarianceNormalization", mean_variance_normalization, reading_cost(8), since=9),
    op("Dropout", dropout, reading_cost(0), since=7, static=(1, 2), facts=_dropout_facts),
)
