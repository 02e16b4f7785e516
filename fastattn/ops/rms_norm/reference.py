"""RMSNorm in plain torch, float32 (float64 for float64) inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import Implementation
from fastattn.norms import dropped, matrix_of, scale_of
from fastattn.numerics import accumulation_dtype


def forward(
    input: Tensor,
    weight: Tensor | None,
    normalized_ndim: int,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """(output, rstd); rstd is (rows,)."""
    acc = accumulation_dtype(input.dtype)
    x = matrix_of(input, normalized_ndim, acc)
    rstd = (x.square().mean(1, keepdim=True) + eps).rsqrt()
    y = x * rstd * scale_of(weight, weight_offset, acc)
    return y.reshape(input.shape).to(input.dtype).contiguous(), rstd.reshape(-1)


def _gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    normalized_ndim: int,
    weight_offset: float,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """dx = rstd * (wg - xhat * mean(wg * xhat)), with wg = weight * grad_output: (rows, columns), not rounded; and the
    weight's gradient."""
    acc = accumulation_dtype(input.dtype)
    g = matrix_of(grad_output, normalized_ndim, acc)
    x = matrix_of(input, normalized_ndim, acc)
    if torch.is_grad_enabled():  # a second derivative: the statistics depend on the input, eps does not
        square = x.square().mean(1)
        rstd = (square + (rstd.pow(-2) - square).detach()).rsqrt()
    xhat = x * rstd[:, None]
    wg = g * scale_of(weight, weight_offset, acc)
    grad = wg - xhat * (wg * xhat).mean(1, keepdim=True)

    if weight is None:
        grad_weight = input.new_empty((0,), dtype=torch.float32)
    elif weight_grad:
        grad_weight = (g * xhat).sum(0).reshape(weight.shape).to(weight.dtype)
    else:
        grad_weight = weight.new_empty((0,))
    return grad * rstd[:, None], grad_weight


def backward(grad_output: Tensor, input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """grad_input and the weight's gradient."""
    grad, grad_weight = _gradients(grad_output, input, *args)
    return grad.reshape(input.shape).to(input.dtype).contiguous(), grad_weight


def add_forward(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    philox: Tensor | None,
    normalized_ndim: int,
    eps: float,
    weight_offset: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, sum, rstd); the sum is rounded to the residual's dtype before it is normalised."""
    acc = accumulation_dtype(residual.dtype)
    branch = dropped(matrix_of(input, normalized_ndim, acc), philox, dropout_p)
    total = (residual.to(acc) + branch.reshape(residual.shape)).to(residual.dtype).contiguous()
    output, rstd = forward(total, weight, normalized_ndim, eps, weight_offset)
    return output, total, rstd


def add_backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    philox: Tensor | None,
    normalized_ndim: int,
    weight_offset: float,
    dropout_p: float,
    input_dtype: torch.dtype,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum's gradient is the residual's; the input's, where dropout or a dtype makes it another, is made from it
    before it is rounded."""
    grad, grad_weight = _gradients(grad_output, sum, weight, rstd, normalized_ndim, weight_offset, weight_grad)
    if grad_sum is not None:
        grad = grad + matrix_of(grad_sum, normalized_ndim, grad.dtype)
    if dropout_p > 0.0 or input_dtype != sum.dtype:
        grad_input = dropped(grad, philox, dropout_p).reshape(sum.shape).to(input_dtype).contiguous()
    else:
        grad_input = sum.new_empty((0,), dtype=input_dtype)
    return grad_input, grad.reshape(sum.shape).to(sum.dtype).contiguous(), grad_weight


IMPLEMENTATION = Implementation(lambda problem: None, forward, backward, differentiable=True)
ADD_IMPLEMENTATION = Implementation(lambda problem: None, add_forward, add_backward, differentiable=True)
