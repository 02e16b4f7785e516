"""Device code of LayerNorm and RMSNorm, of a sum as well, forward and backward.

RMSNorm is LayerNorm without a mean: no `mean_ptr`. Every other pointer that is None leaves out what it stands for, too:
a residual, dropout (`philox_ptr`), weight or bias, a gradient that nobody asks for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.gpu.functions import keep_tile


@triton.jit
def _dropout(philox_ptr, threshold, scale):
    """What `_kept` needs to know."""
    if philox_ptr is not None:
        return tl.load(philox_ptr), tl.load(philox_ptr + 1), threshold, scale
    else:
        return 0, 0, threshold, scale


@triton.jit
def _kept(x, philox_ptr, dropout, rows, first_column, COLUMNS: tl.constexpr):
    """x, (rows, COLUMNS), with its elements dropped or scaled."""
    if philox_ptr is not None:
        seed, offset, threshold, scale = dropout
        keep = keep_tile(seed, offset, (rows >> 32)[:, None], rows, first_column, threshold, COLUMNS)
        x = tl.where(keep, x * scale, 0.0)
    return x


@triton.jit
def _normalised(
    x_ptr, residual_ptr, x_stride, residual_stride, philox_ptr, dropout, rows, column, first_column, inside,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """What is normalised: x, or the residual plus x, rounded to the residual's dtype."""
    x = tl.load(x_ptr + rows[:, None] * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    x = _kept(x, philox_ptr, dropout, rows, first_column, COLUMNS)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + rows[:, None] * residual_stride + column, mask=inside, other=0.0)
        x = (residual.to(tl.float32) + x).to(residual.dtype).to(tl.float32)
    return x


@triton.jit
def _weight(weight_ptr, weight_offset, column, exists):
    if weight_ptr is not None:
        return tl.load(weight_ptr + column, mask=exists, other=0.0).to(tl.float32) + weight_offset
    else:
        return 1.0


@triton.jit
def _scaled(y, weight_ptr, bias_ptr, weight_offset, column, exists):
    y = y * _weight(weight_ptr, weight_offset, column, exists)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + column, mask=exists, other=0.0).to(tl.float32)
    return y


@triton.jit
def _reciprocal_root(x):
    """Rounded as float32 should be: the error of a statistic is an error of its whole row."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def forward(
    output_ptr, sum_ptr, mean_ptr, rstd_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, philox_ptr,
    x_stride, residual_stride, rows, columns, eps, weight_offset, threshold, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program for ROWS rows, which stay in registers: the variance is that of what the mean was taken from."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    exists = column < columns
    inside = (row < rows)[:, None] & exists
    count = columns * 1.0
    dropout = _dropout(philox_ptr, threshold, scale)
    x = _normalised(
        x_ptr, residual_ptr, x_stride, residual_stride, philox_ptr, dropout, row, column, 0, inside, COLUMNS
    )
    if sum_ptr is not None:
        tl.store(sum_ptr + row[:, None] * columns + column, x, mask=inside)
    if mean_ptr is not None:
        mean = tl.div_rn(tl.sum(x, 1), count)
        tl.store(mean_ptr + row, mean, mask=row < rows)
        x = tl.where(exists, x - mean[:, None], 0.0)
    rstd = _reciprocal_root(tl.div_rn(tl.sum(x * x, 1), count) + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = _scaled(x * rstd[:, None], weight_ptr, bias_ptr, weight_offset, column, exists)
    tl.store(output_ptr + row[:, None] * columns + column, y, mask=inside)


@triton.jit
def forward_long(
    output_ptr, sum_ptr, mean_ptr, rstd_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, philox_ptr,
    x_stride, residual_stride, columns, eps, weight_offset, threshold, scale,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program for a row that registers do not hold, read twice: the second time backwards, since what was read
    last is still in a cache. Every lane has a mean of its own (Welford 1962); they are combined once (Chan et al.)."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    lane = tl.arange(0, COLUMNS)[None, :]
    means = tl.zeros((1, COLUMNS), tl.float32)
    squares = tl.zeros((1, COLUMNS), tl.float32)
    dropout = _dropout(philox_ptr, threshold, scale)
    steps = 0.0
    for first in tl.range(0, columns, COLUMNS, num_stages=STAGES):
        column = first + lane
        inside = column < columns
        x = _normalised(
            x_ptr, residual_ptr, x_stride, residual_stride, philox_ptr, dropout, row, column, first, inside, COLUMNS
        )
        if sum_ptr is not None:
            tl.store(sum_ptr + row[:, None] * columns + column, x, mask=inside)
        if mean_ptr is not None:
            steps += 1.0
            from_mean = tl.where(inside, x - means, 0.0)
            means += from_mean * (1.0 / steps)
            squares += from_mean * (x - means)
        else:
            squares += x * x
    count = columns * 1.0
    if mean_ptr is not None:
        seen = (columns // COLUMNS + (lane < columns % COLUMNS)) * 1.0
        mean = tl.div_rn(tl.sum(means * seen, 1), count)
        apart = means - mean[:, None]
        squares += seen * apart * apart
        tl.store(mean_ptr + row, mean)
    rstd = _reciprocal_root(tl.div_rn(tl.sum(squares, 1), count) + eps)
    tl.store(rstd_ptr + row, rstd)
    blocks = tl.cdiv(columns, COLUMNS)
    for step in range(0, blocks):
        first = (blocks - 1 - step) * COLUMNS
        column = first + lane
        inside = column < columns
        x = _normalised(
            x_ptr, residual_ptr, x_stride, residual_stride, philox_ptr, dropout, row, column, first, inside, COLUMNS
        )
        if mean_ptr is not None:
            x = x - mean[:, None]
        y = _scaled(x * rstd[:, None], weight_ptr, bias_ptr, weight_offset, column, inside)
        tl.store(output_ptr + row[:, None] * columns + column, y, mask=inside)


@triton.jit
def _gradient_and_standardised(
    grad_ptr, x_ptr, mean_ptr, rstd, grad_stride, x_stride, row, column, exists_row, inside, KEEP: tl.constexpr
):
    """What came in, and (x - mean) * rstd again. KEEP: how long caches should: Triton's eviction policy."""
    grad = tl.load(grad_ptr + row[:, None] * grad_stride + column, mask=inside, other=0.0, eviction_policy=KEEP)
    x = tl.load(x_ptr + row[:, None] * x_stride + column, mask=inside, other=0.0, eviction_policy=KEEP).to(tl.float32)
    if mean_ptr is not None:
        x = x - tl.load(mean_ptr + row, mask=exists_row, other=0.0)[:, None]
    return grad.to(tl.float32), x * rstd[:, None]


@triton.jit
def _write_gradients(
    grad, grad_ptr, branch_ptr, grad_sum_ptr, grad_sum_stride, philox_ptr, dropout, row, column, first_column, inside,
    columns, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of what was normalised, and of the branch that was dropped or cast before it was added."""
    if grad_sum_ptr is not None:
        at = grad_sum_ptr + row[:, None] * grad_sum_stride + column
        grad += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_ptr + row[:, None] * columns + column, grad, mask=inside)
    if branch_ptr is not None:
        grad = _kept(grad, philox_ptr, dropout, row, first_column, COLUMNS)
        tl.store(branch_ptr + row[:, None] * columns + column, grad, mask=inside)


@triton.jit
def _mean(grad, mean_ptr, count):
    """(rows, 1), or 0 where no mean was taken."""
    if mean_ptr is not None:
        return tl.div_rn(tl.sum(grad, 1), count)[:, None]
    else:
        return 0.0


@triton.jit
def _store_sum(sums_ptr, sums, at, exists):
    """A chunk's part of a parameter's gradient, unless nobody asks for it."""
    if sums_ptr is not None:
        tl.store(sums_ptr + at, tl.sum(sums, 0), mask=exists)


@triton.jit
def backward(
    grad_ptr, branch_ptr, weight_sums_ptr, bias_sums_ptr,
    grad_output_ptr, grad_sum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, philox_ptr,
    grad_output_stride, grad_sum_stride, x_stride, rows, columns, chunk_rows, weight_offset, threshold, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, REREAD: tl.constexpr,
):  # fmt: skip
    """One program for a chunk of rows, ROWS at a time in registers, with the chunk's sums for weight and bias.

    REREAD: registers do not hold rows and sums at once; rows are read from a cache when their sums are known.
    """
    chunk = tl.program_id(0).to(tl.int64)
    end = tl.minimum((chunk + 1) * chunk_rows, rows)
    column = tl.arange(0, COLUMNS)[None, :]
    exists = column < columns
    count = columns * 1.0
    weight_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    dropout = _dropout(philox_ptr, threshold, scale)
    if not REREAD:
        weight = _weight(weight_ptr, weight_offset, column, exists)
    for step in tl.range(0, chunk_rows, ROWS, num_stages=STAGES):
        row = chunk * chunk_rows + step + tl.arange(0, ROWS)
        exists_row = row < end
        inside = exists_row[:, None] & exists
        rstd = tl.load(rstd_ptr + row, mask=exists_row, other=0.0)
        grad, x = _gradient_and_standardised(
            grad_output_ptr, x_ptr, mean_ptr, rstd, grad_output_stride, x_stride, row, column, exists_row, inside,
            "evict_last" if REREAD else "",
        )  # fmt: skip
        if REREAD:
            weight = _weight(weight_ptr, weight_offset, column, exists)
        projection = tl.div_rn(tl.sum(grad * weight * x, 1), count)[:, None]
        grad_mean = _mean(grad * weight, mean_ptr, count)
        if REREAD:
            grad, x = _gradient_and_standardised(
                grad_output_ptr, x_ptr, mean_ptr, rstd, grad_output_stride, x_stride, row, column, exists_row, inside,
                "evict_first",
            )  # fmt: skip
        if weight_sums_ptr is not None:
            weight_sums += grad * x
        if bias_sums_ptr is not None:
            bias_sums += grad
        grad = (grad * weight - x * projection - grad_mean) * rstd[:, None]
        _write_gradients(
            grad,
            grad_ptr,
            branch_ptr,
            grad_sum_ptr,
            grad_sum_stride,
            philox_ptr,
            dropout,
            row,
            column,
            0,
            inside,
            columns,
            COLUMNS,
        )
    column = tl.arange(0, COLUMNS)
    _store_sum(weight_sums_ptr, weight_sums, chunk * columns + column, column < columns)
    _store_sum(bias_sums_ptr, bias_sums, chunk * columns + column, column < columns)


@triton.jit
def backward_means(
    projections_ptr, grad_means_ptr, grad_output_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr,
    grad_output_stride, x_stride, columns, weight_offset,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What the gradient of a long row needs of all of it: the means of grad * x and of grad (times the weight)."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    lane = tl.arange(0, COLUMNS)[None, :]
    rstd = tl.load(rstd_ptr + row)
    products = tl.zeros((1, COLUMNS), tl.float32)
    grads = tl.zeros((1, COLUMNS), tl.float32)
    for first in tl.range(0, columns, COLUMNS, num_stages=STAGES):
        column = first + lane
        inside = column < columns
        grad, x = _gradient_and_standardised(
            grad_output_ptr, x_ptr, mean_ptr, rstd, grad_output_stride, x_stride, row, column, row >= 0, inside, ""
        )
        grad *= _weight(weight_ptr, weight_offset, column, inside)
        products += grad * x
        grads += grad
    count = columns * 1.0
    tl.store(projections_ptr + row, tl.div_rn(tl.sum(products, 1), count))
    if mean_ptr is not None:
        tl.store(grad_means_ptr + row, tl.div_rn(tl.sum(grads, 1), count))


@triton.jit
def backward_long(
    grad_ptr, branch_ptr, weight_sums_ptr, bias_sums_ptr, projections_ptr, grad_means_ptr,
    grad_output_ptr, grad_sum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, philox_ptr,
    grad_output_stride, grad_sum_stride, x_stride, rows, columns, chunk_rows, weight_offset, threshold, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program for COLUMNS columns of a chunk of rows, after `backward_means`."""
    blocks = tl.cdiv(columns, COLUMNS)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    end = tl.minimum((chunk + 1) * chunk_rows, rows)
    first = tl.program_id(0) % blocks * COLUMNS
    column = first + tl.arange(0, COLUMNS)[None, :]
    exists = column < columns
    weight = _weight(weight_ptr, weight_offset, column, exists)
    weight_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    dropout = _dropout(philox_ptr, threshold, scale)
    for step in tl.range(0, chunk_rows, ROWS, num_stages=STAGES):
        row = chunk * chunk_rows + step + tl.arange(0, ROWS)
        exists_row = row < end
        inside = exists_row[:, None] & exists
        rstd = tl.load(rstd_ptr + row, mask=exists_row, other=0.0)
        grad, x = _gradient_and_standardised(
            grad_output_ptr, x_ptr, mean_ptr, rstd, grad_output_stride, x_stride, row, column, exists_row, inside, ""
        )
        if weight_sums_ptr is not None:
            weight_sums += grad * x
        if bias_sums_ptr is not None:
            bias_sums += grad
        grad = grad * weight - x * tl.load(projections_ptr + row, mask=exists_row, other=0.0)[:, None]
        if mean_ptr is not None:
            grad -= tl.load(grad_means_ptr + row, mask=exists_row, other=0.0)[:, None]
        _write_gradients(
            grad * rstd[:, None], grad_ptr, branch_ptr, grad_sum_ptr, grad_sum_stride, philox_ptr, dropout, row, column,
            first, inside, columns, COLUMNS,
        )  # fmt: skip
    column = first + tl.arange(0, COLUMNS)
    _store_sum(weight_sums_ptr, weight_sums, chunk * columns + column, column < columns)
    _store_sum(bias_sums_ptr, bias_sums, chunk * columns + column, column < columns)
