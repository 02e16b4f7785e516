"""Decoding in plain torch: the specification of the op, sequence by sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.dispatch import Implementation
from fastattn.numerics import accumulation_dtype
from fastattn.ops.decode.places import places


def append(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens: Tensor | None,
    leftpad: Tensor | None,
    batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """Writes key and value behind the ends of the sequences."""
    batch, new = key.shape[:2]
    for b, place in enumerate(places(key_cache, batch, seqlens, leftpad, batch_idx, block_table, new, True)):
        where = place.slots(key_cache, place.end - new, place.end)
        key_cache[where] = key[b]
        value_cache[where] = value[b]


def visible(queries: int, keys: int, left: int, right: int, device: torch.device) -> Tensor:
    """bool (Sq, Sk): key j is at most `left` before and `right` behind i + Sk - Sq; -1 is no limit."""
    distance = _distance(queries, keys, device)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen


def _distance(queries: int, keys: int, device: torch.device) -> Tensor:
    """(Sq, Sk): how far key j is behind the position of query i."""
    i = torch.arange(queries, device=device)[:, None] + keys - queries
    return torch.arange(keys, device=device)[None, :] - i


def forward(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor | None,
    cache_leftpad: Tensor | None,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    appended: int,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """(output, lse), float64 inside: torch's float32 products with a single row add up one by one."""
    batch, queries, heads, _ = query.shape
    kv_heads, dtype = key_cache.shape[2], torch.float64
    output = query.new_zeros((batch, queries, heads, value_cache.shape[3]))
    lse = query.new_full((batch, heads, queries), -torch.inf, dtype=accumulation_dtype(query.dtype))
    where = places(key_cache, batch, cache_seqlens, cache_leftpad, cache_batch_idx, block_table, appended, False)
    for b, place in enumerate(where):
        slots = place.slots(key_cache, place.begin, place.end)
        # (Hkv, 1, keys, D): one head of the cache for a group of query heads
        key, value = (cache[slots].to(dtype).transpose(0, 1).unsqueeze(1) for cache in (key_cache, value_cache))
        q = query[b].to(dtype).transpose(0, 1).unflatten(0, (kv_heads, -1))
        scores = (q @ key.transpose(-1, -2)) * scale
        if softcap > 0.0:
            scores = softcap * torch.tanh(scores / softcap)
        keys = place.end - place.begin
        if alibi_slopes is not None:
            slopes = (alibi_slopes if alibi_slopes.ndim == 1 else alibi_slopes[b]).to(dtype)
            distance = _distance(queries, keys, query.device).abs()
            scores = scores - slopes.view(kv_heads, -1, 1, 1) * distance
        seen = visible(queries, keys, window_left, window_right, query.device)
        dead = ~seen.any(-1, keepdim=True)
        scores = scores.masked_fill(~seen, -torch.inf).masked_fill(dead, 0.0)
        weights = torch.softmax(scores, -1).masked_fill(dead, 0.0)
        output[b] = (weights @ value).flatten(0, 1).transpose(0, 1).to(query.dtype)
        if keys > 0:
            lse[b] = torch.logsumexp(scores, -1).masked_fill(dead.squeeze(-1), -torch.inf).flatten(0, 1)
    return output, lse


IMPLEMENTATION = Implementation(lambda problem: None, forward, None)
