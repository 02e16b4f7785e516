"""Attention in plain torch: the specification of the op, on any device, in any floating dtype.

Shapes as in op.py: query (B, H, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv), mask broadcastable to
(B, H, Sq, Sk). Scores are formed in float32 (float64 for float64 input); the whole matrix is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import philox as philox_mask
from fastattn.dispatch import Implementation
from fastattn.numerics import accumulation_dtype
from fastattn.ops.attention.op import memory_order


def _causal(queries: int, keys: int, bottom_right: bool, device: torch.device) -> Tensor:
    """bool (Sq, Sk), True where key j is visible to query i."""
    diagonal = keys - queries if bottom_right else 0
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(diagonal)


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float, is_causal: bool, bottom_right: bool
) -> Tensor:
    """Scaled and masked scores (B, Hkv, G, Sq, Sk): -inf where a key is not visible."""
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    dtype = accumulation_dtype(query.dtype)
    grouped = query.to(dtype).reshape(batch, kv_heads, heads // max(kv_heads, 1), queries, query.shape[3])
    scores = (grouped @ key.to(dtype).transpose(-1, -2).unsqueeze(2)) * scale
    if mask is not None:
        grouped_mask = mask.expand(batch, heads, queries, keys).reshape(scores.shape)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~grouped_mask, -torch.inf)
        else:
            scores = scores + grouped_mask.to(dtype)
    if is_causal:
        scores = scores.masked_fill(~_causal(queries, keys, bottom_right, query.device), -torch.inf)
    return scores


def _dropout(philox: Tensor | None, dropout_p: float, scores: Tensor) -> Tensor | None:
    """What the probabilities are multiplied by: 0 or 1 / (1 - p), shaped and typed like the scores."""
    if philox is None:
        return None
    batch, kv_heads, groups, queries, keys = scores.shape
    keep = philox_mask.keep_mask(philox.to(scores.device), dropout_p, batch, kv_heads * groups, queries, keys)
    kept = 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)
    return keep.view(scores.shape).to(scores.dtype) * kept


def _probabilities(scores: Tensor) -> Tensor:
    """softmax of the scores, 0 in dead rows.

    Not exp(scores - lse): where a mask holds the smallest number of its dtype, lse has no bits left for the scores.
    """
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    philox: Tensor | None,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """(output, lse): softmax(scale * Q K^T + mask) V and the natural log of its denominator."""
    scores = _scores(query, key, mask, scale, is_causal, bottom_right)
    weights = _probabilities(scores)
    lse = torch.logsumexp(scores, dim=-1)
    dropout = _dropout(philox, dropout_p, scores)
    if dropout is not None:
        weights = weights * dropout
    output = (weights @ value.to(weights.dtype).unsqueeze(2)).flatten(1, 2)
    return memory_order(output.to(query.dtype), query), lse.flatten(1, 2).contiguous()


def _sum_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Sums the dimensions that broadcasting had added."""
    dims = [d for d, size in enumerate(shape) if size == 1 and tensor.shape[d] != 1]
    return tensor.sum(dims, keepdim=True) if dims else tensor


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and of the additive mask ((0,) unless mask_grad).

    dS = P * (dropout * dO V^T - rowsum(dO * O) + dlse), the chain rule through softmax (Dao et al. 2022, appendix B).
    """
    scores = _scores(query, key, mask, scale, is_causal, bottom_right)
    batch, kv_heads, groups, queries, _ = scores.shape
    dtype = scores.dtype

    def grouped(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).reshape(batch, kv_heads, groups, queries, tensor.shape[3])

    weights = _probabilities(scores)
    grad, q = grouped(grad_output), grouped(query)
    k, v = key.to(dtype).unsqueeze(2), value.to(dtype).unsqueeze(2)
    grad_weights = grad @ v.transpose(-1, -2)
    delta = (grad * grouped(output)).sum(-1, keepdim=True)
    dropout = _dropout(philox, dropout_p, scores)
    dropped = weights if dropout is None else weights * dropout
    if dropout is not None:
        grad_weights = grad_weights * dropout
    if grad_lse is not None:
        delta = delta - grouped(grad_lse.unsqueeze(3))
    grad_scores = weights * (grad_weights - delta)
    grad_query = (grad_scores @ k).flatten(1, 2) * scale
    grad_key = (grad_scores.transpose(-1, -2) @ q).sum(2) * scale
    grad_value = (dropped.transpose(-1, -2) @ grad).sum(2)
    if mask_grad:
        assert mask is not None
        grad_mask = _sum_to(grad_scores.flatten(1, 2), mask.shape).to(mask.dtype).contiguous()
    else:
        grad_mask = query.new_empty((0,), dtype=torch.float32)
    return (
        memory_order(grad_query.to(query.dtype), query),
        memory_order(grad_key.to(key.dtype), key),
        memory_order(grad_value.to(value.dtype), value),
        grad_mask,
    )


IMPLEMENTATION = Implementation(lambda problem: None, forward, backward, differentiable=True)
