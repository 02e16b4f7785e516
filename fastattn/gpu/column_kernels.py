"""Device code that leaves partial sums of columns and adds them up, for gradients of weights and biases: in an order
that only their number decides."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_and_columns(columns, COLUMNS: tl.constexpr):
    """(block of rows, its columns (1, COLUMNS)) of this program: neighbours in a row come one after the other."""
    blocks = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    return (program // blocks).to(tl.int64), (program % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def leave_sums(sums_ptr, sums, chunk, column, columns):
    """A chunk's sums over its rows into (chunks, columns), unless that is None."""
    if sums_ptr is not None:
        tl.store(sums_ptr + chunk * columns + column, tl.sum(sums, 0)[None, :], mask=column < columns)


@triton.jit
def column_sums(first_ptr, second_ptr, partials_ptr, chunks, columns, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (i, part): block i of the columns of partials[part], (chunks, columns) float32, into first or second."""
    part = tl.program_id(1)
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    partials_ptr += part.to(tl.int64) * chunks * columns
    sums = tl.zeros((CHUNKS, COLUMNS), tl.float32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)[:, None]
        at = partials_ptr + chunk.to(tl.int64) * columns + column[None, :]
        sums += tl.load(at, mask=(chunk < chunks) & (column < columns)[None, :], other=0.0)
    total = tl.sum(sums, 0)
    if second_ptr is None or part == 0:
        tl.store(first_ptr + column, total, mask=column < columns)
    else:
        tl.store(second_ptr + column, total, mask=column < columns)
