"""Linear on the triton backend: for being asked; torch's products are preferred on GPUs (fastattn/preference.py)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.dispatch import Implementation, takes_dtype
from fastattn.gpu import devices, tuning
from fastattn.gpu.columns import column_sums, partial_sums
from fastattn.gpu.deferred import Deferred
from fastattn.gpu.rows import as_rows
from fastattn.ops.linear.op import LinearProblem

KERNELS = Deferred("fastattn.ops.linear.triton_kernels")
CHUNK_ROWS = 64  # whose part of the bias' gradient is one sum


def supports(problem: LinearProblem) -> str | None:
    reason = takes_dtype(problem)
    if reason is not None:
        return reason
    if problem.weight_dtype not in (problem.dtype, torch.float32):
        return f"has no kernel for weights of {problem.weight_dtype}"
    return None


def _product(
    c: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    before: Tensor | None = None,
) -> None:
    """c = activation(a @ b + bias) for matrices a and b; c is contiguous, and so is `before`."""
    if c.numel() == 0:
        return
    (rows, steps), columns = a.shape, b.shape[1]
    options = tuning.options("linear", "product", devices.target_of(c.device), a.dtype)
    grid = (-(-rows // options["ROWS"]) * -(-columns // options["COLUMNS"]),)
    with devices.on(c):
        KERNELS.product[grid](
            c, before, a, b, bias, rows, columns, steps, *a.stride(), *b.stride(), ACTIVATION=activation, **options
        )


def _nothing(like: Tensor) -> Tensor:
    return torch.empty((0,), dtype=like.dtype, device=like.device)


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, activation: int, save: bool) -> tuple[Tensor, Tensor]:
    outer, inner = weight.shape
    leading = input.shape[:-1]
    output = torch.empty((*leading, outer), dtype=input.dtype, device=input.device)
    before = torch.empty_like(output) if save else None
    rows = input.reshape(math.prod(leading), inner)
    _product(output, rows, weight.t(), None if bias is None else bias.contiguous(), activation, before)
    return output, _nothing(input) if before is None else before


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    saved: Tensor | None,
    activation: int,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outer, inner = weight.shape
    count = math.prod(input.shape[:-1])
    parameter = input if bias is None else bias
    grad_bias = torch.empty((outer,), dtype=parameter.dtype, device=input.device) if bias_grad else _nothing(parameter)
    activation = 0 if saved is None else activation
    grad = grad_output.reshape(count, outer)
    if activation or bias_grad:
        grad = _through(grad, saved, activation, grad_bias if bias_grad else None)
    grad_input, grad_weight = _nothing(input), _nothing(weight)
    if input_grad:
        grad_input = torch.empty_like(input, memory_format=torch.contiguous_format)
        _product(grad_input, grad, weight)
    if weight_grad:
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        _product(grad_weight, grad.t(), input.reshape(count, inner))
    return grad_input, grad_weight, grad_bias


def _through(grad: Tensor, saved: Tensor | None, activation: int, grad_bias: Tensor | None) -> Tensor:
    """The gradient before the activation; the bias' into grad_bias unless that is None."""
    rows, columns = grad.shape
    result = torch.empty_like(grad, memory_format=torch.contiguous_format) if activation else None
    if columns == 0:
        return grad
    chunks = max(-(-rows // CHUNK_ROWS), 1)
    sums = None if grad_bias is None else partial_sums(1, chunks, columns, grad.device)
    read, stride = as_rows(grad)
    before, before_stride = (None, 0) if saved is None or not activation else as_rows(saved.reshape(rows, columns))
    options = tuning.options("linear", "through", devices.target_of(grad.device), size=columns)
    with devices.on(grad):
        KERNELS.through[(chunks * -(-columns // options["COLUMNS"]),)](
            result, sums, read, before, stride, before_stride, rows, columns, CHUNK_ROWS,
            ACTIVATION=activation, **options,
        )  # fmt: skip
    if sums is not None and grad_bias is not None:
        column_sums("linear", sums, grad_bias)
    return read if result is None else result


IMPLEMENTATION = Implementation(supports, forward, backward)
