"""Device code of the rotary embedding: one program for a tile of rows, a row being one head at one position."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sequences(ends_ptr, token, count, steps):
    """For every token the packed sequence that it is in: the last one that begins at or before it."""
    low = token * 0
    high = low + count  # what is sought is in low .. high - 1
    for _ in range(steps):
        middle = (low + high) // 2
        begins = tl.load(ends_ptr + middle)
        before = begins <= token
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=["positions", "offset", "sequences", "steps", "blocks"])
def rotate(
    output_ptr, x_ptr, cos_ptr, sin_ptr, offsets_ptr, ends_ptr, x_batch, x_row, x_head, output_batch, output_row,
    output_head, cos_row, sin_row, length, heads, half, dim, positions, offset, sequences, steps, blocks, sign,
    ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Turns the first 2 * half columns of every row and copies the others, of which REST is a bound; 0: there are none.

    sign: -1.0 turns back. Positions that cos and sin do not have are taken for the nearest that they have.
    """
    batch = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    inside = row < length * heads
    token, head = row // heads, row % heads
    if ends_ptr is None:
        at, sequence = token, batch
    else:
        sequence = _sequences(ends_ptr, token, sequences, steps)
        at = token - tl.load(ends_ptr + sequence)
    if offsets_ptr is None:
        at = at.to(tl.int64) + offset
    else:
        at = tl.load(offsets_ptr + sequence).to(tl.int64) + at
    tl.device_assert((at >= 0) & (at < positions) | (inside == 0), "rotary: a position that cos and sin do not have")
    at = tl.minimum(tl.maximum(at, 0), positions - 1)[:, None]
    batch, token, head = batch.to(tl.int64), token.to(tl.int64)[:, None], head.to(tl.int64)[:, None]
    x_ptr += batch * x_batch + token * x_row + head * x_head
    output_ptr += batch * output_batch + token * output_row + head * output_head
    column = tl.arange(0, HALF)[None, :]
    turned = inside[:, None] & (column < half)
    known = turned & (positions > 0)
    cos = tl.load(cos_ptr + at * cos_row + column, mask=known, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at * sin_row + column, mask=known, other=0.0).to(tl.float32) * sign
    if INTERLEAVED:  # neighbours are read together and taken apart in registers
        both = tl.arange(0, 2 * HALF)[None, :]
        written = inside[:, None] & (both < 2 * half)
        pairs = tl.load(x_ptr + both, mask=written, other=0.0).to(tl.float32)
        a, b = tl.split(pairs.reshape(ROWS, HALF, 2))
        pairs = tl.join(a * cos - b * sin, a * sin + b * cos).reshape(ROWS, 2 * HALF)
        tl.store(output_ptr + both, pairs, mask=written)
    else:
        a = tl.load(x_ptr + column, mask=turned, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + half + column, mask=turned, other=0.0).to(tl.float32)
        tl.store(output_ptr + column, a * cos - b * sin, mask=turned)
        tl.store(output_ptr + half + column, a * sin + b * cos, mask=turned)
    if REST > 0:
        column = 2 * half + tl.arange(0, REST)[None, :]
        copied = inside[:, None] & (column < dim)
        tl.store(output_ptr + column, tl.load(x_ptr + column, mask=copied), mask=copied)
