"""Device code of attention's backward. Probabilities are recomputed from lse (Dao et al. 2022, appendix B.4):

    P = exp(S - lse), dV = P^T dO, dP = dO V^T, dS = P * (dP - delta), dQ = scale * dS K, dK = scale * dS^T Q

with delta = rowsum(dO * O) - grad_lse. Queries and keys have a kernel each: what is summed stays in the registers of
one program, in one order, so that the same call gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.gpu.functions import LOG2E, tanh
from fastattn.ops.attention.triton_scores import (
    DOCUMENTS,
    DROPOUT,
    FOLDED,
    GRAD_LSE,
    MASKS,
    PACKED,
    REST,
    SINKS,
    SOFTCAP,
    TESTED,
    ids_of,
    kept,
    key_blocks,
    live_blocks,
    mask_tile,
    natural_scores,
    nth_block,
    packed_other,
    packed_tile,
    placed,
    prefix_of,
    product,
    put_tile,
    query_blocks,
    query_program,
    slope_of,
    task,
    tested_tile,
    tile_at,
    used_keys,
    visible,
    wide,
)

#: Numbers that do not decide how a kernel is compiled.
PLAIN = (
    "scale", "softcap", "kept_scale", "threshold", "queries", "keys", "shift", "left", "right", "heads", "grouped",
    "lanes", "group", "blocks", "sequences", "key_tiles", "query_tiles", "lse_batch", "lse_head", "rows", "batches",
)  # fmt: skip


@triton.jit(do_not_specialize=PLAIN)
def delta(
    delta_ptr, sink_parts_ptr, grad_ptr, output_ptr, lse_ptr, grad_lse_ptr, sinks_ptr,
    grad_batch, grad_head, grad_row, output_batch, output_head, output_row, lse_batch, lse_head,
    rows, heads, blocks,
    FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """rowsum(dO * O) - grad_lse, and this block's part of the sink's gradient: -sum of its probability * delta."""
    block = tl.program_id(0) % blocks
    lane = tl.program_id(0) // blocks
    head = wide(lane % heads)
    batch = wide(lane // heads)
    first_row = block * ROWS
    local = tl.arange(0, ROWS)
    row = first_row + local
    grad_ptr += batch * grad_batch + head * grad_head
    grad = tile_at(grad_ptr, grad_row, row, rows, VALUE_DIM, BLOCK_VALUE)
    output_ptr += batch * output_batch + head * output_head
    output = tile_at(output_ptr, output_row, row, rows, VALUE_DIM, BLOCK_VALUE)
    if grad.dtype == tl.float32:
        # The diagonal of a product is summed as dP is: where they cancel, as in a row of one key, they do so wholly.
        products = product(
            grad, grad_ptr, grad_row, row, rows, output, output_ptr, output_row, row, rows, VALUE_DIM, BLOCK_VALUE
        )
        found = tl.sum(tl.where(local[:, None] == local[None, :], products, 0.0), 1)
    else:
        found = tl.sum(grad.to(tl.float32) * output.to(tl.float32), 1)
    place = batch * lse_batch + head * lse_head + row
    there = row < rows
    if GRAD_LSE & FEATURES:
        found -= tl.load(grad_lse_ptr + place, mask=there, other=0.0)
    tl.store(delta_ptr + place, found, mask=there)
    if SINKS & FEATURES:
        lse = tl.load(lse_ptr + place, mask=there, other=float("-inf"))
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        weights = tl.where(lse == float("-inf"), 0.0, tl.exp2((sink - lse) * LOG2E))
        tl.store(sink_parts_ptr + lane * blocks + block, -tl.sum(weights * found, 0))


@triton.jit
def _weights(
    products, lse, rest, row, column, queries, keys, shift, left, right, prefix, query_id, key_id, mask, slope, scale,
    softcap,
    edge, FEATURES: tl.constexpr,
):  # fmt: skip
    """The probabilities again. lse: natural, or times log2 e (FOLDED); +inf for rows without any.

    rest: one over the sum of a row's probabilities as lse makes them (REST).
    """
    if FOLDED & FEATURES:
        exponent = products * (scale * LOG2E) - lse
    else:
        scores = natural_scores(products, row, column, shift, slope, scale, softcap, mask, FEATURES)
        exponent = (scores - lse) * LOG2E
    if edge:
        seen = visible(row, column, queries, keys, shift, left, right, prefix, query_id, key_id, mask, FEATURES)
        exponent = tl.where(seen, exponent, float("-inf"))
    weights = tl.exp2(exponent)
    if REST & FEATURES:
        weights *= rest
    return weights


@triton.jit
def _uncapped(grad_scores, products, scale, softcap, FEATURES: tl.constexpr):
    """Through softcap's derivative."""
    if SOFTCAP & FEATURES:
        capped = tanh(products * scale / softcap)
        return grad_scores * (1.0 - capped * capped)
    else:
        return grad_scores


@triton.jit
def _statistics(lse_ptr, delta_ptr, rest_ptr, place, rows, queries, FEATURES: tl.constexpr):
    """(lse, rest, delta) of rows; lse is +inf where there is no row and where a row sees nothing."""
    there = rows < queries
    lse = tl.load(lse_ptr + place + rows, mask=there, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    if FOLDED & FEATURES:
        lse *= LOG2E
    rest = lse
    if REST & FEATURES:
        rest = tl.load(rest_ptr + place + rows, mask=there, other=0.0)
    return lse, rest, tl.load(delta_ptr + place + rows, mask=there, other=0.0)


@triton.jit
def _query_step(
    grad_query, total, query, query_ptr, query_row, rows, grad, grad_ptr, grad_row, lse, delta_of_rows,
    key_ptr, key_row, value_ptr, value_row, block, edge, row,
    first_row, queries, keys, shift, left, right, prefix, query_id, key_ids_ptr, mask, slope, philox_ptr, lane, scale,
    softcap, kept_scale, threshold,
    FEATURES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One block of keys. total: the sum of a row's probabilities as lse makes them (REST)."""
    start = block * COLUMNS
    columns = start + tl.arange(0, COLUMNS)
    column = columns[None, :]
    key = tile_at(key_ptr, key_row, columns, keys, DIM, BLOCK_DIM)
    value = tile_at(value_ptr, value_row, columns, keys, VALUE_DIM, BLOCK_VALUE)
    key_id = 0
    if DOCUMENTS & FEATURES:
        key_id = tl.load(key_ids_ptr + columns, mask=columns < keys, other=0)[None, :]
    products = product(query, query_ptr, query_row, rows, queries, key, key_ptr, key_row, columns, keys, DIM, BLOCK_DIM)
    weights = _weights(
        products, lse[:, None], 1.0, row, column, queries, keys, shift, left, right, prefix, query_id, key_id, mask,
        slope, scale, softcap, edge, FEATURES,
    )  # fmt: skip
    grad_weights = product(
        grad, grad_ptr, grad_row, rows, queries, value, value_ptr, value_row, columns, keys, VALUE_DIM, BLOCK_VALUE
    )
    if DROPOUT & FEATURES:
        keep = kept(philox_ptr, lane, first_row, start, threshold, ROWS, COLUMNS)
        grad_weights = tl.where(keep, grad_weights * kept_scale, 0.0)
    if REST & FEATURES:
        total += tl.sum(weights, 1)
    grad_scores = weights * (grad_weights - delta_of_rows[:, None])
    grad_scores = _uncapped(grad_scores, products, scale, softcap, FEATURES)
    grad_query = tl.dot(grad_scores.to(key.dtype), key, grad_query, input_precision="ieee")
    return grad_query, total


@triton.jit(do_not_specialize=PLAIN)
def backward_query(
    grad_query_ptr, rest_ptr, grad_ptr, query_ptr, key_ptr, value_ptr, lse_ptr, delta_ptr, key_ranges_ptr,
    mask_ptr, philox_ptr, slopes_ptr, query_ids_ptr, key_ids_ptr, prefix_ptr, cu_queries_ptr, cu_keys_ptr, used_ptr,
    sinks_ptr,
    result_batch, result_head, result_row, grad_batch, grad_head, grad_row, query_batch, query_head, query_row,
    key_batch, key_head, key_row, value_batch, value_head, value_row, lse_batch, lse_head,
    mask_batch, mask_head, mask_row, mask_column,
    slopes_batch, query_ids_batch, key_ids_batch, prefix_batch, key_ranges_batch,
    scale, softcap, kept_scale, threshold,
    queries, keys, shift, left, right, heads, grouped, lanes, group, blocks, key_tiles, sequences,
    FEATURES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head."""
    head, batch, lane, base, _number, queries, keys, shift, query_start, key_start, first_row = query_program(
        blocks, lanes, group, queries, keys, shift, heads, cu_queries_ptr, cu_keys_ptr, used_ptr, sequences, FEATURES,
        ROWS,
    )  # fmt: skip
    if PACKED & FEATURES:  # noqa: SIM102, a constant
        if first_row >= queries:
            return
    kv_head = head // grouped
    query_ptr = placed(query_ptr, base, query_batch, head, query_head, query_start, query_row)
    grad_ptr = placed(grad_ptr, base, grad_batch, head, grad_head, query_start, grad_row)
    grad_query_ptr = placed(grad_query_ptr, base, result_batch, head, result_head, query_start, result_row)
    key_ptr = placed(key_ptr, base, key_batch, kv_head, key_head, key_start, key_row)
    value_ptr = placed(value_ptr, base, value_batch, kv_head, value_head, key_start, value_row)
    statistics = placed(0, base, lse_batch, head, lse_head, query_start, 1)

    rows = first_row + tl.arange(0, ROWS)
    row = rows[:, None]
    last_row = tl.minimum(first_row + ROWS, queries) - 1
    query = tile_at(query_ptr, query_row, rows, queries, DIM, BLOCK_DIM)
    grad = tile_at(grad_ptr, grad_row, rows, queries, VALUE_DIM, BLOCK_VALUE)
    lse, _, delta_of_rows = _statistics(lse_ptr, delta_ptr, None, statistics, rows, queries, FOLDED & FEATURES)
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

    grad_query = tl.zeros((ROWS, BLOCK_DIM), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
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
            grad_query, total = _query_step(
                grad_query, total, query, query_ptr, query_row, rows, grad, grad_ptr, grad_row, lse, delta_of_rows,
                key_ptr, key_row, value_ptr, value_row, this, edge, row, first_row, queries, keys, shift, left, right,
                prefix, query_ids[:, None], key_ids_ptr, mask, slope, philox_ptr, lane, scale, softcap, kept_scale,
                threshold,
                FEATURES, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, ROWS, COLUMNS,
            )  # fmt: skip

    if REST & FEATURES:
        if SINKS & FEATURES:
            sink = tl.load(sinks_ptr + head).to(tl.float32)
            total += tl.exp2((sink - lse) * LOG2E)
        total = tl.where(total == 0.0, 1.0, total)
        tl.store(rest_ptr + statistics + rows, 1.0 / total, mask=rows < queries)
        grad_query = grad_query / total[:, None]
    put_tile(grad_query_ptr, result_row, rows, queries, grad_query * scale, DIM, BLOCK_DIM)


@triton.jit
def _key_step(
    grad_key, grad_value, key, key_ptr, key_row, value, value_ptr, value_row, columns, query_ptr, query_row,
    grad_ptr, grad_row, lse_ptr, delta_ptr, rest_ptr, statistics, block, edge, column, first_key, queries, keys,
    shift, left, right, prefix, key_id, query_ids_ptr, mask,
    slope, philox_ptr, lane, scale, softcap, kept_scale, threshold,
    FEATURES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One block of queries, in tiles with a row per key."""
    start = block * ROWS
    rows = start + tl.arange(0, ROWS)
    row = rows[None, :]
    query = tile_at(query_ptr, query_row, rows, queries, DIM, BLOCK_DIM)
    lse, rest, delta_of_rows = _statistics(lse_ptr, delta_ptr, rest_ptr, statistics, rows, queries, FEATURES)
    query_id = 0
    if DOCUMENTS & FEATURES:
        query_id = tl.load(query_ids_ptr + rows, mask=rows < queries, other=0)[None, :]
    products = product(key, key_ptr, key_row, columns, keys, query, query_ptr, query_row, rows, queries, DIM, BLOCK_DIM)
    weights = _weights(
        products, lse[None, :], rest[None, :], row, column, queries, keys, shift, left, right, prefix, query_id,
        key_id, mask, slope, scale, softcap, edge, FEATURES,
    )  # fmt: skip
    grad = tile_at(grad_ptr, grad_row, rows, queries, VALUE_DIM, BLOCK_VALUE)
    grad_weights = product(
        value, value_ptr, value_row, columns, keys, grad, grad_ptr, grad_row, rows, queries, VALUE_DIM, BLOCK_VALUE
    )
    dropped = weights
    if DROPOUT & FEATURES:
        keep = tl.trans(kept(philox_ptr, lane, start, first_key, threshold, ROWS, COLUMNS))
        dropped = tl.where(keep, weights * kept_scale, 0.0)
        grad_weights = tl.where(keep, grad_weights * kept_scale, 0.0)
    grad_value = tl.dot(dropped.to(grad.dtype), grad, grad_value, input_precision="ieee")
    grad_scores = weights * (grad_weights - delta_of_rows[None, :])
    grad_scores = _uncapped(grad_scores, products, scale, softcap, FEATURES)
    grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision="ieee")
    return grad_key, grad_value


@triton.jit(do_not_specialize=PLAIN)
def backward_mask(
    result_ptr, grad_ptr, query_ptr, key_ptr, value_ptr, lse_ptr, delta_ptr, rest_ptr,
    mask_ptr, philox_ptr, slopes_ptr, query_ids_ptr, key_ids_ptr, prefix_ptr,
    grad_batch, grad_head, grad_row, query_batch, query_head, query_row,
    key_batch, key_head, key_row, value_batch, value_head, value_row, lse_batch, lse_head,
    mask_batch, mask_head, mask_row, mask_column, slopes_batch, query_ids_batch, key_ids_batch, prefix_batch,
    scale, softcap, kept_scale, threshold,
    queries, keys, shift, left, right, heads, grouped, batches, mask_batches, mask_heads, mask_rows, mask_columns,
    splits,
    FEATURES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of an additive mask: dS summed over all batch elements, heads, queries and keys that it was broadcast to.

    Of these a program takes one of `splits` equal shares; result: (splits, *mask).
    """
    place = tl.program_id(0)
    split = place % splits
    place = place // splits
    tiles_down = tl.cdiv(queries, ROWS)
    tiles_across = tl.cdiv(keys, COLUMNS)
    if SUM_COLUMNS:
        first_column = 0
        across = tiles_across
    else:
        first_column = place % tiles_across
        place = place // tiles_across
        across = 1
    if SUM_ROWS:
        first_tile = 0
        down = tiles_down
    else:
        first_tile = place % tiles_down
        place = place // tiles_down
        down = 1
    mask_head_index = place % mask_heads
    mask_batch_index = place // mask_heads
    each_head = tl.where(mask_heads == 1, heads, 1)
    each_batch = tl.where(mask_batches == 1, batches, 1)
    steps = down * across * each_head * each_batch
    share = tl.cdiv(steps, splits)
    local_row = tl.arange(0, ROWS)
    local_column = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(split * share, tl.minimum(steps, split * share + share)):
        first_row = (first_tile + step % down) * ROWS
        rest_of_step = step // down
        first_key = (first_column + rest_of_step % across) * COLUMNS
        rest_of_step = rest_of_step // across
        head = mask_head_index + rest_of_step % each_head
        batch = mask_batch_index + rest_of_step // each_head
        base = wide(batch)
        rows = first_row + local_row
        columns = first_key + local_column
        row = rows[:, None]
        column = columns[None, :]
        mask = mask_tile(
            mask_ptr + base * mask_batch + wide(head) * mask_head, mask_row, mask_column, row, column, queries, keys
        )
        prefix = prefix_of(prefix_ptr, prefix_batch, batch, keys, FEATURES)
        query_id = 0
        key_id = 0
        if DOCUMENTS & FEATURES:
            query_ids = query_ids_ptr + base * query_ids_batch
            query_id = tl.load(query_ids + rows, mask=rows < queries, other=0)[:, None]
            key_ids = key_ids_ptr + base * key_ids_batch
            key_id = tl.load(key_ids + columns, mask=columns < keys, other=0)[None, :]
        seen = visible(row, column, queries, keys, shift, left, right, prefix, query_id, key_id, mask, FEATURES)
        seen = seen & (mask != float("-inf"))
        if tl.max(seen.to(tl.int32)) > 0:
            kv_head = wide(head // grouped)
            wide_head = wide(head)
            query_at = query_ptr + base * query_batch + wide_head * query_head
            key_at = key_ptr + base * key_batch + kv_head * key_head
            query = tile_at(query_at, query_row, rows, queries, DIM, BLOCK_DIM)
            key = tile_at(key_at, key_row, columns, keys, DIM, BLOCK_DIM)
            products = product(
                query, query_at, query_row, rows, queries, key, key_at, key_row, columns, keys, DIM, BLOCK_DIM
            )
            slope = slope_of(slopes_ptr, slopes_batch, batch, head, FEATURES)
            statistics = base * lse_batch + wide_head * lse_head
            lse, rest, delta_of_rows = _statistics(
                lse_ptr, delta_ptr, rest_ptr, statistics, rows, queries, FEATURES
            )  # fmt: skip
            weights = _weights(
                products, lse[:, None], rest[:, None], row, column, queries, keys, shift, left, right, prefix, query_id,
                key_id, mask, slope, scale, softcap, True, FEATURES,
            )  # fmt: skip
            value_at = value_ptr + base * value_batch + kv_head * value_head
            grad_at = grad_ptr + base * grad_batch + wide_head * grad_head
            value = tile_at(value_at, value_row, columns, keys, VALUE_DIM, BLOCK_VALUE)
            grad = tile_at(grad_at, grad_row, rows, queries, VALUE_DIM, BLOCK_VALUE)
            grad_weights = product(
                grad, grad_at, grad_row, rows, queries, value, value_at, value_row, columns, keys, VALUE_DIM,
                BLOCK_VALUE,
            )  # fmt: skip
            if DROPOUT & FEATURES:
                lane = batch * heads + head
                keep = kept(philox_ptr, lane, first_row, first_key, threshold, ROWS, COLUMNS)
                grad_weights = tl.where(keep, grad_weights * kept_scale, 0.0)
            total += weights * (grad_weights - delta_of_rows[:, None])

    result_ptr += wide(split * mask_batches + mask_batch_index) * mask_heads * mask_rows * mask_columns
    result_ptr += wide(mask_head_index) * mask_rows * mask_columns
    if SUM_ROWS:
        total = tl.sum(total, 0)[None, :]
        row = tl.zeros((1, 1), tl.int32)
    else:
        row = (first_tile * ROWS + local_row)[:, None]
    if SUM_COLUMNS:
        total = tl.sum(total, 1)[:, None]
        column = tl.zeros((1, 1), tl.int32)
    else:
        column = (first_column * COLUMNS + local_column)[None, :]
    inside = (row < mask_rows) & (column < mask_columns)
    tl.store(result_ptr + row.to(tl.int64) * mask_columns + column, total.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=PLAIN)
def backward_key(
    grad_key_ptr, grad_value_ptr, grad_ptr, query_ptr, key_ptr, value_ptr, lse_ptr, delta_ptr, rest_ptr,
    query_ranges_ptr,
    mask_ptr, philox_ptr, slopes_ptr, query_ids_ptr, key_ids_ptr, prefix_ptr, cu_queries_ptr, cu_keys_ptr, used_ptr,
    key_result_batch, key_result_head, key_result_row, value_result_batch, value_result_head, value_result_row,
    grad_batch, grad_head, grad_row, query_batch, query_head, query_row,
    key_batch, key_head, key_row, value_batch, value_head, value_row, lse_batch, lse_head,
    mask_batch, mask_head, mask_row, mask_column,
    slopes_batch, query_ids_batch, key_ids_batch, prefix_batch, query_ranges_batch,
    scale, softcap, kept_scale, threshold,
    queries, keys, shift, left, right, heads, grouped, lanes, group, blocks, query_tiles, sequences,
    FEATURES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of keys of one head of keys: the gradients of all query heads that share it are summed here."""
    block, lane = task(blocks, lanes, group)
    kv_heads = heads // grouped
    kv_head = lane % kv_heads
    batch = lane // kv_heads
    number = batch + 1
    if PACKED & FEATURES:
        number, key_start, room, first_key = packed_tile(cu_keys_ptr, block, sequences, keys, COLUMNS)
        if first_key >= room:
            return
        query_start, queries = packed_other(cu_queries_ptr, number, sequences, queries)
        keys = used_keys(used_ptr, number, sequences, room)
        shift = keys - queries
        batch = tl.maximum(number - 1, 0)
        base = tl.full((), 0, tl.int64)
    else:
        first_key = block * COLUMNS
        room = keys
        key_start = 0
        query_start = 0
        base = wide(batch)
    key_ptr = placed(key_ptr, base, key_batch, kv_head, key_head, key_start, key_row)
    value_ptr = placed(value_ptr, base, value_batch, kv_head, value_head, key_start, value_row)
    grad_key_ptr = placed(grad_key_ptr, base, key_result_batch, kv_head, key_result_head, key_start, key_result_row)
    grad_value_ptr = placed(
        grad_value_ptr, base, value_result_batch, kv_head, value_result_head, key_start, value_result_row
    )

    query_ptr = placed(query_ptr, base, query_batch, 0, query_head, query_start, query_row)
    grad_ptr = placed(grad_ptr, base, grad_batch, 0, grad_head, query_start, grad_row)
    first_statistics = placed(0, base, lse_batch, 0, lse_head, query_start, 1)

    columns = first_key + tl.arange(0, COLUMNS)
    column = columns[:, None]
    last_key = tl.minimum(first_key + COLUMNS, keys) - 1
    key = tile_at(key_ptr, key_row, columns, keys, DIM, BLOCK_DIM)
    value = tile_at(value_ptr, value_row, columns, keys, VALUE_DIM, BLOCK_VALUE)
    prefix = prefix_of(prefix_ptr, prefix_batch, batch, keys, FEATURES)
    key_ids, least, most = ids_of(key_ids_ptr, base * key_ids_batch, columns, keys, FEATURES)
    low = 0
    high = tl.cdiv(queries, ROWS)
    if DOCUMENTS & FEATURES:
        query_ids_ptr += base * query_ids_batch
        query_ranges_ptr += base * query_ranges_batch
        low, high = live_blocks(query_ranges_ptr, query_tiles, least, most)
    begin, end, whole, whole_end = query_blocks(
        first_key, last_key, queries, shift, left, right, prefix, low, high, FEATURES, ROWS
    )
    if PACKED & FEATURES:
        end = tl.where(first_key < keys, end, begin)  # keys that are not used meet no query

    grad_key = tl.zeros((COLUMNS, BLOCK_DIM), tl.float32)
    grad_value = tl.zeros((COLUMNS, BLOCK_VALUE), tl.float32)
    # One loop over the queries of all heads that share these keys: loads run ahead from one head into the next.
    count = tl.maximum(end - begin, 0)
    for t in range(0, count * grouped):
        this = begin + t % count
        head = kv_head * grouped + t // count
        lane = (number - 1) * heads + head
        head_query_ptr = query_ptr + wide(head) * query_head
        head_grad_ptr = grad_ptr + wide(head) * grad_head
        statistics = first_statistics + wide(head) * lse_head
        slope = slope_of(slopes_ptr, slopes_batch, batch, head, FEATURES)
        live = True
        mask = 0
        if TESTED & FEATURES:
            edge = True
            row = (this * ROWS + tl.arange(0, ROWS))[None, :]
            head_mask_ptr = mask_ptr
            if MASKS & FEATURES:
                head_mask_ptr += base * mask_batch + wide(head) * mask_head
            mask, live = tested_tile(
                head_mask_ptr, mask_row, mask_column, row, column, queries, keys, query_ranges_ptr, query_tiles, this,
                least, most, FEATURES,
            )  # fmt: skip
        else:
            edge = (this < whole) | (this >= whole_end)
        if live:
            grad_key, grad_value = _key_step(
                grad_key, grad_value, key, key_ptr, key_row, value, value_ptr, value_row, columns, head_query_ptr,
                query_row, head_grad_ptr, grad_row, lse_ptr, delta_ptr, rest_ptr, statistics, this, edge, column,
                first_key, queries, keys, shift, left, right,
                prefix, key_ids[:, None], query_ids_ptr, mask, slope, philox_ptr, lane, scale, softcap, kept_scale,
                threshold, FEATURES, DIM, VALUE_DIM, BLOCK_DIM, BLOCK_VALUE, ROWS, COLUMNS,
            )  # fmt: skip

    if PACKED & FEATURES:
        used = (columns < keys)[:, None]
        grad_key = tl.where(used, grad_key, 0.0)
        grad_value = tl.where(used, grad_value, 0.0)
    put_tile(grad_key_ptr, key_result_row, columns, room, grad_key * scale, DIM, BLOCK_DIM)
    put_tile(grad_value_ptr, value_result_row, columns, room, grad_value, VALUE_DIM, BLOCK_VALUE)
