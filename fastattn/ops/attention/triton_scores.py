"""Device code that all of attention's kernels share: which task a program has, whom it sees, what the scores are.

Tiles have a row per query and a column per key, or the other way round: `row` and `column` are index tiles that
broadcast, (ROWS, 1) and (1, COLUMNS) or transposed. Indices count from the start of the sequence and fit 32 bits;
what is added to a pointer has 64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.gpu.functions import keep_tile, tanh
from fastattn.ops.attention import triton_features as features

RIGHT = tl.constexpr(features.RIGHT)
LEFT = tl.constexpr(features.LEFT)
PREFIX = tl.constexpr(features.PREFIX)
DOCUMENTS = tl.constexpr(features.DOCUMENTS)
BOOL_MASK = tl.constexpr(features.BOOL_MASK)
ADDITIVE_MASK = tl.constexpr(features.ADDITIVE_MASK)
SOFTCAP = tl.constexpr(features.SOFTCAP)
ALIBI = tl.constexpr(features.ALIBI)
SINKS = tl.constexpr(features.SINKS)
DROPOUT = tl.constexpr(features.DROPOUT)
PACKED = tl.constexpr(features.PACKED)
FOLDED = tl.constexpr(features.FOLDED)
GRAD_LSE = tl.constexpr(features.GRAD_LSE)
REST = tl.constexpr(features.REST)

#: Features under which any block may be dead or half alive, and under which any may be but for position.
MASKS = tl.constexpr(features.BOOL_MASK | features.ADDITIVE_MASK)
TESTED = tl.constexpr(features.BOOL_MASK | features.ADDITIVE_MASK | features.DOCUMENTS)

#: Columns of a product's parts.
PART = tl.constexpr(32)

LEAST = tl.constexpr(-(2**63))
MOST = tl.constexpr(2**63 - 1)


@triton.jit
def wide(number):
    """As int64; also where it is a plain number to the interpreter."""
    return tl.full((), 0, tl.int64) + number


@triton.jit
def tile_at(pointer, stride, rows, count, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """(len(rows), BLOCK) of a matrix; 0 from row `count` and from column DIM on."""
    return _part_at(pointer, stride, rows, count, 0, DIM, BLOCK, BLOCK)


@triton.jit
def _part_at(pointer, stride, rows, count, first, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """(len(rows), WIDTH) of such a tile, from column `first` on.

    Addresses are formed anew from 32 bits, one multiplication each: as offsets that are kept they would be registers.
    """
    column = first + tl.arange(0, WIDTH)
    address = pointer + (rows.to(tl.int64) * stride)[:, None] + column[None, :]
    if BLOCK == DIM:
        return tl.load(address, mask=(rows < count)[:, None], other=0.0)
    else:
        return tl.load(address, mask=(rows < count)[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def product(
    a, a_ptr, a_stride, a_rows, a_count, b, b_ptr, b_stride, b_rows, b_count, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """a b^T of two tiles (tile_at of what follows each).

    Without tensor cores a thread has whole rows of both in registers: wide ones of float32 are read again, in parts.
    """
    if a.dtype == tl.float32 and BLOCK > PART:
        total = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
        for first in range(0, BLOCK, PART):
            a_part = _part_at(a_ptr, a_stride, a_rows, a_count, first, DIM, BLOCK, PART)
            b_part = _part_at(b_ptr, b_stride, b_rows, b_count, first, DIM, BLOCK, PART)
            total = tl.dot(a_part, tl.trans(b_part), total, input_precision="ieee")
        return total
    else:
        return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def put_tile(pointer, stride, rows, count, values, DIM: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = (rows < count)[:, None] & (column < DIM)[None, :]
    address = pointer + (rows.to(tl.int64) * stride)[:, None] + column[None, :]
    tl.store(address, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def task(blocks, lanes, group):
    """(block, lane) of this program: all blocks of `group` lanes, block after block, then those of the next lanes.

    So the longest blocks start first, if blocks are numbered so, and what runs at a time shares few lanes' keys.
    """
    program = tl.program_id(0)
    first = program // (group * blocks) * group
    inside = program % (group * blocks)
    width = tl.minimum(lanes - first, group)
    return inside // width, first + inside % width


@triton.jit
def _bound(bounds_ptr, index, there, rows):
    """An element of cu_seqlens, within the rows whatever it says."""
    return tl.minimum(tl.maximum(tl.load(bounds_ptr + index, mask=there, other=0), 0), rows).to(tl.int32)


@triton.jit
def packed_tile(bounds_ptr, tile, sequences, rows, ROWS: tl.constexpr):
    """Which rows a tile has: (number of its sequence, where that starts, how long it is, the tile's first row in it).

    Number 0 are rows before the first sequence, `sequences` + 1 those behind the last. What starts at row r as number
    n has its tiles from r // ROWS + n on: enough room for every one, and known without a sum over those before.
    """
    number = 0
    for first in range(0, sequences + 1, 128):
        index = first + tl.arange(0, 128)
        starts = _bound(bounds_ptr, index, index <= sequences, rows) // ROWS + index + 1
        number += tl.sum(((starts <= tile) & (index <= sequences)).to(tl.int32))
    start = _bound(bounds_ptr, number - 1, number > 0, rows)
    end = tl.where(number > sequences, rows, _bound(bounds_ptr, number, number <= sequences, rows))
    return number, start, tl.maximum(end - start, 0), (tile - start // ROWS - number) * ROWS


@triton.jit
def packed_other(bounds_ptr, number, sequences, rows):
    """(where a sequence starts, how long it is) on the other side; rows of no sequence meet nothing."""
    real = (number > 0) & (number <= sequences)
    start = _bound(bounds_ptr, number - 1, real, rows)
    return start, tl.maximum(_bound(bounds_ptr, number, real, rows) - start, 0)


@triton.jit
def used_keys(used_ptr, number, sequences, room):
    if used_ptr is None:
        return room
    else:
        real = (number > 0) & (number <= sequences)
        used = tl.load(used_ptr + number - 1, mask=real, other=0)
        return tl.minimum(tl.maximum(used, 0), room).to(tl.int32)


@triton.jit
def query_program(
    blocks, lanes, group, queries, keys, shift, heads, cu_queries_ptr, cu_keys_ptr, used_ptr, sequences,
    FEATURES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What a program for a block of queries works on: (head, element of the batch, lane of dropout, base, number of the
    sequence, its queries, its keys, their shift, where its queries and its keys start among the rows, first row of
    the block). base: the element of the batch that addresses are made of; packed rows are one.

    The last blocks come first: under causality they see the most keys.
    """
    block, lane = task(blocks, lanes, group)
    block = blocks - 1 - block
    head = lane % heads
    batch = lane // heads
    if PACKED & FEATURES:
        ends = tl.load(cu_queries_ptr + sequences) <= queries, tl.load(cu_keys_ptr + sequences) <= keys
        tl.device_assert(ends[0], "attention_varlen: cu_seq_q leaves the rows")
        tl.device_assert(ends[1], "attention_varlen: cu_seq_k leaves the rows")
        number, query_start, queries, first_row = packed_tile(cu_queries_ptr, block, sequences, queries, ROWS)
        key_start, room = packed_other(cu_keys_ptr, number, sequences, keys)
        keys = used_keys(used_ptr, number, sequences, room)
        batch = tl.maximum(number - 1, 0)
        lane = (number - 1) * heads + head
        base = tl.full((), 0, tl.int64)
        return head, batch, lane, base, number, queries, keys, keys - queries, query_start, key_start, first_row
    else:
        return head, batch, lane, wide(batch), 0, queries, keys, shift, 0, 0, block * ROWS


@triton.jit
def placed(pointer, base, batch_stride, head, head_stride, start, row_stride):
    """A tensor's pointer at a head of an element of the batch, at the row where a sequence starts."""
    return pointer + (base * batch_stride + wide(head) * head_stride + wide(start) * row_stride)


@triton.jit
def slope_of(slopes_ptr, slopes_batch, batch, head, FEATURES: tl.constexpr):
    if ALIBI & FEATURES:
        return tl.load(slopes_ptr + batch * slopes_batch + head).to(tl.float32)
    else:
        return 0.0


@triton.jit
def ids_of(ids_ptr, offset, rows, count, FEATURES: tl.constexpr):
    """(documents of rows, the smallest and the largest of those that are there)."""
    if DOCUMENTS & FEATURES:
        there = rows < count
        ids = tl.load(ids_ptr + offset + rows, mask=there, other=0)
        least = tl.min(tl.where(there, ids.to(tl.int64), MOST), 0)
        return ids, least, tl.max(tl.where(there, ids.to(tl.int64), LEAST), 0)
    else:
        return rows, 0, 0


@triton.jit
def prefix_of(prefix_ptr, prefix_stride, batch, keys, FEATURES: tl.constexpr):
    """How many keys all queries see, whatever their positions."""
    if PREFIX & FEATURES:
        prefix = tl.load(prefix_ptr + batch * prefix_stride)
        tl.device_assert((prefix >= 0) & (prefix <= keys), "attention: prefix_len must be in [0, keys]")
        return tl.minimum(tl.maximum(prefix, 0), keys).to(tl.int32)
    else:
        return 0


@triton.jit
def nth_block(t, ahead, begin, FEATURES: tl.constexpr):
    """The t-th block of a loop over 0 .. ahead - 1 and then `begin` and what follows; t where nothing is ahead."""
    if (PREFIX & FEATURES) and (LEFT & FEATURES):
        return tl.where(t < ahead, t, begin + t - ahead)
    else:
        return t


@triton.jit
def key_blocks(first, last, keys, shift, left, right, prefix, low, high, FEATURES: tl.constexpr, COLUMNS: tl.constexpr):
    """Which blocks of keys the queries first .. last (included) have to do with, and which of them they see whole.

    (first, end, ahead, begin, whole, whole_end): a loop from `first` to `end` whose nth_block goes over them; all see
    all of whole .. whole_end - 1. low, high: blocks outside of these are known to be dead.
    """
    ahead = 0
    begin = low
    whole = low
    end = tl.minimum(tl.cdiv(keys, COLUMNS), high)
    whole_end = keys // COLUMNS
    if RIGHT & FEATURES:
        seen = tl.minimum(tl.maximum(last + shift + right + 1, 0), keys)
        by_all = tl.minimum(tl.maximum(first + shift + right + 1, 0), keys)
        if (PREFIX & FEATURES) and not (LEFT & FEATURES):
            seen = tl.maximum(seen, prefix)
            by_all = tl.maximum(by_all, prefix)
        end = tl.minimum(tl.cdiv(seen, COLUMNS), high)
        whole_end = by_all // COLUMNS
    if LEFT & FEATURES:
        seen = tl.minimum(tl.maximum(first + shift - left, 0), keys)
        by_all = tl.minimum(tl.maximum(last + shift - left, 0), keys)
        begin = tl.maximum(seen // COLUMNS, low)
        whole = tl.cdiv(by_all, COLUMNS)
    if (PREFIX & FEATURES) and (LEFT & FEATURES):
        # Two stretches of blocks: the prefix, and what of the window lies behind it.
        ahead = tl.minimum(tl.cdiv(prefix, COLUMNS), high)
        begin = tl.maximum(begin, ahead)
        whole = tl.maximum(whole, begin)
        return 0, ahead + tl.maximum(end - begin, 0), ahead, begin, whole, whole_end
    else:
        return begin, end, ahead, begin, whole, whole_end


@triton.jit
def query_blocks(
    first, last, queries, shift, left, right, prefix, low, high, FEATURES: tl.constexpr, ROWS: tl.constexpr
):
    """Which blocks of queries see any of the keys first .. last (included): (first, end, whole, whole_end), of which
    whole .. whole_end - 1 see all of them."""
    begin = low
    whole = low
    end = tl.minimum(tl.cdiv(queries, ROWS), high)
    whole_end = queries // ROWS
    if (RIGHT | LEFT) & FEATURES:
        sees = 0
        sees_all = 0
        sees_end = queries
        sees_all_end = queries
        if RIGHT & FEATURES:
            sees = tl.minimum(tl.maximum(first - shift - right, 0), queries)
            sees_all = tl.minimum(tl.maximum(last - shift - right, 0), queries)
        if LEFT & FEATURES:
            sees_end = tl.minimum(tl.maximum(last - shift + left + 1, 0), queries)
            sees_all_end = tl.minimum(tl.maximum(first - shift + left + 1, 0), queries)
        if PREFIX & FEATURES:
            sees = tl.where(first < prefix, 0, sees)
            sees_end = tl.where(first < prefix, queries, sees_end)
            sees_all = tl.where(last < prefix, 0, sees_all)
            sees_all_end = tl.where(last < prefix, queries, sees_all_end)
        begin = tl.maximum(sees // ROWS, low)
        end = tl.minimum(tl.cdiv(sees_end, ROWS), high)
        whole = tl.cdiv(sees_all, ROWS)
        whole_end = sees_all_end // ROWS
    return begin, end, whole, whole_end


@triton.jit
def id_ranges(ranges_ptr, ids_ptr, ids_stride, count, blocks, BLOCK: tl.constexpr):
    """The smallest and the largest id of every block: int64 (batch, 2, blocks)."""
    block = tl.program_id(0) % blocks
    batch = wide(tl.program_id(0) // blocks)
    index = block * BLOCK + tl.arange(0, BLOCK)
    there = index < count
    ids = tl.load(ids_ptr + batch * ids_stride + index, mask=there, other=0).to(tl.int64)
    tl.store(ranges_ptr + batch * 2 * blocks + block, tl.min(tl.where(there, ids, MOST), 0))
    tl.store(ranges_ptr + batch * 2 * blocks + blocks + block, tl.max(tl.where(there, ids, LEAST), 0))


@triton.jit
def live_blocks(ranges_ptr, blocks, least, most):
    """(first, end) of the blocks whose ids may be among least .. most."""
    low = blocks
    high = 0
    for first in range(0, blocks, 128):
        index = first + tl.arange(0, 128)
        there = index < blocks
        smallest = tl.load(ranges_ptr + index, mask=there, other=0)
        largest = tl.load(ranges_ptr + blocks + index, mask=there, other=0)
        live = there & (smallest <= most) & (largest >= least)
        low = tl.minimum(low, tl.min(tl.where(live, index, blocks), 0))
        high = tl.maximum(high, tl.max(tl.where(live, index + 1, 0), 0))
    return low, high


@triton.jit
def is_live(ranges_ptr, blocks, block, least, most):
    return (tl.load(ranges_ptr + block) <= most) & (tl.load(ranges_ptr + blocks + block) >= least)


@triton.jit
def mask_tile(mask_ptr, row_stride, column_stride, row, column, queries, keys):
    """A mask's part for a tile: what is beyond it is not visible."""
    address = mask_ptr + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    there = (row < queries) & (column < keys)
    if mask_ptr.dtype.element_ty.is_floating():
        return tl.load(address, mask=there, other=float("-inf"))
    else:
        return tl.load(address, mask=there, other=0)


@triton.jit
def tested_tile(
    mask_ptr, mask_row, mask_column, row, column, queries, keys, ranges_ptr, ranges, block, least, most,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """(the mask's part for a tile, whether anything in the tile may be seen), by mask and documents."""
    mask = 0
    live = True
    if MASKS & FEATURES:
        mask = mask_tile(mask_ptr, mask_row, mask_column, row, column, queries, keys)
        live = any_visible(mask)
    if DOCUMENTS & FEATURES:
        live = is_live(ranges_ptr, ranges, block, least, most) & live
    return mask, live


@triton.jit
def any_visible(mask):
    if mask.dtype.is_floating():
        return tl.max((mask != float("-inf")).to(tl.int32)) > 0
    else:
        return tl.max((mask != 0).to(tl.int32)) > 0


@triton.jit
def natural_scores(products, row, column, shift, slope, scale, softcap, mask, FEATURES: tl.constexpr):
    """scale * products, capped and biased, but not masked."""
    if SOFTCAP & FEATURES:
        scores = softcap * tanh(products * scale / softcap)
    else:
        scores = products * scale
    if ALIBI & FEATURES:
        scores -= slope * tl.abs(row + shift - column).to(tl.float32)
    if ADDITIVE_MASK & FEATURES:
        scores += mask.to(tl.float32)
    return scores


@triton.jit
def visible(row, column, queries, keys, shift, left, right, prefix, query_id, key_id, mask, FEATURES: tl.constexpr):
    """Which elements of a tile are queries that see the key."""
    seen = (column < keys) & (row < queries)
    if (RIGHT | LEFT) & FEATURES:
        ahead = column - row - shift
        if RIGHT & FEATURES:
            near = ahead <= right
            if LEFT & FEATURES:
                near = near & (ahead >= -left)
        else:
            near = ahead >= -left
        if PREFIX & FEATURES:
            near = near | (column < prefix)
        seen = seen & near
    if DOCUMENTS & FEATURES:
        seen = seen & (query_id == key_id)
    if BOOL_MASK & FEATURES:
        seen = seen & (mask != 0)
    return seen


@triton.jit
def kept(philox_ptr, lane, first_row, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """bool (ROWS, COLUMNS): what dropout keeps."""
    seed = tl.load(philox_ptr)
    offset = tl.load(philox_ptr + 1)
    return keep_tile(seed, offset, lane, first_row + tl.arange(0, ROWS), first_column, threshold, COLUMNS)
