"""GELU on the triton backend."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastattn.dispatch import Implementation
from fastattn.gpu import devices, tuning
from fastattn.gpu.columns import column_sums, partial_sums
from fastattn.gpu.deferred import Deferred
from fastattn.gpu.rows import as_rows
from fastattn.ops.gelu.op import GeluProblem

KERNELS = Deferred("fastattn.ops.gelu.triton_kernels")


def supports(problem: GeluProblem) -> str | None:
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {problem.dtype}: float32, bfloat16, float16"
    return None


def _matrix(input: Tensor, bias: Tensor | None, *others: Tensor) -> tuple[int, int]:
    """(rows, columns); where no bias tells columns apart and all lies in a row, it is one."""
    elements = input.numel()
    if bias is None and input.is_contiguous() and all(tensor.is_contiguous() for tensor in others):
        return 1, elements
    columns = input.shape[-1] if input.ndim else 1
    return elements // columns, columns


def _kind(rows: int) -> str:
    return "rows" if rows > 1 else "row"


def forward(input: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    if output.numel() == 0:
        return output
    rows, columns = _matrix(input, bias)
    x, x_stride = as_rows(input)
    options = tuning.options("gelu", "forward", devices.target_of(input.device), kind=_kind(rows), size=columns)
    grid = (-(-rows // options["ROWS"]) * -(-columns // options["COLUMNS"]),)
    with devices.on(input):
        KERNELS.forward[grid](output, x, bias, x_stride, rows, columns, TANH=tanh, **options)
    return output


@functools.lru_cache(maxsize=4096)
def chunk_rows(rows: int, columns: int) -> int:
    """Rows that one program adds up for the bias' gradient: by the shape alone, and for about a thousand programs."""
    return max(min(max(rows * columns // 2**19, 16), 128), 4096 // columns)


def backward(
    grad_output: Tensor, input: Tensor, bias: Tensor | None, tanh: bool, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    grad_input = torch.empty_like(input, memory_format=torch.contiguous_format)
    if bias is None:
        grad_bias = torch.empty((0,), dtype=torch.float32, device=input.device)
    else:
        grad_bias = torch.empty_like(bias) if bias_grad else bias.new_empty((0,))
    bias_grad = bias is not None and bias_grad
    if grad_input.numel() == 0:
        return grad_input, grad_bias.zero_()
    rows, columns = _matrix(input, bias, grad_output)
    x, x_stride = as_rows(input)
    grad, grad_stride = as_rows(grad_output)
    options = tuning.options("gelu", "backward", devices.target_of(input.device), kind=_kind(rows), size=columns)
    chunk = chunk_rows(rows, columns) if bias_grad else options["ROWS"]
    chunks = -(-rows // chunk)
    sums = partial_sums(1, chunks, columns, input.device) if bias_grad else None
    grid = (chunks * -(-columns // options["COLUMNS"]),)
    with devices.on(input):
        KERNELS.backward[grid](
            grad_input, sums, grad, x, bias, grad_stride, x_stride, rows, columns, chunk, TANH=tanh, **options
        )
    if sums is not None:
        column_sums("gelu", sums, grad_bias)
    return grad_input, grad_bias


IMPLEMENTATION = Implementation(supports, forward, backward)
