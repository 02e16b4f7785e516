"""Device code of decoding: attention of a tile of query rows over a stretch of the cache, what puts the stretches of a
sequence together, and what appends to the cache.

A row is a query of one head; those of all heads that share keys are neighbours: row = query * group + head in the
group. Whatever the tensors of lengths, rows and pages say, memory outside of the cache is not touched: lengths are
clamped, keys in rows or pages that do not exist are not seen.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.gpu.functions import LN2, LOG2E, tanh

#: Stretches begin at multiples of this many slots, and tiles of keys divide it.
GRAIN = tl.constexpr(128)
#: Sequences whose lengths are compared at a time.
BATCHES = tl.constexpr(1024)


@triton.jit
def _keys(b, inside, seqlens_ptr, leftpad_ptr, capacity, appended):
    """(begin, end), int32: where the keys of sequence b are."""
    end = tl.zeros_like(b).to(tl.int64)
    if seqlens_ptr is None:
        end += capacity
    else:
        length = tl.load(seqlens_ptr + b, mask=inside, other=0).to(tl.int64)
        tl.device_assert((length >= 0) & (length + appended <= capacity), "decode: a length outside of the cache")
        end += tl.minimum(tl.minimum(tl.maximum(length, 0), capacity) + appended, capacity)
    begin = tl.zeros_like(end)
    if leftpad_ptr is not None:
        padding = tl.load(leftpad_ptr + b, mask=inside, other=0).to(tl.int64)
        tl.device_assert((padding >= 0) & (padding <= end), "decode: left padding outside of the sequence")
        begin += tl.minimum(tl.maximum(padding, 0), end)
    return begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def _clamp(position, begin, end):
    return tl.minimum(tl.maximum(position, begin), end).to(tl.int32)


@triton.jit
def _stretches(
    b, seqlens_ptr, leftpad_ptr, capacity, appended, batch, queries, left, right, shortest, parts,
    COMPARE: tl.constexpr,
):  # fmt: skip
    """(begin, end, first, length, count) of sequence b: its keys are cut into `count` stretches of `length` slots, the
    first one being number `first` from the beginning of the cache.

    A stretch has at least `shortest` slots, and there are at most `parts` (one more where the keys begin within one):
    of the keys that some query sees, or, with COMPARE, of those of the longest sequence.
    """
    begin, end = _keys(b, b < batch, seqlens_ptr, leftpad_ptr, capacity, appended)
    last = end.to(tl.int64) - 1
    low = _clamp(last - (queries - 1) - left, begin, end)
    high = _clamp(last + right + 1, begin, end)
    keys = high - low
    if COMPARE:
        keys = 0
        for start in range(0, batch, BATCHES):
            several = start + tl.arange(0, BATCHES)
            begins, ends = _keys(several, several < batch, seqlens_ptr, leftpad_ptr, capacity, appended)
            keys = tl.maximum(keys, tl.max(tl.where(several < batch, ends - begins, 0), 0))
    length = tl.maximum(tl.cdiv(tl.cdiv(keys, parts), GRAIN) * GRAIN, shortest)
    first = low // length
    count = tl.where(high > low, tl.cdiv(high, length) - first, 0)
    return begin, end, first, length, count


@triton.jit
def _page(table_ptr, index, inside, cache_rows):
    """(page, whether there is such a page), int64."""
    page = tl.load(table_ptr + index, mask=inside, other=0)
    exists = (page >= 0) & (page < cache_rows)
    tl.device_assert(exists | (inside == 0), "decode: a page outside of the cache")
    return page.to(tl.int64), exists


@triton.jit
def _row(b, batch_idx_ptr, cache_rows):
    """(row of the cache, whether there is such a row), int64."""
    if batch_idx_ptr is None:
        row = b.to(tl.int64)
    else:
        row = tl.load(batch_idx_ptr + b).to(tl.int64)
    exists = (row >= 0) & (row < cache_rows)
    tl.device_assert(exists, "decode: a row outside of the cache")
    return row, exists


@triton.jit
def _lse_of(partial_ptr, rows, splits, VALUE_DIM: tl.constexpr):
    """Where the partial lse are: behind the partial sums of all (sequence, kv head), stretches and rows."""
    return partial_ptr + tl.num_programs(0).to(tl.int64) * splits * rows * VALUE_DIM


@triton.jit
def _row_of_query(query_ptr, b, row, rows, query_batch, query_row, query_head, kv_head, group, d, DIM: tl.constexpr):
    """One row of query, float32, from the first cache but for its first time."""
    at = b.to(tl.int64) * query_batch + (row // group).to(tl.int64) * query_row
    at += (kv_head * group + row % group).to(tl.int64) * query_head
    return tl.load(query_ptr + at + d, mask=(d < DIM) & (row < rows), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["batch", "capacity", "appended", "left", "right", "shortest", "parts", "cache_rows"])
def attend(
    output_ptr, lse_ptr, partial_ptr, query_ptr, key_ptr, value_ptr, seqlens_ptr, leftpad_ptr, batch_idx_ptr,
    table_ptr, slopes_ptr, query_batch, query_row, query_head, key_row, key_slot, key_head, value_row,
    value_slot, value_head, table_row, slopes_batch, batch, queries, group, kv_heads, cache_rows, capacity, appended,
    left, right, factor, cap, shortest, parts,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, PLAIN: tl.constexpr, SOFTCAP: tl.constexpr, COMPARE: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The rows of a tile over one stretch. D, DV: powers of two that hold DIM and VALUE_DIM; PAGE: 0, not paged.

    Powers are of two: scores are factor * Q K^T, with SOFTCAP cap * tanh(factor * Q K^T), and what is last has log2(e)
    in it. PLAIN scores, of a positive factor and with nothing else, are multiplied by it after the maximum is
    subtracted, which costs large ones no digits. Fewer than 16 ROWS are multiplied one by one, in float32.
    """
    FEW: tl.constexpr = ROWS < 16
    b, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    begin, end, first, length, count = _stretches(
        b, seqlens_ptr, leftpad_ptr, capacity, appended, batch, queries, left, right, shortest, parts, COMPARE
    )
    number = tl.program_id(1)
    if number >= tl.maximum(count, 1):
        return
    rows = queries * group
    first_row = tl.program_id(2) * ROWS
    row = first_row + tl.arange(0, ROWS)
    i, head = row // group, kv_head * group + row % group
    position = i + (end - queries)

    # The slots that some row of the tile sees in this stretch.
    start, stop = tl.maximum(begin, (first + number) * length), tl.minimum(end, (first + number + 1) * length)
    if WINDOW:
        earliest = (first_row // group).to(tl.int64) + (end - queries) - left
        latest = tl.minimum((first_row + ROWS - 1) // group, queries - 1).to(tl.int64) + (end - queries) + right
        start, stop = _clamp(earliest, start, stop), _clamp(latest + 1, start, stop)
    cache_row = b.to(tl.int64)
    if PAGE == 0:
        cache_row, exists = _row(b, batch_idx_ptr, cache_rows)
        stop = tl.where(exists, stop, start)

    d, dv = tl.arange(0, D), tl.arange(0, DV)
    key_ptr += kv_head.to(tl.int64) * key_head
    value_ptr += kv_head.to(tl.int64) * value_head
    if PAGE == 0:
        key_ptr += cache_row * key_row
        value_ptr += cache_row * value_row
    else:
        table_ptr += b.to(tl.int64) * table_row
    if not FEW:
        query_at = b.to(tl.int64) * query_batch + i.to(tl.int64) * query_row + head.to(tl.int64) * query_head
        query = tl.load(
            query_ptr + query_at[:, None] + d[None, :], mask=(row < rows)[:, None] & (d < DIM)[None, :], other=0.0
        )
    slope = tl.zeros([ROWS], tl.float32)
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + b.to(tl.int64) * slopes_batch + head, mask=row < rows, other=0.0) * LOG2E

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DV], tl.float32)
    for tile in tl.range(start // KEYS * KEYS, stop, KEYS, num_stages=STAGES):
        slot = tile + tl.arange(0, KEYS)
        seen = (slot >= start) & (slot < stop)
        if PAGE == 0:
            key_at, value_at = slot.to(tl.int64) * key_slot, slot.to(tl.int64) * value_slot
        else:
            if PAGE % KEYS == 0:  # one page holds the tile
                page, exists = _page(table_ptr, tile // PAGE, tile < stop, cache_rows)
                within = tile % PAGE + tl.arange(0, KEYS)
            else:
                page, exists = _page(table_ptr, slot // PAGE, seen, cache_rows)
                within = slot % PAGE
            seen = seen & exists
            key_at = page * key_row + within.to(tl.int64) * key_slot
            value_at = page * value_row + within.to(tl.int64) * value_slot
        key_mask, value_mask = seen[:, None], seen[:, None]
        if D != DIM:
            key_mask = key_mask & (d < DIM)[None, :]
        if DV != VALUE_DIM:
            value_mask = value_mask & (dv < VALUE_DIM)[None, :]
        key = tl.load(key_ptr + key_at[:, None] + d[None, :], mask=key_mask, other=0.0)
        value = tl.load(value_ptr + value_at[:, None] + dv[None, :], mask=value_mask, other=0.0)

        if FEW:
            key = key.to(tl.float32)
            scores = tl.zeros([ROWS, KEYS], tl.float32)
            for r in tl.static_range(ROWS):
                this = _row_of_query(query_ptr, b, first_row + r, rows, query_batch, query_row, query_head, kv_head,
                                     group, d, DIM)  # fmt: skip
                scores = tl.where((row == first_row + r)[:, None], tl.sum(key * this[None, :], 1)[None, :], scores)
        else:
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if SOFTCAP:
            scores = tanh(scores * factor) * cap
        elif not PLAIN:
            scores = scores * factor
        visible = seen[None, :]
        if WINDOW or slopes_ptr is not None:
            distance = slot[None, :] - position[:, None]
            if WINDOW:
                visible = visible & (distance >= -left) & (distance <= right)
            if slopes_ptr is not None:
                scores = scores - slope[:, None] * tl.abs(distance).to(tl.float32)
        scores = tl.where(visible, scores, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        scores, change = scores - base[:, None], maximum - base
        if PLAIN:
            scores, change = scores * factor, change * factor
        weights, rescale = tl.exp2(scores), tl.exp2(change)
        total = total * rescale + tl.sum(weights, 1)
        sums = sums * rescale[:, None]
        if FEW:
            value = value.to(tl.float32)
            for r in tl.static_range(ROWS):
                this = (row == first_row + r)[:, None]
                weight = tl.sum(tl.where(this, weights, 0.0), 0)
                sums += tl.where(this, tl.sum(weight[:, None] * value, 0)[None, :], 0.0)
        else:
            sums = tl.dot(weights.to(value.dtype), value, sums, input_precision="ieee")
        maximum = highest

    if PLAIN:
        maximum = maximum * factor
    sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = tl.where(total == 0.0, float("-inf"), maximum + tl.log2(total))
    column = dv[None, :]
    inside = (row < rows)[:, None] & (column < VALUE_DIM)
    pair = tl.program_id(0).to(tl.int64)
    if SPLIT:  # noqa: SIM102 - a constant with `and` is none
        if count > 1:
            at = (pair * tl.num_programs(1) + number) * rows + row
            tl.store(partial_ptr + at[:, None] * VALUE_DIM + column, sums, mask=inside)
            tl.store(_lse_of(partial_ptr, rows, tl.num_programs(1), VALUE_DIM) + at, lse, mask=row < rows)
            return
    heads = kv_heads * group
    at = (b.to(tl.int64) * queries + i) * heads + head
    tl.store(output_ptr + at[:, None] * VALUE_DIM + column, sums, mask=inside)
    tl.store(lse_ptr + (b.to(tl.int64) * heads + head) * queries + i, lse * LN2, mask=row < rows)


@triton.jit(do_not_specialize=["batch", "capacity", "appended", "left", "right", "shortest", "parts", "splits"])
def combine(
    output_ptr, lse_ptr, partial_ptr, seqlens_ptr, leftpad_ptr, batch, queries, group, kv_heads,
    capacity, appended, left, right, shortest, parts, splits,
    VALUE_DIM: tl.constexpr, DV: tl.constexpr, COMPARE: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The rows of a tile: their stretches weighted by exp(lse), SPLITS at a time, in their order."""
    b, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    _begin, _end, _first, _length, count = _stretches(
        b, seqlens_ptr, leftpad_ptr, capacity, appended, batch, queries, left, right, shortest, parts, COMPARE
    )
    if count <= 1:  # then whoever attended has finished
        return
    rows = queries * group
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DV)
    inside = (row < rows)[:, None] & (column < VALUE_DIM)[None, :]
    first_at = tl.program_id(0).to(tl.int64) * splits * rows
    partial_lse_ptr = _lse_of(partial_ptr, rows, splits, VALUE_DIM)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DV], tl.float32)
    for start in range(0, count, SPLITS):
        number = start + tl.arange(0, SPLITS)
        at = first_at + number.to(tl.int64)[:, None] * rows + row[None, :]
        there = (number < count)[:, None] & (row < rows)[None, :]
        lse = tl.load(partial_lse_ptr + at, mask=there, other=float("-inf"))
        highest = tl.maximum(maximum, tl.max(lse, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(lse - base[None, :])
        rescale = tl.exp2(maximum - base)
        partial = tl.load(
            partial_ptr + at[:, :, None] * VALUE_DIM + column[None, None, :],
            mask=there[:, :, None] & inside[None, :, :],
            other=0.0,
        )
        total = total * rescale + tl.sum(weights, 0)
        sums = sums * rescale[:, None] + tl.sum(weights[:, :, None] * partial, 0)
        maximum = highest
    sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = tl.where(total == 0.0, float("-inf"), maximum + tl.log2(total))
    heads = kv_heads * group
    i, head = row // group, kv_head * group + row % group
    at = (b.to(tl.int64) * queries + i) * heads + head
    tl.store(output_ptr + at[:, None] * VALUE_DIM + column[None, :], sums, mask=inside)
    tl.store(lse_ptr + (b.to(tl.int64) * heads + head) * queries + i, lse * LN2, mask=row < rows)


@triton.jit(do_not_specialize=["capacity", "cache_rows", "blocks"])
def append(
    key_cache_ptr, value_cache_ptr, key_ptr, value_ptr, seqlens_ptr, batch_idx_ptr, table_ptr, key_cache_row,
    key_cache_slot, key_cache_head, value_cache_row, value_cache_slot, value_cache_head, key_batch, key_row, key_head,
    value_batch, value_row, value_head, table_row, new, kv_heads, cache_rows, capacity, blocks,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Copies a tile of new keys and values, rows being heads of one after another, to where they belong. What does not
    fit is left away."""
    b = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    i, head = row // kv_heads, (row % kv_heads).to(tl.int64)
    length = tl.load(seqlens_ptr + b).to(tl.int64)
    tl.device_assert((length >= 0) & (length + new <= capacity), "decode: new keys that do not fit into the cache")
    slot = length + i
    inside = (row < new * kv_heads) & (length >= 0) & (length <= capacity) & (slot < capacity)
    b = b.to(tl.int64)
    if PAGE == 0:
        cache_row, exists = _row(b, batch_idx_ptr, cache_rows)
        inside = inside & exists
    else:
        cache_row, exists = _page(table_ptr + b * table_row, slot // PAGE, inside, cache_rows)
        inside = inside & exists
        slot = slot % PAGE
    i = i.to(tl.int64)
    d, dv = tl.arange(0, D)[None, :], tl.arange(0, DV)[None, :]
    from_at, to_at = b * key_batch + i * key_row + head * key_head, slot * key_cache_slot + head * key_cache_head
    to_at += cache_row * key_cache_row
    mask = inside[:, None] & (d < DIM)
    key = tl.load(key_ptr + from_at[:, None] + d, mask=mask)
    tl.store(key_cache_ptr + to_at[:, None] + d, key, mask=mask)
    from_at, to_at = b * value_batch + i * value_row + head * value_head, slot * value_cache_slot
    to_at += head * value_cache_head + cache_row * value_cache_row
    mask = inside[:, None] & (dv < VALUE_DIM)
    value = tl.load(value_ptr + from_at[:, None] + dv, mask=mask)
    tl.store(value_cache_ptr + to_at[:, None] + dv, value, mask=mask)
