"""Device code that adds up partial sums of columns, for gradients of weights and biases: in an order that only their
number decides."""

from __future__ import annotations

import triton
import triton.language as tl


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
