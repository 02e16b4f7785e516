"""Decoding in plain torch: the specification of the op, sequence by sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.dispatch import Implementation
from fastattn.numerics import accumulation_dtype


@dataclass(frozen=True)
class Place:
    """Slots begin .. end - 1 of a cache row, or of pages."""

    begin: int
    end: int
    row: int
    pages: list[int] | None

    def slots(self, cache: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """(row or page, slot) of the sequence's slots begin .. end - 1."""
        at = torch.arange(begin, end, device=cache.device)
        if self.pages is None:
            return torch.full_like(at, self.row), at
        size = cache.shape[1]
        pages = torch.tensor(self.pages, dtype=torch.int64, device=cache.device)
        return pages[at // size], at % size


def _numbers(tensor: Tensor | None, batch: int, otherwise: int) -> list[int]:
    return [otherwise] * batch if tensor is None else [int(n) for n in tensor.tolist()]


def places(
    key_cache: Tensor,
    batch: int,
    seqlens: Tensor | None,
    leftpad: Tensor | None,
    batch_idx: Tensor | None,
    block_table: Tensor | None,
    appended: int,
    written: bool,
) -> list[Place]:
    """Where every sequence is, with `appended` slots behind its end; RuntimeError for what is not in the cache, and,
    if the new slots are to be written, for places that two sequences would write."""
    rows, slots = key_cache.shape[:2]
    capacity = slots if block_table is None else slots * block_table.shape[1]
    ends, begins = _numbers(seqlens, batch, capacity), _numbers(leftpad, batch, 0)
    table = None if block_table is None else block_table.tolist()
    writer: dict[int, int] = {}
    found = []
    for b in range(batch):
        length, begin = ends[b], begins[b]
        if not 0 <= length <= capacity:
            raise RuntimeError(
                f"decode: cache_seqlens[{b}] = {length} is not in [0, {capacity}], the slots of a sequence"
            )
        if appended > capacity - length:
            raise RuntimeError(
                f"decode: cache_seqlens[{b}] = {length} and {appended} new keys do not fit into the {capacity} slots"
                " of a sequence"
            )
        if not 0 <= begin <= length:
            raise RuntimeError(f"decode: cache_leftpad[{b}] = {begin} is not in [0, {length}], the sequence's length")
        row, pages = b, None
        if batch_idx is not None:
            row = int(batch_idx[b])
            if not 0 <= row < rows:
                raise RuntimeError(f"decode: cache_batch_idx[{b}] = {row} is not in [0, {rows}), the rows of the cache")
            if written and appended > 0:
                if row in writer:
                    raise RuntimeError(f"decode: cache row {row} would be written by sequences {writer[row]} and {b}")
                writer[row] = b
        if table is not None:
            pages = table[b]
            for i in range(begin // slots, -(-(length + appended) // slots) if length + appended > begin else 0):
                if not 0 <= pages[i] < rows:
                    raise RuntimeError(
                        f"decode: block_table[{b}, {i}] = {pages[i]} is not in [0, {rows}), the pages of the cache"
                    )
                if written and appended > 0 and i >= length // slots:
                    if pages[i] in writer:
                        twice = " (twice)" if writer[pages[i]] == b else ""
                        raise RuntimeError(
                            f"decode: page {pages[i]} would be written by sequences {writer[pages[i]]} and {b}{twice}"
                        )
                    writer[pages[i]] = b
        found.append(Place(begin, length + appended, row, pages))
    return found


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
