"""The position of every row, for whoever may wait for the tensors that say it: the reference and kernels on the CPU."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def positions(x: Tensor, table: int, offsets: Tensor | None, cu_seqlens: Tensor | None, offset: int) -> Tensor:
    """The position of every row, (B, S) or (total,); RuntimeError for those that cos and sin do not have."""
    if cu_seqlens is None:
        lengths = [x.shape[1]] * x.shape[0]
    else:
        ends = [int(n) for n in cu_seqlens.tolist()]
        if ends[0] != 0:
            raise RuntimeError(f"rotary: cu_seqlens[0] = {ends[0]} must be 0")
        for b, (begin, end) in enumerate(itertools.pairwise(ends), 1):
            if not begin <= end <= x.shape[0]:
                raise RuntimeError(
                    f"rotary: cu_seqlens[{b}] = {end} is not in [{begin}, {x.shape[0]}], from the one before to the"
                    " rows of x"
                )
        if ends[-1] != x.shape[0]:
            raise RuntimeError(f"rotary: cu_seqlens[{len(ends) - 1}] = {ends[-1]} must be {x.shape[0]}, the rows of x")
        lengths = [end - begin for begin, end in itertools.pairwise(ends)]
    starts = [offset] * len(lengths) if offsets is None else [int(n) for n in offsets.tolist()]
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if length > 0 and not 0 <= start <= table - length:
            raise RuntimeError(
                f"rotary: sequence {b} of {length} rows at offset {start} is not within the {table} positions of cos"
                " and sin"
            )
    rows = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    at = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
    return at.to(x.device) if cu_seqlens is not None else at.to(x.device).view(x.shape[:2])
