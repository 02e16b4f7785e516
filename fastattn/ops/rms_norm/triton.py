"""RMSNorm on the triton backend: fastattn/gpu/norms.py, which serves both norms."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.dispatch import Implementation
from fastattn.gpu import norms
from fastattn.ops.rms_norm.op import RMSNormProblem


def supports(problem: RMSNormProblem) -> str | None:
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {problem.dtype}: float32, bfloat16, float16"
    return None


def forward(
    input: Tensor,
    weight: Tensor | None,
    normalized_ndim: int,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    result = norms.forward("rms_norm", input, None, weight, None, None, normalized_ndim, eps, weight_offset)
    return result.output, result.rstd


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    normalized_ndim: int,
    weight_offset: float,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    result = norms.backward(
        "rms_norm", grad_output, None, input, weight, None, None, rstd, None, normalized_ndim, weight_offset, 0.0,
        input.dtype, weight_grad, False,
    )  # fmt: skip
    return result.grad, result.weight


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
    output, total, _, rstd = norms.forward(
        "rms_norm", input, residual, weight, None, philox, normalized_ndim, eps, weight_offset, dropout_p
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
    result = norms.backward(
        "rms_norm", grad_output, grad_sum, sum, weight, None, None, rstd, philox, normalized_ndim, weight_offset,
        dropout_p, input_dtype, weight_grad, False,
    )  # fmt: skip
    branch = result.branch
    if branch is None:
        branch = torch.empty((0,), dtype=input_dtype, device=sum.device)
    return branch, result.grad, result.weight


IMPLEMENTATION = Implementation(supports, forward, backward)
ADD_IMPLEMENTATION = Implementation(supports, add_forward, add_backward)
