"""Device code of GELU of input + bias: one program for a tile of rows and columns, backwards for a chunk of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.gpu.activations import gelu, gelu_derivative
from fastattn.gpu.column_kernels import block_and_columns, leave_sums


@triton.jit
def _sum(x_ptr, row, column, x_stride, bias, inside):
    return tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32) + bias


@triton.jit
def _bias(bias_ptr, column, columns):
    if bias_ptr is not None:
        return tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    else:
        return 0.0


@triton.jit
def forward(
    output_ptr, x_ptr, bias_ptr, x_stride, rows, columns,
    TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block, column = block_and_columns(columns, COLUMNS)
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (row < rows) & (column < columns)
    x = _sum(x_ptr, row, column, x_stride, _bias(bias_ptr, column, columns), inside)
    y = gelu(x, TANH, output_ptr.dtype.element_ty != tl.bfloat16)
    tl.store(output_ptr + row * columns + column, y, mask=inside)


@triton.jit
def backward(
    grad_input_ptr, sums_ptr, grad_ptr, x_ptr, bias_ptr, grad_stride, x_stride, rows, columns, chunk_rows,
    TANH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """sums_ptr: (chunks, columns) for the bias' gradient, or None."""
    chunk, column = block_and_columns(columns, COLUMNS)
    end = tl.minimum((chunk + 1) * chunk_rows, rows)
    bias = _bias(bias_ptr, column, columns)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, chunk_rows, ROWS):
        row = chunk * chunk_rows + step + tl.arange(0, ROWS)[:, None]
        inside = (row < end) & (column < columns)
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        x = _sum(x_ptr, row, column, x_stride, bias, inside)
        grad = grad * gelu_derivative(x, TANH, grad_input_ptr.dtype.element_ty != tl.bfloat16)
        tl.store(grad_input_ptr + row * columns + column, grad, mask=inside)
        if sums_ptr is not None:
            sums += tl.where(inside, grad, 0.0)
    leave_sums(sums_ptr, sums, chunk, column, columns)
