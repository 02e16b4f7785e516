"""LayerNorm in plain torch, float32 (float64 for float64) inside."""

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
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, sum, mean, rstd); sum is (0,) without a residual; mean and rstd are (rows,)."""
    total = input if residual is None else input + residual
    acc = accumulation_dtype(input.dtype)
    x = _two_dims(total, normalized_ndim, acc)
    mean = x.mean(1, keepdim=True)
    centred = x - mean
    rstd = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    y = centred * rstd
    if weight is not None:
        y = y * weight.reshape(-1).to(acc)
    if bias is not None:
        y = y + bias.reshape(-1).to(acc)
    kept = input.new_empty((0,)) if residual is None else total.contiguous()
    output = y.reshape(input.shape).to(input.dtype).contiguous()
    return output, kept, mean.reshape(-1), rstd.reshape(-1)


def backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    normalized_ndim: int,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = rstd * (wg - mean(wg) - xhat * mean(wg * xhat)) + grad_sum, with wg = weight * grad_output."""
    acc = accumulation_dtype(input.dtype)
    g = _two_dims(grad_output, normalized_ndim, acc)
    x = _two_dims(input, normalized_ndim, acc)
    if torch.is_grad_enabled():  # a second derivative: the statistics depend on the input, eps does not
        mean = x.mean(1)
        variance = (x - mean[:, None]).square().mean(1)
        rstd = (variance + (rstd.pow(-2) - variance).detach()).rsqrt()
    xhat = (x - mean[:, None]) * rstd[:, None]
    wg = g if weight is None else g * weight.reshape(-1).to(acc)
    grad = wg - wg.mean(1, keepdim=True) - xhat * (wg * xhat).mean(1, keepdim=True)
    grad_input = (grad * rstd[:, None]).reshape(input.shape)
    if grad_sum is not None:
        grad_input = grad_input + grad_sum.to(acc)

    def parameter(tensor: Tensor | None, wanted: bool, gradient: Tensor) -> Tensor:
        if tensor is None:
            return input.new_empty((0,), dtype=torch.float32)
        return gradient.sum(0).reshape(tensor.shape).to(tensor.dtype) if wanted else tensor.new_empty((0,))

    return (
        grad_input.to(input.dtype).contiguous(),
        parameter(weight, weight_grad, g * xhat),
        parameter(bias, bias_grad, g),
    )


IMPLEMENTATION = Implementation(lambda problem: None, forward, backward, differentiable=True)
