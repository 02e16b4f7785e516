"""softmax and log_softmax in plain torch, float32 (float64 for float64) inside."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.dispatch import Implementation
from fastattn.numerics import accumulation_dtype


def _beyond(shape: torch.Size, causal: int, device: torch.device) -> Tensor:
    """(rows, columns) bool: what a causal row does not see; causal is 1 for top_left, 2 for bottom_right."""
    rows, columns = shape[-2:]
    diagonal = 1 if causal == 1 else columns - rows + 1
    return torch.ones(rows, columns, dtype=torch.bool, device=device).triu(diagonal)


def forward(
    input: Tensor,
    dim: int,
    log: bool,
    dtype: torch.dtype,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: int = 0,
) -> Tensor:
    x = input.to(accumulation_dtype(input.dtype))
    if x.numel() == 0:
        return input.new_empty(input.shape, dtype=dtype)
    if scale != 1.0:
        x = x * scale
    if mask is not None:
        x = x.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else x + mask
    if causal:
        x = x.masked_fill(_beyond(x.shape, causal, x.device), -torch.inf)
    top = x.amax(dim, keepdim=True)
    dead = top == -torch.inf if mask is not None or causal else None
    if dead is not None:
        top = top.masked_fill(dead, 0.0)
    shifted = x - top
    exponentials = shifted.exp()
    total = exponentials.sum(dim, keepdim=True)
    if dead is not None:
        total = total.masked_fill(dead, 1.0)  # a row that sees nothing: 0 / 1, or -inf - log(1)
    output = shifted - total.log() if log else exponentials / total
    if causal:
        output = output.masked_fill(_beyond(x.shape, causal, x.device), -torch.inf if log else 0.0)
    return output.to(dtype).contiguous()


def backward(
    grad_output: Tensor,
    output: Tensor,
    dim: int,
    log: bool,
    dtype: torch.dtype,
    scale: float = 1.0,
    masked: bool = False,
    causal: int = 0,
) -> Tensor:
    """softmax: scale * y * (g - sum(g * y)). log_softmax: scale * (g - exp(y) * sum(g)), 0 where a mask hides."""
    acc = accumulation_dtype(output.dtype)
    g, y = grad_output.to(acc), output.to(acc)
    if log:
        grad = g - y.exp() * g.sum(dim, keepdim=True)
        if masked or causal:
            grad = grad.masked_fill(output == -torch.inf, 0.0)
    else:
        grad = y * (g - (g * y).sum(dim, keepdim=True))
    if scale != 1.0:
        grad = grad * scale
    return grad.to(dtype).contiguous()


IMPLEMENTATION = Implementation(lambda problem: None, forward, backward, differentiable=True)
