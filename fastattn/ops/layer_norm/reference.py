"""LayerNorm in plain torch, float32 (float64 for float64) inside."""

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
    bias: Tensor | None,
    normalized_ndim: int,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, mean, rstd); mean and rstd are (rows,)."""
    acc = accumulation_dtype(input.dtype)
    x = matrix_of(input, normalized_ndim, acc)
    mean = x.mean(1, keepdim=True)
    centred = x - mean
    rstd = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    y = centred * rstd * scale_of(weight, weight_offset, acc)
    if bias is not None:
        y = y + bias.reshape(-1).to(acc)
    return y.reshape(input.shape).to(input.dtype).contiguous(), mean.reshape(-1), rstd.reshape(-1)


def _gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    normalized_ndim: int,
    weight_offset: float,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = rstd * (wg - mean(wg) - xhat * mean(wg * xhat)), with wg = weight * grad_output: (rows, columns), not
    rounded; and the parameters' gradients."""
    acc = accumulation_dtype(input.dtype)
    g = matrix_of(grad_output, normalized_ndim, acc)
    x = matrix_of(input, normalized_ndim, acc)
    if torch.is_grad_enabled():  # a second derivative: the statistics depend on the input, eps does not
        mean = x.mean(1)
        variance = (x - mean[:, None]).square().mean(1)
        rstd = (variance + (rstd.pow(-2) - variance).detach()).rsqrt()
    xhat = (x - mean[:, None]) * rstd[:, None]
    wg = g * scale_of(weight, weight_offset, acc)
    grad = wg - wg.mean(1, keepdim=True) - xhat * (wg * xhat).mean(1, keepdim=True)

    def parameter(tensor: Tensor | None, wanted: bool, gradient: Tensor) -> Tensor:
        if tensor is None:
            return input.new_empty((0,), dtype=torch.float32)
        return gradient.sum(0).reshape(tensor.shape).to(tensor.dtype) if wanted else tensor.new_empty((0,))

    return grad * rstd[:, None], parameter(weight, weight_grad, g * xhat), parameter(bias, bias_grad, g)


def backward(grad_output: Tensor, input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """grad_input and the parameters' gradients."""
    grad, grad_weight, grad_bias = _gradients(grad_output, input, *args)
    return grad.reshape(input.shape).to(input.dtype).contiguous(), grad_weight, grad_bias


def add_forward(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    philox: Tensor | None,
    normalized_ndim: int,
    eps: float,
    weight_offset: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, sum, mean, rstd); the sum is rounded to the residual's dtype before it is normalised."""
    acc = accumulation_dtype(residual.dtype)
    branch = dropped(matrix_of(input, normalized_ndim, acc), philox, dropout_p)
    total = (residual.to(acc) + branch.reshape(residual.shape)).to(residual.dtype).contiguous()
    output, mean, rstd = forward(total, weight, bias, normalized_ndim, eps, weight_offset)
    return output, total, mean, rstd


def add_backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    philox: Tensor | None,
    normalized_ndim: int,
    weight_offset: float,
    dropout_p: float,
    input_dtype: torch.dtype,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum's gradient is the residual's; the input's, where dropout or a dtype makes it another, is made from it
    before it is rounded."""
    grad, grad_weight, grad_bias = _gradients(
        grad_output, sum, weight, bias, mean, rstd, normalized_ndim, weight_offset, weight_grad, bias_grad
    )
    if grad_sum is not None:
        grad = grad + matrix_of(grad_sum, normalized_ndim, grad.dtype)
    if dropout_p > 0.0 or input_dtype != sum.dtype:
        grad_input = dropped(grad, philox, dropout_p).reshape(sum.shape).to(input_dtype).contiguous()
    else:
        grad_input = sum.new_empty((0,), dtype=input_dtype)
    return grad_input, grad.reshape(sum.shape).to(sum.dtype).contiguous(), grad_weight, grad_bias


IMPLEMENTATION = Implementation(lambda problem: None, forward, backward, differentiable=True)
ADD_IMPLEMENTATION = Implementation(lambda problem: None, add_forward, add_backward, differentiable=True)
