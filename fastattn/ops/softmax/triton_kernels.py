"""Device code of softmax and log_softmax: rows in registers, longer rows read twice, rows across memory."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.gpu.functions import LOWEST, add_exponentials, combine_exponentials, exp, fast_exp

#: What is no reason for another compilation: nothing is loaded faster for knowing it.
SIZES = ["rows", "rows_per_matrix", "diagonal", "size0", "size1", "size2"]


@triton.jit
def _exponentials(x, PRECISE: tl.constexpr):
    return exp(x) if PRECISE else fast_exp(x)


@triton.jit
def _quotient(x, total, PRECISE: tl.constexpr):
    """x / total, the reciprocal of the row's total to twice the digits where they show."""
    inverse = tl.div_rn(1.0, total)
    if PRECISE:
        return x * inverse + x * (tl.fma(-total, inverse, 1.0) * inverse)
    return x * inverse


@triton.jit
def _mask_offset(row, size0, size1, size2, stride0, stride1, stride2, stride3):
    """Where a row's mask begins; the innermost of the dimensions that rows were made of comes first."""
    offset = row % size0 * stride0
    row = row // size0
    offset += row % size1 * stride1
    row = row // size1
    return offset + row % size2 * stride2 + row // size2 * stride3


@triton.jit
def _nearly(limit):
    """Up to 15 more than the limit, so that what is loaded ends where 16 bytes do."""
    return (limit + 15) // 16 * 16


@triton.jit
def _scores(x, scale, mask_ptr, loaded, visible, MASK: tl.constexpr):
    """scale * x + mask, -inf where nothing is visible. MASK: 0 for none, 1 for bool, 2 for one that is added."""
    x = x.to(tl.float32) * scale
    if MASK == 1:
        visible = visible & (tl.load(mask_ptr, mask=loaded, other=0) != 0)
    if MASK == 2:
        x += tl.load(mask_ptr, mask=loaded, other=0.0).to(tl.float32)
    return tl.where(visible, x, float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def forward_rows(
    output_ptr, input_ptr, mask_ptr, input_stride, scale, rows, columns, rows_per_matrix, diagonal,
    size0, size1, size2, stride0, stride1, stride2, stride3, mask_step,
    LOG: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program for ROWS whole rows."""
    PRECISE: tl.constexpr = output_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    loaded = inside
    visible = inside
    if CAUSAL:
        limit = (row % rows_per_matrix + diagonal).to(tl.int32)
        loaded = inside & (column < _nearly(limit))
        visible = inside & (column < limit)
    x = tl.load(input_ptr + row * input_stride + column, mask=loaded, other=0.0)
    if MASK != 0:
        mask_ptr += _mask_offset(row, size0, size1, size2, stride0, stride1, stride2, stride3) + column * mask_step
    x = _scores(x, scale, mask_ptr, loaded, visible, MASK)
    top = tl.max(x, 1)[:, None]
    if MASK != 0 or CAUSAL:
        top = tl.where(top == float("-inf"), 0.0, top)
    x -= top
    e = _exponentials(x, PRECISE and not LOG)
    total = tl.sum(e, 1)[:, None]
    if MASK != 0 or CAUSAL:
        total = tl.where(total == 0.0, 1.0, total)  # a row that sees nothing: 0 / 1, or -inf - log(1)
    y = x - tl.log(total) if LOG else _quotient(e, total, PRECISE)
    if CAUSAL:
        y = tl.where(visible, y, float("-inf") if LOG else 0.0)
    tl.store(output_ptr + row * columns + column, y, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def forward_long(
    output_ptr, input_ptr, mask_ptr, input_stride, scale, rows, columns, rows_per_matrix, diagonal,
    size0, size1, size2, stride0, stride1, stride2, stride3, mask_step,
    LOG: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program for a row that is read twice, the second time from its end, which is still in the caches."""
    PRECISE: tl.constexpr = output_ptr.dtype.element_ty == tl.float32
    TILE: tl.constexpr = PARTS * LANES
    row = tl.program_id(0).to(tl.int64)
    input_ptr += row * input_stride
    output_ptr += row * columns
    if MASK != 0:
        mask_ptr += _mask_offset(row, size0, size1, size2, stride0, stride1, stride2, stride3)
    limit = columns
    if CAUSAL:
        limit = tl.maximum(tl.minimum((row % rows_per_matrix + diagonal).to(tl.int32), columns), 0)
    near = tl.minimum(_nearly(limit), columns) if CAUSAL else columns
    place = tl.arange(0, PARTS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    top = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, limit, TILE):
        column = start + place
        x = tl.load(input_ptr + column, mask=column < near, other=0.0, eviction_policy="evict_last")
        x = _scores(x, scale, mask_ptr + column * mask_step, column < near, column < limit, MASK)
        top, total = add_exponentials(top, total, x)
    highest, whole = combine_exponentials(top, total)
    if MASK != 0 or CAUSAL:
        whole = tl.where(whole == 0.0, 1.0, whole)
    last = (limit + TILE - 1) // TILE * TILE - TILE
    for back in range(0, limit, TILE):
        column = last - back + place
        x = tl.load(input_ptr + column, mask=column < near, other=0.0, eviction_policy="evict_first")
        x = _scores(x, scale, mask_ptr + column * mask_step, column < near, column < limit, MASK) - highest
        y = x - tl.log(whole) if LOG else _quotient(_exponentials(x, PRECISE), whole, PRECISE)
        if CAUSAL:
            y = tl.where(column < limit, y, float("-inf") if LOG else 0.0)
        tl.store(output_ptr + column, y, mask=column < columns)
    if CAUSAL:
        for start in range(last + TILE, columns, TILE):
            column = start + place
            hidden = tl.full((PARTS, LANES), float("-inf") if LOG else 0.0, tl.float32)
            tl.store(output_ptr + column, hidden, mask=column < columns)


@triton.jit
def _gradient(grad, y, total, scale, LOG: tl.constexpr, HIDES: tl.constexpr, PRECISE: tl.constexpr):
    """Of scale * x. total: the row's sum of grad (log_softmax) or of grad * y."""
    if LOG:
        found = grad - _exponentials(y, PRECISE) * total
        if HIDES:
            found = tl.where(y == float("-inf"), 0.0, found)
    else:
        found = y * (grad - total)
    return found * scale


@triton.jit(do_not_specialize=SIZES[:3])
def backward_rows(
    grad_input_ptr, grad_ptr, output_ptr, grad_stride, output_stride, scale, rows, columns, rows_per_matrix, diagonal,
    LOG: tl.constexpr, HIDES: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = output_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    loaded = inside
    if CAUSAL:  # beyond the limit y is 0, or -inf
        loaded = inside & (column < _nearly((row % rows_per_matrix + diagonal).to(tl.int32)))
    # What flows into a hidden -inf counts, too: the sum is over the whole row.
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside if LOG else loaded, other=0.0).to(tl.float32)
    y = tl.load(output_ptr + row * output_stride + column, mask=loaded, other=float("-inf") if LOG else 0.0)
    y = y.to(tl.float32)
    total = tl.sum(grad if LOG else grad * y, 1)[:, None]
    found = _gradient(grad, y, total, scale, LOG, HIDES, PRECISE)
    tl.store(grad_input_ptr + row * columns + column, found, mask=inside)


@triton.jit(do_not_specialize=SIZES[:3])
def backward_long(
    grad_input_ptr, grad_ptr, output_ptr, grad_stride, output_stride, scale, rows, columns, rows_per_matrix, diagonal,
    LOG: tl.constexpr, HIDES: tl.constexpr, CAUSAL: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = output_ptr.dtype.element_ty == tl.float32
    TILE: tl.constexpr = PARTS * LANES
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * grad_stride
    output_ptr += row * output_stride
    grad_input_ptr += row * columns
    limit = columns
    if CAUSAL:  # beyond it y is 0, or -inf
        limit = tl.maximum(tl.minimum(_nearly((row % rows_per_matrix + diagonal).to(tl.int32)), columns), 0)
    place = tl.arange(0, PARTS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    end = columns if LOG else limit  # what flows into a hidden -inf counts
    sums = tl.zeros((LANES,), tl.float32)
    for start in range(0, end, TILE):
        column = start + place
        term = tl.load(grad_ptr + column, mask=column < end, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if not LOG:
            y = tl.load(output_ptr + column, mask=column < end, other=0.0, eviction_policy="evict_last")
            term *= y.to(tl.float32)
        sums += tl.sum(term, 0)
    total = tl.sum(sums, 0)
    last = (limit + TILE - 1) // TILE * TILE - TILE
    for back in range(0, limit, TILE):
        column = last - back + place
        seen = column < limit
        grad = tl.load(grad_ptr + column, mask=seen, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = tl.load(
            output_ptr + column, mask=seen, other=float("-inf") if LOG else 0.0, eviction_policy="evict_first"
        ).to(tl.float32)
        found = _gradient(grad, y, total, scale, LOG, HIDES, PRECISE)
        tl.store(grad_input_ptr + column, found, mask=column < columns)
    if CAUSAL:
        for start in range(last + TILE, columns, TILE):
            column = start + place
            tl.store(grad_input_ptr + column, tl.zeros((PARTS, LANES), tl.float32), mask=column < columns)


@triton.jit
def _lanes(columns, inner, LANES: tl.constexpr):
    """(offset of the first element of each lane's row, whether there is such a row): `inner` rows lie side by side."""
    blocks = (inner + LANES - 1) // LANES
    program = tl.program_id(0).to(tl.int64)
    lane = program % blocks * LANES + tl.arange(0, LANES)
    return program // blocks * columns * inner + lane, lane < inner


@triton.jit
def forward_columns(
    output_ptr, input_ptr, columns, inner, LOG: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr
):
    """A program for LANES rows whose elements are `inner` apart; both tensors are contiguous."""
    PRECISE: tl.constexpr = output_ptr.dtype.element_ty == tl.float32
    first, inside = _lanes(columns, inner, LANES)
    top = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[:, None]
        x = tl.load(
            input_ptr + first[None, :] + column.to(tl.int64) * inner,
            mask=(column < columns) & inside[None, :],
            other=float("-inf"),
        )
        top, total = add_exponentials(top, total, x.to(tl.float32))
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[:, None]
        place = first[None, :] + column.to(tl.int64) * inner
        there = (column < columns) & inside[None, :]
        x = tl.load(input_ptr + place, mask=there, other=0.0).to(tl.float32) - top[None, :]
        if LOG:
            y = x - tl.log(total)[None, :]
        else:
            y = _quotient(_exponentials(x, PRECISE), total[None, :], PRECISE)
        tl.store(output_ptr + place, y, mask=there)


@triton.jit
def backward_columns(
    grad_input_ptr, grad_ptr, output_ptr, columns, inner,
    LOG: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = output_ptr.dtype.element_ty == tl.float32
    first, inside = _lanes(columns, inner, LANES)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[:, None]
        place = first[None, :] + column.to(tl.int64) * inner
        there = (column < columns) & inside[None, :]
        term = tl.load(grad_ptr + place, mask=there, other=0.0).to(tl.float32)
        if not LOG:
            term *= tl.load(output_ptr + place, mask=there, other=0.0).to(tl.float32)
        total += tl.sum(term, 0)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[:, None]
        place = first[None, :] + column.to(tl.int64) * inner
        there = (column < columns) & inside[None, :]
        grad = tl.load(grad_ptr + place, mask=there, other=0.0).to(tl.float32)
        y = tl.load(output_ptr + place, mask=there, other=0.0).to(tl.float32)
        tl.store(grad_input_ptr + place, _gradient(grad, y, total[None, :], 1.0, LOG, False, PRECISE), mask=there)
