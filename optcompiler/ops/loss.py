"""Losses that ONNX has operators for."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from optcompiler.ops.costs import TRANSCENDENTAL, reading_cost
from optcompiler.ops.declare import op, output_count
from optcompiler.ops.spec import OpSpec

Tensor = torch.Tensor
_IGNORE_NOTHING = -(2**31)


def negative_log_likelihood(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Loss of log-probabilities [N, C, ...] against class indices [N, ...]."""
    ignored = _IGNORE_NOTHING if ignore_index is None else ignore_index
    return F.nll_loss(x, target.to(torch.int64), weight, ignore_index=ignored, reduction=reduction)


def softmax_cross_entropy(
    scores: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
    outputs: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of scores [N, C, ...]; also their log-softmax when it is asked for."""
    logs = torch.log_softmax(scores, dim=1)
    loss = negative_log_likelihood(
        logs, labels, weights, ignore_index=ignore_index, reduction=reduction
    )
    return (loss, logs) if outputs > 1 else loss


SPECS: tuple[OpSpec, ...] = (
    op("NegativeLogLikelihoodLoss", negative_log_likelihood, reading_cost(2), since=12),
    op(
        "SoftmaxCrossEntropyLoss",
        softmax_cross_entropy,
        reading_cost(TRANSCENDENTAL + 2),
        since=12,
        facts=output_count,
    ),
)
