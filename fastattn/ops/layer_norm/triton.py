"""LayerNorm on the triton backend: fastattn/gpu/norms.py, which serves both norms."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.dispatch import Implementation
from fastattn.gpu import norms
from fastattn.ops.layer_norm.op import LayerNormProblem


def supports(problem: LayerNormProblem) -> str | None:
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {problem.dtype}: float32, bfloat16, float16"
    return None


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    output, _, mean, rstd = norms.forward(
        "layer_norm", input, None, weight, bias, None, normalized_ndim, eps, weight_offset
    )
    assert mean is not None
    return output, mean, rstd


def backward(
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
    grad, _, grad_weight, grad_bias = norms.backward(
        "layer_norm", grad_output, None, input, weight, bias, mean, rstd, None, normalized_ndim, weight_offset, 0.0,
        input.dtype, weight_grad, bias_grad,
    )  # fmt: skip
    return grad, grad_weight, grad_bias


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
    output, total, mean, rstd = norms.forward(
        "layer_norm", input, residual, weight, bias, philox, normalized_ndim, eps, weight_offset, dropout_p
    )
    assert total is not None and mean is not None
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
    grad, branch, grad_weight, grad_bias = norms.backward(
        "layer_norm", grad_output, grad_sum, sum, weight, bias, mean, rstd, philox, normalized_ndim, weight_offset,
        dropout_p, input_dtype, weight_grad, bias_grad,
    )  # fmt: skip
    if branch is None:
        branch = torch.empty((0,), dtype=input_dtype, device=sum.device)
    return branch, grad, grad_weight, grad_bias


IMPLEMENTATION = Implementation(supports, forward, backward)
ADD_IMPLEMENTATION = Implementation(supports, add_forward, add_backward)
