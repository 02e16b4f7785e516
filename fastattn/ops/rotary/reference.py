"""Rotary position embedding in plain torch, float32 (float64 for float64) inside."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastattn.dispatch import Implementation
from fastattn.numerics import accumulation_dtype


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


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates pairs of columns by the angles of cos and sin (..., rotary_dim / 2); the other columns stay."""
    width = 2 * cos.shape[-1]
    turned = x[..., :width]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turned[..., : width // 2], turned[..., width // 2 :]
        pairs = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return torch.cat((pairs, x[..., width:]), -1)


def _rotate(
    x: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor | None, cu_seqlens: Tensor | None, offset: int,
    interleaved: bool, sign: int,
) -> Tensor:  # fmt: skip
    at = positions(x, cos.shape[0], offsets, cu_seqlens, offset)
    dtype = accumulation_dtype(x.dtype)
    angles = [table.to(dtype)[at].unsqueeze(-2) for table in (cos, sin)]
    return turn(x.to(dtype), angles[0], angles[1] * sign, interleaved).to(x.dtype).contiguous()


def forward(
    x: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor | None, cu_seqlens: Tensor | None, offset: int,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    return _rotate(x, cos, sin, offsets, cu_seqlens, offset, interleaved, 1)


def backward(
    grad: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor | None, cu_seqlens: Tensor | None, offset: int,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    """The rotation by the negative angle."""
    return _rotate(grad, cos, sin, offsets, cu_seqlens, offset, interleaved, -1)


def in_place(
    x: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor | None, cu_seqlens: Tensor | None, offset: int,
    interleaved: bool,
) -> None:  # fmt: skip
    x.copy_(forward(x, cos, sin, offsets, cu_seqlens, offset, interleaved))


IMPLEMENTATION = Implementation(lambda problem: None, forward, backward, differentiable=True)
