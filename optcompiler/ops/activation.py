"""Activation functions, element by element."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from optcompiler.ops.costs import DIVISION, TRANSCENDENTAL, pointwise_cost
from optcompiler.ops.declare import op
from optcompiler.ops.spec import OpSpec

Tensor = torch.Tensor


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """`x` where positive, else `slope * x`; the slope broadcasts to `x`."""
    return torch.where(x < 0, x * slope, x)


def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


def selu(
    x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875
) -> Tensor:
    return gamma * F.elu(x, alpha)


def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


def hard_swish(x: Tensor) -> Tensor:
    return x * torch.clamp(x / 6 + 0.5, 0, 1)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def mish(x: Tensor) -> Tensor:
    return F.mish(x)


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def softsign(x: Tensor) -> Tensor:
    return F.softsign(x)


def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, torch.zeros_like(x))


def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero)).to(x.dtype)


def _activation(op_type: str, meaning: Any, weight: int, since: int = 6) -> OpSpec:
    return op(op_type, meaning, pointwise_cost(weight), pointwise=True, since=since)


SPECS: tuple[OpSpec, ...] = (
    _activation("Relu", torch.relu, 1),
    _activation("LeakyRelu", leaky_relu, 2),
    _activation("PRelu", prelu, 2, 9),
    _activation("ThresholdedRelu", thresholded_relu, 1, 10),
    _activation("Elu", elu, TRANSCENDENTAL),
    _activation("Selu", selu, TRANSCENDENTAL),
    _activation("Celu", celu, TRANSCENDENTAL, 12),
    _activation("Sigmoid", torch.sigmoid, TRANSCENDENTAL + DIVISION),
    _activation("HardSigmoid", hard_sigmoid, 4),
    _activation("HardSwish", hard_swish, 5, 14),
    _activation("Swish", swish, TRANSCENDENTAL + DIVISION, 24),
    _activation("Tanh", torch.tanh, TRANSCENDENTAL),
    _activation("Softplus", softplus, 2 * TRANSCENDENTAL, 1),
    _activation("Softsign", softsign, DIVISION, 1),
    _activation("Mish", mish, 3 * TRANSCENDENTAL, 18),
    _activation("Gelu", gelu, TRANSCENDENTAL, 20),
    _activation("Shrink", shrink, 3, 9),
)
