"""Attention and rotary position embedding (opset 23 and 24) as one operator each."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from optcompiler.ops.costs import attention_cost, pointwise_cost
from optcompiler.ops.declare import op, output_count
from optcompiler.ops.spec import OpSpec
from optcompiler.ops.types import carrier_type

Tensor = torch.Tensor


def _heads(x: Tensor, count: int | None) -> Tensor:
    """[batch, length, heads * size] as [batch, heads, length, size]; 4-D tensors unchanged."""
    if x.dim() == 4 or count is None:
        return x
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to the scores: a boolean one is 0 where true and -inf elsewhere."""
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.full_like(zero, -math.inf))


def _bias(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    past: int,
    filled: Tensor | None,
    causal: int,
    window: tuple[int, int],
) -> Tensor | None:
    """Everything that is added to the scores, [.., queries, keys], or None.

    Query `i` stands at position `i + past`, or at `i + filled[b] - queries` when a cache of which
    `filled[b]` entries are valid is given. A causal one sees no later keys; `window` bounds how
    many keys it sees to the left and to the right of its position, -1 for all.
    """
    rows, columns = query.shape[-2], key.shape[-2]
    bias = None if mask is None else _additive(mask, query.dtype)
    if bias is not None and bias.shape[-1] < columns:
        bias = F.pad(bias, (0, columns - bias.shape[-1]), value=-math.inf)
    j = torch.arange(columns, device=query.device)
    left, right = window[0], 0 if causal else window[1]
    if left >= 0 or right >= 0:
        i = torch.arange(rows, device=query.device).unsqueeze(1)
        offset: Any = past
        if filled is not None and not past:
            offset = filled.reshape(-1, 1, 1, 1) - rows
        ahead = j - (i + offset)
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if right >= 0:
            seen = seen & (ahead <= right)
        if left >= 0:
            seen = seen & (-ahead <= left)
        allowed = _additive(seen, query.dtype)
        bias = allowed if bias is None else bias + allowed
    if filled is not None:
        valid = _additive(j < filled.reshape(-1, 1, 1, 1), query.dtype)
        bias = valid if bias is None else bias + valid
    return bias


def _guarded_softmax(scores: Tensor, bias: Tensor | None, precision: int | None) -> Tensor:
    """Softmax over keys in which a row whose bias lets it see no key is zero."""
    wide = scores if precision is None else scores.to(carrier_type(precision))
    weights = torch.softmax(wide, dim=-1)
    if bias is not None:
        empty = torch.isneginf(bias).all(dim=-1, keepdim=True)
        weights = torch.where(empty, torch.zeros_like(weights), weights)
    return weights.to(scores.dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """Scaled dot-product attention with grouped heads, cache, mask and soft cap.

    Inputs are [batch, length, heads * size] or [batch, heads, length, size]; the result has the
    query's layout. Further outputs: present key, present value, and the scores at the stage that
    `qk_matmul_output_mode` names (0 raw, 1 capped, 2 biased, 3 after softmax).
    """
    flat = query.dim() == 3
    q, k, v = _heads(query, q_num_heads), _heads(key, kv_num_heads), _heads(value, kv_num_heads)
    past = 0 if past_key is None else past_key.shape[2]
    k = k if past_key is None else torch.cat([past_key, k], dim=2)
    v = v if past_value is None else torch.cat([past_value, v], dim=2)
    present = (k, v)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if q.shape[1] != k.shape[1]:
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    root = math.sqrt(factor)
    scores = torch.matmul(q * root, (k * root).transpose(-1, -2))
    stages = [scores]
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    stages.append(scores)
    window = (left_window_size, right_window_size)
    bias = _bias(q, k, mask, past, nonpad_kv_seqlen, is_causal, window)
    scores = scores if bias is None else scores + bias
    stages.append(scores)
    weights = _guarded_softmax(scores, bias, softmax_precision)
    stages.append(weights)
    y = torch.matmul(weights, v)
    if flat:
        y = y.transpose(1, 2).reshape(query.shape[0], query.shape[1], -1)
    if outputs == 1:
        return y
    return (y, *present, stages[qk_matmul_output_mode])[:outputs]


def rotary_embedding(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Rotate pairs of the first `rotary_embedding_dim` elements of each head by their position.

    Su et al., "RoFormer" (2021), section 3.2.2. `x` is [batch, heads, length, size] or
    [batch, length, heads * size]; the caches are [positions, dim / 2], or [batch, length, dim / 2]
    without `position_ids`.
    """
    flat = x.dim() == 3
    y = x.reshape(x.shape[0], x.shape[1], num_heads or 1, -1) if flat else x.transpose(1, 2)
    width = rotary_embedding_dim or y.shape[-1]
    turned, rest = y[..., :width], y[..., width:]
    cos, sin = cos_cache, sin_cache
    if position_ids is not None:
        cos, sin = cos_cache[position_ids], sin_cache[position_ids]
    cos = cos[..., : width // 2].unsqueeze(2)
    sin = sin[..., : width // 2].unsqueeze(2)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([cos * a - sin * b, sin * a + cos * b], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat([cos * a - sin * b, sin * a + cos * b], dim=-1)
    y = torch.cat([turned, rest], dim=-1)
    return y.reshape(x.shape) if flat else y.transpose(1, 2)


SPECS: tuple[OpSpec, ...] = (
    op("Attention", attention, attention_cost, since=23, facts=output_count),
    op("RotaryEmbedding", rotary_embedding, pointwise_cost(4), since=23),
)
