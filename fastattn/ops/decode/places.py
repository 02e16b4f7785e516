"""Where the keys of every sequence are: reading the tensors that say so, and refusing what they must not say.

This waits for the tensors: it is for the reference, and for kernels on the CPU (the native ones look for themselves, in
the same words).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def check_length(b: int, length: int, appended: int, capacity: int) -> None:
    """RuntimeError unless sequence b of `length` keys has room for `appended` more in its `capacity` slots."""
    if not 0 <= length <= capacity:
        raise RuntimeError(f"decode: cache_seqlens[{b}] = {length} is not in [0, {capacity}], the slots of a sequence")
    if appended > capacity - length:
        raise RuntimeError(
            f"decode: cache_seqlens[{b}] = {length} and {appended} new keys do not fit into the {capacity} slots of a"
            " sequence"
        )


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
        check_length(b, length, appended, capacity)
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
