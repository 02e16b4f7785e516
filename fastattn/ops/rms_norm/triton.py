"""RMSNorm on the triton backend: fastattn/gpu/norms.py, which serves both norms; this one without mean and bias."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.dispatch import Implementation, takes_dtype
from fastattn.gpu.norms import Norm

NORM = Norm("rms_norm", centred=False)


def forward(
    input: Tensor,
    weight: Tensor | None,
    normalized_ndim: int,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    output, _, rstd = NORM.forward(input, weight, None, normalized_ndim, eps, weight_offset)
    return output, rstd


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    normalized_ndim: int,
    weight_offset: float,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    grad_input, grad_weight, _ = NORM.backward(
        grad_output, input, weight, None, None, rstd, normalized_ndim, weight_offset, weight_grad, False
    )
    return grad_input, grad_weight


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
    output, total, _, rstd = NORM.add_forward(
        input, residual, weight, None, philox, normalized_ndim, eps, weight_offset, dropout_p
    )
    assert total is not None
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
    branch, grad, grad_weight, _ = NORM.add_backward(
        grad_output, grad_sum, sum, weight, None, None, rstd, philox, normalized_ndim, weight_offset, dropout_p,
        input_dtype, weight_grad, False,
    )  # fmt: skip
    return branch, grad, grad_weight


IMPLEMENTATION = Implementation(takes_dtype, forward, backward)
ADD_IMPLEMENTATION = Implementation(takes_dtype, add_forward, add_backward)
