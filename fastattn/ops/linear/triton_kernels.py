"""Device code of linear: a matrix product with bias and activation, what flows back through an activation."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.gpu.activation_kernels import activate, through_activation
from fastattn.gpu.column_kernels import block_and_columns, leave_sums


@triton.jit
def product(
    c_ptr, before_ptr, a_ptr, b_ptr, bias_ptr, rows, columns, steps, a_row, a_step, b_step, b_column,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """c = activation(a b + bias), a (rows, steps), b (steps, columns) of any strides, c contiguous.

    ACTIVATION: as in op.py. before_ptr: where what the activation is applied to is kept, or None. Blocks of GROUP rows
    of tiles are finished one after the other: what they read of b is in the cache.
    """
    program = tl.program_id(0)
    high, wide = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    group = program // (GROUP * wide)
    first = group * GROUP
    height = tl.minimum(high - first, GROUP)
    row = (first + program % (GROUP * wide) % height).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % (GROUP * wide) // height).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, STEPS)
    a_ptr += row[:, None] * a_row + step[None, :].to(tl.int64) * a_step
    b_ptr += step[:, None].to(tl.int64) * b_step + column[None, :] * b_column
    a_inside, b_inside = (row < rows)[:, None], (column < columns)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, steps, STEPS):
        left = step < steps - start
        a = tl.load(a_ptr, mask=a_inside & left[None, :], other=0.0)
        b = tl.load(b_ptr, mask=left[:, None] & b_inside, other=0.0).to(a.dtype)  # float32 parameters are rounded here
        total = tl.dot(a, b, total, input_precision="ieee")
        a_ptr += STEPS * a_step
        b_ptr += STEPS * b_step
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    place = row[:, None] * columns + column[None, :]
    inside = a_inside & b_inside
    if before_ptr is not None:
        tl.store(before_ptr + place, total, mask=inside)
    total = activate(total, ACTIVATION, c_ptr.dtype.element_ty != tl.bfloat16)
    tl.store(c_ptr + place, total, mask=inside)


@triton.jit
def through(
    result_ptr, sums_ptr, grad_ptr, saved_ptr, grad_stride, saved_stride, rows, columns, chunk_rows,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient before an activation, contiguous, of a chunk of rows and COLUMNS columns.

    sums_ptr: (chunks, columns), sums over the rows of a chunk for the gradient of the bias, or None. result_ptr: None
    where only those are wanted.
    """
    chunk, column = block_and_columns(columns, COLUMNS)
    end = tl.minimum((chunk + 1) * chunk_rows, rows)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, chunk_rows, ROWS):
        row = chunk * chunk_rows + start + tl.arange(0, ROWS)[:, None]
        inside = (row < end) & (column < columns)
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATION != 0:
            saved = tl.load(saved_ptr + row * saved_stride + column, mask=inside, other=0.0).to(tl.float32)
            grad = through_activation(grad, saved, ACTIVATION, grad_ptr.dtype.element_ty != tl.bfloat16)
        if result_ptr is not None:
            tl.store(result_ptr + row * columns + column, grad, mask=inside)
        sums += tl.where(inside, grad, 0.0)
    leave_sums(sums_ptr, sums, chunk, column, columns)
