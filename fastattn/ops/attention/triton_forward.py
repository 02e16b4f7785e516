"""Device code of attention's forward: a program for a block of queries of one head, online softmax over blocks of keys.

Milakov and Gimelshein 2018; Dao et al. 2022. Keys that no query of the block sees are not visited, and blocks that
all queries see whole are not masked: in one loop, since two that hold the same products need the registers of both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.gpu.functions import LN2, LOG2E
from fastattn.ops.attention.triton_scores import (
    DOCUMENTS,
    DROPOUT,
    FOLDED,
    MASKS,
    PACKED,
    SINKS,
    TESTED,
    ids_of,
    kept,
    key_blocks,
    live_blocks,
    natural_scores,
    nth_block,
    placed,
    prefix_of,
    put_tile,
    query_program,
    slope_of,
    tested_tile,
    tile_at,
    visible,
    wide,
)

#: Numbers that do not decide how a kernel is compiled.
PLAIN = (
    "scale", "softcap", "kept_scale", "threshold", "queries", "keys", "shift", "left", "right", "heads", "grouped",
    "lanes", "group", "blocks", "sequences", "key_tiles", "query_tiles", "lse_batch", "lse_head",
)  # fmt: skip


@triton.jit
def _step(
    largest, total, output, query, key_ptr, key_row, value_ptr, value_row, block, edge, row, first_row, queries, keys,
    shift, left, right, prefix, query_id, key_ids_ptr, mask, slope, philox_ptr, lane, scale, softcap, threshold,
    FEATURES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One block of keys. largest: the greatest score so far, times the unit of exponents."""
    start = block * COLUMNS
    columns = start + tl.arange(0, COLUMNS)
    key = tile_at(key_ptr, key_row, columns, keys, DIM, BLOCK_DIM)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    column = columns[None, :]
    if not FOLDED & FEATURES:
        scores = natural_scores(scores, row, column, shift, slope, scale, softcap, mask, FEATURES)
    if edge:
        key_id = 0
        if DOCUMENTS & FEATURES:
            key_id = tl.load(key_ids_ptr + columns, mask=columns < keys, other=0)[None, :]
        seen = visible(row, column, queries, keys, shift, left, right, prefix, query_id, key_id, mask, FEATURES)
        scores = tl.where(seen, scores, float("-inf"))
    if FOLDED & FEATURES:
        larger = tl.maximum(largest, tl.max(scores, 1) * (scale * LOG2E))
    else:
        larger = tl.maximum(largest, tl.max(scores, 1))
    # Where nothing was seen yet every exponent is to be -inf, not -inf - -inf.
    base = tl.where(larger == float("-inf"), 0.0, larger)
    if FOLDED & FEATURES:
        weights = tl.exp2(scores * (scale * LOG2E) - base[:, None])
        shrink = tl.exp2(largest - base)
    else:
        weights = tl.exp2((scores - base[:, None]) * LOG2E)
        shrink = tl.exp2((largest - base) * LOG2E)
    total = total * shrink + tl.sum(weights, 1)
    if DROPOUT & FEATURES:
        keep = kept(philox_ptr, lane, first_row, start, threshold, ROWS, COLUMNS)
        weights = tl.where(keep, weights, 0.0)
    output = output * shrink[:, None]
    value = tile_at(value_ptr, value_row, columns, keys, VALUE_DIM, BLOCK_VALUE)
    output = tl.dot(weights.to(value.dtype), value, output, input_precision="ieee")
    return larger, total, output


@triton.jit(do_not_specialize=PLAIN)
def forward(
    output_ptr, lse_ptr, query_ptr, key_ptr, value_ptr, key_ranges_ptr,
    mask_ptr, philox_ptr, slopes_ptr, query_ids_ptr, key_ids_ptr, prefix_ptr, cu_queries_ptr, cu_keys_ptr, used_ptr,
    sinks_ptr,
    output_batch, output_head, output_row, query_batch, query_head, query_row, key_batch, key_head, key_row,
    value_batch, value_head, value_row, lse_batch, lse_head, mask_batch, mask_head, mask_row, mask_column,
    slopes_batch, query_ids_batch, key_ids_batch, prefix_batch, key_ranges_batch,
    scale, softcap, kept_scale, threshold,
    queries, keys, shift, left, right, heads, grouped, lanes, group, blocks, key_tiles, sequences,
    FEATURES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    head, batch, lane, base, number, queries, keys, shift, query_start, key_start, first_row = query_program(
        blocks, lanes, group, queries, keys, shift, heads, cu_queries_ptr, cu_keys_ptr, used_ptr, sequences, FEATURES,
        ROWS,
    )  # fmt: skip
    if PACKED & FEATURES:  # noqa: SIM102, a constant
        if first_row >= queries:
            return
    kv_head = head // grouped
    query_ptr = placed(query_ptr, base, query_batch, head, query_head, query_start, query_row)
    output_ptr = placed(output_ptr, base, output_batch, head, output_head, query_start, output_row)
    key_ptr = placed(key_ptr, base, key_batch, kv_head, key_head, key_start, key_row)
    value_ptr = placed(value_ptr, base, value_batch, kv_head, value_head, key_start, value_row)
    lse_ptr = placed(lse_ptr, base, lse_batch, head, lse_head, query_start, 1)

    rows = first_row + tl.arange(0, ROWS)
    row = rows[:, None]
    last_row = tl.minimum(first_row + ROWS, queries) - 1
    query = tile_at(query_ptr, query_row, rows, queries, DIM, BLOCK_DIM)
    prefix = prefix_of(prefix_ptr, prefix_batch, batch, keys, FEATURES)
    slope = slope_of(slopes_ptr, slopes_batch, batch, head, FEATURES)
    query_ids, least, most = ids_of(query_ids_ptr, base * query_ids_batch, rows, queries, FEATURES)
    low = 0
    high = tl.cdiv(keys, COLUMNS)
    if DOCUMENTS & FEATURES:
        key_ids_ptr += base * key_ids_batch
        key_ranges_ptr += base * key_ranges_batch
        low, high = live_blocks(key_ranges_ptr, key_tiles, least, most)
    if MASKS & FEATURES:
        mask_ptr += base * mask_batch + wide(head) * mask_head
    begin, end, ahead, after, whole, whole_end = key_blocks(
        first_row, last_row, keys, shift, left, right, prefix, low, high, FEATURES, COLUMNS
    )

    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    output = tl.zeros((ROWS, BLOCK_VALUE), tl.float32)
    for t in range(begin, end):
        this = nth_block(t, ahead, after, FEATURES)
        live = True
        mask = 0
        if TESTED & FEATURES:
            edge = True
            column = (this * COLUMNS + tl.arange(0, COLUMNS))[None, :]
            mask, live = tested_tile(
                mask_ptr, mask_row, mask_column, row, column, queries, keys, key_ranges_ptr, key_tiles, this, least,
                most, FEATURES,
            )  # fmt: skip
        else:
            edge = (this < whole) | (this >= whole_end)
        if live:
            largest, total, output = _step(
                largest, total, output, query, key_ptr, key_row, value_ptr, value_row, this, edge, row, first_row,
                queries, keys, shift, left, right, prefix, query_ids[:, None], key_ids_ptr, mask, slope, philox_ptr,
                lane, scale, softcap, threshold, FEATURES, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, ROWS, COLUMNS,
            )  # fmt: skip

    unit = 1.0
    if not FOLDED & FEATURES:
        unit = LOG2E
    if SINKS & FEATURES:
        # One more score, without a value.
        natural_sink = tl.load(sinks_ptr + head).to(tl.float32)
        sink = natural_sink
        if FOLDED & FEATURES:
            sink = natural_sink * LOG2E
        sink_is_largest = sink > largest
        larger = tl.maximum(largest, sink)
        if PACKED & FEATURES:
            # Rows of no sequence meet nothing, not even a sink.
            larger = tl.where((number > 0) & (number <= sequences), larger, float("-inf"))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        shrink = tl.exp2((largest - base) * unit)
        total = total * shrink + tl.where(larger == float("-inf"), 0.0, tl.exp2((sink - base) * unit))
        output = output * shrink[:, None]
        largest = larger
    dead = total == 0.0
    if FOLDED & FEATURES:
        lse = (largest + tl.log2(total)) * LN2
        if SINKS & FEATURES:
            # A sink that is nearly all of the sum is not rounded twice.
            lse = tl.where(sink_is_largest, natural_sink + tl.log2(total) * LN2, lse)
    else:
        lse = largest + tl.log(total)
    tl.store(lse_ptr + rows, tl.where(dead, float("-inf"), lse), mask=rows < queries)
    output = output / tl.where(dead, 1.0, total)[:, None]
    if DROPOUT & FEATURES:
        output = output * kept_scale
    put_tile(output_ptr, output_row, rows, queries, output, VALUE_DIM, BLOCK_VALUE)
