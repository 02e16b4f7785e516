"""Attention in plain torch: the specification of the op, on any device, in any floating dtype.

Shapes as in op.py: query (B, H, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv), mask broadcastable to
(B, H, Sq, Sk). Scores are formed in float32 (float64 for float64 input); the whole matrix is kept.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastattn import philox as philox_mask
from fastattn.dispatch import Implementation
from fastattn.numerics import accumulation_dtype
from fastattn.ops.attention.op import Features, filled, memory_order


def features_of(given: tuple[Any, ...]) -> Features:
    """The end of the schema's arguments, by name."""
    left, right, *rest = filled(given)
    return Features((left, right), *rest)


def visible(
    queries: int,
    keys: int,
    batch: int,
    is_causal: bool,
    bottom_right: bool,
    features: Features,
    device: torch.device,
) -> Tensor | None:
    """bool (B or 1, 1, 1, Sq, Sk), True where position and documents let query i see key j; None: everywhere."""
    left, right = features.window
    right = 0 if is_causal else right
    seen = None
    if left >= 0 or right >= 0:
        shift = keys - queries if bottom_right else 0
        distance = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None] - shift
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
        if left >= 0:
            seen &= distance >= -left
        if right >= 0:
            seen &= distance <= right
        seen = seen[None]
        if features.prefix_len is not None:
            prefix = features.prefix_len.reshape(-1, 1, 1)
            for value in prefix.flatten().tolist():
                if not 0 <= value <= keys:
                    raise RuntimeError(f"attention: prefix_len must be in [0, {keys}], got {value}")
            seen = seen | (torch.arange(keys, device=device) < prefix)
    if features.query_ids is not None and features.key_ids is not None:
        same = features.query_ids[:, :, None] == features.key_ids[:, None, :]
        seen = same if seen is None else seen & same
    return None if seen is None else seen[:, None, None]


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return scores if softcap == 0.0 else softcap * torch.tanh(scores / softcap)


def _scores(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    features: Features,
) -> tuple[Tensor, Tensor]:
    """Scaled scores (B, Hkv, G, Sq, Sk), and what softmax is taken of: capped, biased, -inf where not visible."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    dtype = accumulation_dtype(query.dtype)
    grouped = query.to(dtype).reshape(batch, kv_heads, heads // max(kv_heads, 1), queries, query.shape[3])
    plain = (grouped @ key.to(dtype).transpose(-1, -2).unsqueeze(2)) * scale
    scores = _capped(plain, features.softcap)
    if features.alibi_slopes is not None:
        shift = keys - queries if bottom_right else 0
        i, j = torch.arange(queries, device=query.device), torch.arange(keys, device=query.device)
        distance = (i[:, None] + shift - j).abs().to(dtype)
        slopes = features.alibi_slopes.to(dtype).expand(batch, heads)
        scores = scores - slopes.reshape(*scores.shape[:3], 1, 1) * distance
    if mask is not None:
        grouped_mask = mask.expand(batch, heads, queries, keys).reshape(scores.shape)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~grouped_mask, -torch.inf)
        else:
            scores = scores + grouped_mask.to(dtype)
    seen = visible(queries, keys, batch, is_causal, bottom_right, features, query.device)
    return plain, scores if seen is None else scores.masked_fill(~seen, -torch.inf)


def _dropout(philox: Tensor | None, dropout_p: float, scores: Tensor, first_batch: int) -> Tensor | None:
    """What the probabilities are multiplied by: 0 or 1 / (1 - p), shaped and typed like the scores.

    first_batch: the number of the first batch element, for the counter.
    """
    if philox is None:
        return None
    batch, kv_heads, groups, queries, keys = scores.shape
    sizes = (first_batch + batch, kv_heads * groups, queries, keys)
    keep = philox_mask.keep_mask(philox.to(scores.device), dropout_p, *sizes)[first_batch:]
    kept = 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)
    return keep.view(scores.shape).to(scores.dtype) * kept


def _probabilities(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax of the scores, 0 in dead rows, and the sink's share (..., 1); without sinks that is 0.

    Not exp(scores - lse): where a mask holds the smallest number of its dtype, lse has no bits left for the scores.
    """
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    if sinks is None:
        weights = torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
        return weights, torch.zeros_like(dead, dtype=scores.dtype)
    column = _sink_column(sinks, scores)
    together = torch.cat((scores, column), -1)
    dead = dead & (column == -torch.inf)
    together = torch.softmax(together.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    return together[..., :-1], together[..., -1:]


def _sink_column(sinks: Tensor, scores: Tensor) -> Tensor:
    """(B, Hkv, G, Sq, 1): the score of the sink for every query."""
    return sinks.to(scores.dtype).reshape(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:4], 1)


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """(output, lse): softmax(scale * Q K^T + mask) V and the natural log of its denominator."""
    return forward_at(0, *args)


def forward_at(
    first_batch: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    philox: Tensor | None,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    dropout_p: float,
    *given: Any,
) -> tuple[Tensor, Tensor]:
    """`forward` of batch elements first_batch, first_batch + 1, ... of a larger problem: their dropout is theirs."""
    features = features_of(given)
    _, scores = _scores(query, key, mask, scale, is_causal, bottom_right, features)
    weights, _ = _probabilities(scores, features.sinks)
    lse = torch.logsumexp(scores, dim=-1)
    if features.sinks is not None:
        lse = torch.logaddexp(lse, _sink_column(features.sinks, scores).squeeze(-1))
    dropout = _dropout(philox, dropout_p, scores, first_batch)
    if dropout is not None:
        weights = weights * dropout
    output = (weights @ value.to(weights.dtype).unsqueeze(2)).flatten(1, 2)
    return memory_order(output.to(query.dtype), query), lse.flatten(1, 2).contiguous()


def probabilities(
    first_batch: int,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    philox: Tensor | None,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    dropout_p: float,
    *given: Any,
) -> Tensor:
    """(B, H, Sq, Sk) in the query's dtype: softmax of the scores, negative where dropout takes the weight away.

    Arguments as of `forward_at`, without the value.
    """
    features = features_of(given)
    _, scores = _scores(query, key, mask, scale, is_causal, bottom_right, features)
    weights, _ = _probabilities(scores, features.sinks)
    dropout = _dropout(philox, dropout_p, scores, first_batch)
    if dropout is not None:
        weights = torch.where(dropout == 0.0, -weights, weights)
    return weights.flatten(1, 2).to(query.dtype)


def _sum_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Sums the dimensions that broadcasting had added."""
    dims = [d for d, size in enumerate(shape) if size == 1 and tensor.shape[d] != 1]
    return tensor.sum(dims, keepdim=True) if dims else tensor


def _over_queries(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, summed over 64 queries at a time: in one chain every later rounding is of the size of an early term."""
    pairs = zip(a.split(64, -2), b.split(64, -2), strict=True)
    return functools.reduce(torch.add, (x.transpose(-1, -2) @ y for x, y in pairs))


def backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, of the additive mask ((0,) unless mask_grad) and of sinks ((0,) without).

    dP = dropout * dO V^T, dS = P * (dP - rowsum(P * dP) + dlse), the chain rule through softmax. rowsum(P * dP) is
    rowsum(dO * O) (Dao et al. 2022, appendix B), but neither output nor lse has a part in the derivatives of this one.
    """
    return backward_at(0, *args)


def backward_at(
    first_batch: int,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    philox: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    dropout_p: float,
    mask_grad: bool,
    *given: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`backward` of batch elements first_batch, first_batch + 1, ... of a larger problem."""
    features = features_of(given)
    plain, scores = _scores(query, key, mask, scale, is_causal, bottom_right, features)
    batch, kv_heads, groups, queries, _ = scores.shape
    dtype = scores.dtype

    def grouped(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).reshape(batch, kv_heads, groups, queries, tensor.shape[3])

    weights, sink_weights = _probabilities(scores, features.sinks)
    grad, q = grouped(grad_output), grouped(query)
    k, v = key.to(dtype).unsqueeze(2), value.to(dtype).unsqueeze(2)
    grad_weights = grad @ v.transpose(-1, -2)
    dropout = _dropout(philox, dropout_p, scores, first_batch)
    dropped = weights if dropout is None else weights * dropout
    if dropout is not None:
        grad_weights = grad_weights * dropout
    # rowsum(dO * O) of the same weights, not of the output that was rounded and saved.
    delta = (weights * grad_weights).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grouped(grad_lse.unsqueeze(3))
    grad_scores = grad_capped = weights * (grad_weights - delta)
    if features.softcap > 0.0:
        grad_scores = grad_scores * (1.0 - torch.tanh(plain / features.softcap) ** 2)
    grad_query = (grad_scores @ k).flatten(1, 2) * scale
    grad_key = _over_queries(grad_scores, q).sum(2) * scale
    grad_value = _over_queries(dropped, grad).sum(2)
    if mask_grad:
        assert mask is not None
        grad_mask = _sum_to(grad_capped.flatten(1, 2), mask.shape).to(mask.dtype).contiguous()
    else:
        grad_mask = query.new_empty((0,), dtype=torch.float32)
    if features.sinks is not None:
        grad_sinks = (-sink_weights * delta).sum((0, 3, 4)).reshape(-1).to(features.sinks.dtype)
    else:
        grad_sinks = query.new_empty((0,), dtype=torch.float32)
    return (
        memory_order(grad_query.to(query.dtype), query),
        memory_order(grad_key.to(key.dtype), key),
        memory_order(grad_value.to(value.dtype), value),
        grad_mask,
        grad_sinks,
    )


IMPLEMENTATION = Implementation(lambda problem: None, forward, backward, differentiable=True)
