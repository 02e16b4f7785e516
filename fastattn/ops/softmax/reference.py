"""softmax and log_softmax in plain torch, float32 (float64 for float64) inside."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.dispatch import Implementation
from fastattn.numerics import accumulation_dtype


def forward(input: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
    x = input.to(accumulation_dtype(input.dtype))
    if x.numel() == 0:
        return input.new_empty(input.shape, dtype=dtype)
    shifted = x - x.amax(dim, keepdim=True)
    exponentials = shifted.exp()
    total = exponentials.sum(dim, keepdim=True)
    return (shifted - total.log() if log else exponentials / total).to(dtype).contiguous()


def backward(grad_output: Tensor, output: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
    """softmax: y * (g - sum(g * y)). log_softmax: g - exp(y) * sum(g)."""
    acc = accumulation_dtype(output.dtype)
    g, y = grad_output.to(acc), output.to(acc)
    if log:
        grad = g - y.exp() * g.sum(dim, keepdim=True)
    else:
        grad = y * (g - (g * y).sum(dim, keepdim=True))
    return grad.to(dtype).contiguous()


IMPLEMENTATION = Implementation(lambda problem: None, forward, backward, differentiable=True)
