"""Rotary position embedding in plain torch, float32 (float64 for float64) inside."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.dispatch import Implementation
from fastattn.numerics import accumulation_dtype
from fastattn.ops.rotary.positions import positions


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
