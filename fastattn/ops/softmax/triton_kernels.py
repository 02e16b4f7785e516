"""Device code of softmax and log_softmax: rows in registers, longer rows read twice, rows across memory."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.gpu.functions import (
    add_exponentials,
    combine_exponentials,
    exponentials,
    fill,
    last_tile,
    no_exponentials,
    row_tile,
)

#: What is no reason for another compilation: nothing is loaded faster for knowing it.
SIZES = ["rows", "rows_per_matrix", "diagonal", "size0", "size1", "size2"]


@triton.jit
def _mask_offset(row, size0, size1, size2, stride0, stride1, stride2, stride3):
    """Where a row's mask begins; the innermost of the dimensions that rows were made of comes first."""
    offset = row % size0 * stride0
    row = row // size0
    offset += row % size1 * stride1
    row = row // size1
    return offset + row % size2 * stride2 + row // size2 * stride3


@triton.jit
def _limit(row, rows_per_matrix, diagonal):
    """The columns of a row before this one are visible under a causal limit, as far as there are any."""
    return (row % rows_per_matrix + diagonal).to(tl.int32)


@triton.jit
def _nearly(limit):
    """Up to 15 more than the limit, so that what is loaded ends where 16 bytes do."""
    return (limit + 15) // 16 * 16


@triton.jit
def _within(limit, columns):
    return tl.maximum(tl.minimum(limit, columns), 0)


@triton.jit
def _scores(input_ptr, mask_ptr, scale, loaded, visible, MASK: tl.constexpr, KEEP: tl.constexpr):
    """scale * input + mask, -inf where nothing is visible. MASK: 0 for none, 1 for bool, 2 for one that is added.
    KEEP: how long caches should: Triton's eviction policy."""
    x = tl.load(input_ptr, mask=loaded, other=0.0, eviction_policy=KEEP).to(tl.float32) * scale
    if MASK == 1:
        visible = visible & (tl.load(mask_ptr, mask=loaded, other=0) != 0)
    if MASK == 2:
        x += tl.load(mask_ptr, mask=loaded, other=0.0).to(tl.float32)
    return tl.where(visible, x, float("-inf"))


@triton.jit
def _result(x, total, LOG: tl.constexpr, HIDES: tl.constexpr, PRECISE: tl.constexpr):
    """Of x relative to the row's maximum, by the row's sum of exponentials. HIDES: there may be rows that see nothing:
    0 / 1, or -inf - log(1)."""
    if HIDES:
        total = tl.where(total == 0.0, 1.0, total)
    if LOG:
        return x - tl.log(total)
    else:
        inverse = tl.div_rn(1.0, total)
        e = exponentials(x, PRECISE)
        y = e * inverse
        if PRECISE:  # the reciprocal to twice the digits
            y += e * (tl.fma(-total, inverse, 1.0) * inverse)
        return y


@triton.jit(do_not_specialize=SIZES)
def forward_rows(
    output_ptr, input_ptr, input_stride, scale, rows, columns, rows_per_matrix, diagonal,
    mask_ptr, size0, size1, size2, stride0, stride1, stride2, stride3, mask_step,
    LOG: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program for ROWS whole rows."""
    PRECISE: tl.constexpr = output_ptr.dtype.element_ty == tl.float32
    HIDES: tl.constexpr = MASK != 0 or CAUSAL
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    loaded = inside
    visible = inside
    if CAUSAL:
        limit = _limit(row, rows_per_matrix, diagonal)
        loaded = inside & (column < _nearly(limit))
        visible = inside & (column < limit)
    if MASK != 0:
        mask_ptr += _mask_offset(row, size0, size1, size2, stride0, stride1, stride2, stride3) + column * mask_step
    x = _scores(input_ptr + row * input_stride + column, mask_ptr, scale, loaded, visible, MASK, "")
    top = tl.max(x, 1)[:, None]
    if HIDES:
        top = tl.where(top == float("-inf"), 0.0, top)
    x -= top
    total = tl.sum(exponentials(x, PRECISE and not LOG), 1)[:, None]
    y = _result(x, total, LOG, HIDES, PRECISE)
    if CAUSAL:
        y = tl.where(visible, y, float("-inf") if LOG else 0.0)
    tl.store(output_ptr + row * columns + column, y, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def forward_long(
    output_ptr, input_ptr, input_stride, scale, rows, columns, rows_per_matrix, diagonal,
    mask_ptr, size0, size1, size2, stride0, stride1, stride2, stride3, mask_step,
    LOG: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program for a row that is read twice, the second time from its end, which is still in the caches."""
    PRECISE: tl.constexpr = output_ptr.dtype.element_ty == tl.float32
    HIDES: tl.constexpr = MASK != 0 or CAUSAL
    TILE: tl.constexpr = PARTS * LANES
    row = tl.program_id(0).to(tl.int64)
    input_ptr += row * input_stride
    output_ptr += row * columns
    if MASK != 0:
        mask_ptr += _mask_offset(row, size0, size1, size2, stride0, stride1, stride2, stride3)
    limit = columns
    if CAUSAL:
        limit = _within(_limit(row, rows_per_matrix, diagonal), columns)
    near = tl.minimum(_nearly(limit), columns) if CAUSAL else columns
    place = row_tile(PARTS, LANES)
    top, total = no_exponentials(LANES)
    for start in range(0, limit, TILE):
        column = start + place
        loaded, visible = column < near, column < limit
        x = _scores(input_ptr + column, mask_ptr + column * mask_step, scale, loaded, visible, MASK, "evict_last")
        top, total = add_exponentials(top, total, x)
    highest, whole = combine_exponentials(top, total)
    last = last_tile(limit, TILE)
    for back in range(0, limit, TILE):
        column = last - back + place
        loaded, visible = column < near, column < limit
        x = _scores(input_ptr + column, mask_ptr + column * mask_step, scale, loaded, visible, MASK, "evict_first")
        y = _result(x - highest, whole, LOG, HIDES, PRECISE)
        if CAUSAL:
            y = tl.where(visible, y, float("-inf") if LOG else 0.0)
        tl.store(output_ptr + column, y, mask=column < columns)
    if CAUSAL:
        fill(output_ptr, float("-inf") if LOG else 0.0, last + TILE, columns, PARTS, LANES)


@triton.jit
def _results(grad_ptr, output_ptr, grad_there, there, LOG: tl.constexpr, KEEP: tl.constexpr):
    """(their gradients, results), float32; a result that is not there is that of what is hidden."""
    grad = tl.load(grad_ptr, mask=grad_there, other=0.0, eviction_policy=KEEP)
    y = tl.load(output_ptr, mask=there, other=float("-inf") if LOG else 0.0, eviction_policy=KEEP)
    return grad.to(tl.float32), y.to(tl.float32)


@triton.jit
def _summand(grad, y, LOG: tl.constexpr):
    """What a row's total in `_gradient` is the sum of."""
    return grad if LOG else grad * y


@triton.jit
def _gradient(grad, y, total, scale, LOG: tl.constexpr, HIDES: tl.constexpr, PRECISE: tl.constexpr):
    """Of scale * x. HIDES: there may be columns that nobody sees."""
    if LOG:
        found = grad - exponentials(y, PRECISE) * total
        if HIDES:
            found = tl.where(y == float("-inf"), 0.0, found)
    else:
        found = y * (grad - total)
    return found * scale


@triton.jit(do_not_specialize=SIZES[:3])
def backward_rows(
    grad_input_ptr, grad_ptr, grad_stride, output_ptr, output_stride, scale, rows, columns, rows_per_matrix, diagonal,
    LOG: tl.constexpr, HIDES: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = output_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    loaded = inside
    if CAUSAL:  # beyond the limit y is 0, or -inf
        loaded = inside & (column < _nearly(_limit(row, rows_per_matrix, diagonal)))
    # What flows into a hidden -inf counts, too: the sum is over the whole row.
    grad, y = _results(
        grad_ptr + row * grad_stride + column, output_ptr + row * output_stride + column, inside if LOG else loaded,
        loaded, LOG, "",
    )  # fmt: skip
    total = tl.sum(_summand(grad, y, LOG), 1)[:, None]
    found = _gradient(grad, y, total, scale, LOG, HIDES, PRECISE)
    tl.store(grad_input_ptr + row * columns + column, found, mask=inside)


@triton.jit(do_not_specialize=SIZES[:3])
def backward_long(
    grad_input_ptr, grad_ptr, grad_stride, output_ptr, output_stride, scale, rows, columns, rows_per_matrix, diagonal,
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
        limit = _within(_nearly(_limit(row, rows_per_matrix, diagonal)), columns)
    place = row_tile(PARTS, LANES)
    end = columns if LOG else limit  # what flows into a hidden -inf counts
    sums = tl.zeros((LANES,), tl.float32)
    for start in range(0, end, TILE):
        column = start + place
        there = column < end
        grad, y = _results(grad_ptr + column, output_ptr + column, there, there, LOG, "evict_last")
        sums += tl.sum(_summand(grad, y, LOG), 0)
    total = tl.sum(sums, 0)
    last = last_tile(limit, TILE)
    for back in range(0, limit, TILE):
        column = last - back + place
        there = column < limit
        grad, y = _results(grad_ptr + column, output_ptr + column, there, there, LOG, "evict_first")
        found = _gradient(grad, y, total, scale, LOG, HIDES, PRECISE)
        tl.store(grad_input_ptr + column, found, mask=column < columns)
    if CAUSAL:
        fill(grad_input_ptr, 0.0, last + TILE, columns, PARTS, LANES)


@triton.jit
def _lanes(columns, inner, LANES: tl.constexpr):
    """(offset of the first element of each lane's row, whether there is such a row): `inner` rows lie side by side."""
    blocks = (inner + LANES - 1) // LANES
    program = tl.program_id(0).to(tl.int64)
    lane = program % blocks * LANES + tl.arange(0, LANES)
    return program // blocks * columns * inner + lane, lane < inner


@triton.jit
def _lanes_tile(first, inside, start, columns, inner, COLUMNS: tl.constexpr):
    """(offsets, whether they are inside) of COLUMNS elements of each lane's row, (COLUMNS, LANES)."""
    column = start + tl.arange(0, COLUMNS)[:, None]
    return first[None, :] + column.to(tl.int64) * inner, (column < columns) & inside[None, :]


@triton.jit
def forward_columns(
    output_ptr, input_ptr, columns, inner, LOG: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr
):
    """A program for LANES rows whose elements are `inner` apart; both tensors are contiguous."""
    PRECISE: tl.constexpr = output_ptr.dtype.element_ty == tl.float32
    first, inside = _lanes(columns, inner, LANES)
    top, total = no_exponentials(LANES)
    for start in range(0, columns, COLUMNS):
        place, there = _lanes_tile(first, inside, start, columns, inner, COLUMNS)
        x = tl.load(input_ptr + place, mask=there, other=float("-inf")).to(tl.float32)
        top, total = add_exponentials(top, total, x)
    for start in range(0, columns, COLUMNS):
        place, there = _lanes_tile(first, inside, start, columns, inner, COLUMNS)
        x = tl.load(input_ptr + place, mask=there, other=0.0).to(tl.float32)
        tl.store(output_ptr + place, _result(x - top[None, :], total[None, :], LOG, False, PRECISE), mask=there)


@triton.jit
def backward_columns(
    grad_input_ptr, grad_ptr, output_ptr, columns, inner,
    LOG: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = output_ptr.dtype.element_ty == tl.float32
    first, inside = _lanes(columns, inner, LANES)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, columns, COLUMNS):
        place, there = _lanes_tile(first, inside, start, columns, inner, COLUMNS)
        grad, y = _results(grad_ptr + place, output_ptr + place, there, there, LOG, "")
        total += tl.sum(_summand(grad, y, LOG), 0)
    for start in range(0, columns, COLUMNS):
        place, there = _lanes_tile(first, inside, start, columns, inner, COLUMNS)
        grad, y = _results(grad_ptr + place, output_ptr + place, there, there, LOG, "")
        tl.store(grad_input_ptr + place, _gradient(grad, y, total[None, :], 1.0, LOG, False, PRECISE), mask=there)
