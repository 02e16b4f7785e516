"""RMSNorm in plain torch, float32 (float64 for float64) inside."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.dispatch import Implementation
from fastattn.numerics import accumulation_dtype


def _two_dims(tensor: Tensor, normalized_ndim: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns) in the accumulation dtype."""
    rows = tensor.shape[: tensor.ndim - normalized_ndim].numel()
    return tensor.reshape(rows, tensor.shape[tensor.ndim - normalized_ndim :].numel()).to(dtype)


def forward(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, normalized_ndim: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, sum, rstd); sum is (0,) without a residual; rstd is (rows,)."""
    total = input if residual is None else input + residual
    acc = accumulation_dtype(input.dtype)
    x = _two_dims(total, normalized_ndim, acc)
    rstd = (x.square().mean(1, keepdim=True) + eps).rsqrt()
    y = x * rstd
    if weight is not None:
        y = y * weight.reshape(-1).to(acc)
    kept = input.new_empty((0,)) if residual is None else total.contiguous()
    return y.reshape(input.shape).to(input.dtype).contiguous(), kept, rstd.reshape(-1)


def backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    normalized_ndim: int,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """dx = rstd * (wg - xhat * mean(wg * xhat)) + grad_sum, with wg = weight * grad_output."""
    acc = accumulation_dtype(input.dtype)
    g = _two_dims(grad_output, normalized_ndim, acc)
    x = _two_dims(input, normalized_ndim, acc)
    if torch.is_grad_enabled():  # a second derivative: the statistics depend on the input, eps does not
        square = x.square().mean(1)
        rstd = (square + (rstd.pow(-2) - square).detach()).rsqrt()
    xhat = x * rstd[:, None]
    wg = g if weight is None else g * weight.reshape(-1).to(acc)
    grad = (wg - xhat * (wg * xhat).mean(1, keepdim=True)) * rstd[:, None]
    grad_input = grad.reshape(input.shape)
    if grad_sum is not None:
        grad_input = grad_input + grad_sum.to(acc)
    if weight is None:
        grad_weight = input.new_empty((0,), dtype=torch.float32)
    elif weight_grad:
        grad_weight = (g * xhat).sum(0).reshape(weight.shape).to(weight.dtype)
    else:
        grad_weight = weight.new_empty((0,))
    return grad_input.to(input.dtype).contiguous(), grad_weight


IMPLEMENTATION = Implementation(lambda problem: None, forward, backward, differentiable=True)
