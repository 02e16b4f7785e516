"""GELU in plain torch, float32 (float64 for float64) inside."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.dispatch import Implementation
from fastattn.numerics import accumulation_dtype


def _sum(input: Tensor, bias: Tensor | None) -> Tensor:
    x = input.to(accumulation_dtype(input.dtype))
    return x if bias is None else x + bias


def _exponent(x: Tensor) -> Tensor:
    """Phi(x) taken as (1 + tanh(u)) / 2 is sigmoid(2 u), which falls to 0 where 1 + tanh is lost in rounding: 2 u."""
    return math.sqrt(8.0 / math.pi) * x * (1.0 + 0.044715 * x.square())


def forward(input: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    x = _sum(input, bias)
    phi = _exponent(x).sigmoid() if tanh else torch.special.ndtr(x)
    return (x * phi).to(input.dtype).contiguous()


def backward(
    grad_output: Tensor, input: Tensor, bias: Tensor | None, tanh: bool, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    """g (Phi(x) + x Phi'(x)); the bias' gradient is the sum over rows."""
    x = _sum(input, bias)
    if tanh:
        exponent = _exponent(x)
        slope = math.sqrt(8.0 / math.pi) * (1.0 + 3.0 * 0.044715 * x.square())
        phi, density = exponent.sigmoid(), exponent.sigmoid() * (-exponent).sigmoid() * slope
    else:
        phi = torch.special.ndtr(x)
        density = (-0.5 * x.square()).exp() / math.sqrt(2.0 * math.pi)
    grad = grad_output.to(x.dtype) * (phi + x * density)
    if bias is None:
        grad_bias = input.new_empty((0,), dtype=torch.float32)
    elif bias_grad:
        rows = math.prod(input.shape[:-1])
        grad_bias = grad.reshape(rows, input.shape[-1]).sum(0).to(bias.dtype)
    else:
        grad_bias = bias.new_empty((0,))
    return grad.to(input.dtype).contiguous(), grad_bias


IMPLEMENTATION = Implementation(lambda problem: None, forward, backward, differentiable=True)
