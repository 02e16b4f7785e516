"""Functions that device code of several ops calls. Arithmetic is float32: kernels widen what they load."""

from __future__ import annotations

import triton
import triton.language as tl

#: log2(e), and its inverse: exponentials of GPUs are powers of two.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """To about two units in the last place, also where exp(-2 |x|) is near 1 and 1 - exp would lose digits."""
    square = x * x  # x - x^3/3 + 2 x^5/15 - ...: below 0.4 the next term is under half a unit in the last place
    tail = 21844.0 / 6081075.0
    tail = tail * square - 1382.0 / 155925.0
    tail = tail * square + 62.0 / 2835.0
    tail = tail * square - 17.0 / 315.0
    tail = tail * square + 2.0 / 15.0
    tail = tail * square - 1.0 / 3.0
    small = x + x * square * tail
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.4, small, tl.where(x < 0.0, -large, large))


@triton.jit
def dropout_words(seed, offset, lane, row, group):
    """The four words of Philox4x32-10 at counter (offset, lane, row, group) under the key `seed` (fastattn/philox.py).

    seed, offset: int64 scalars. lane, row, group: integers of 32 or 64 bits that broadcast to one shape; each counts
    modulo 2^32.
    """
    zero = (lane + row + group).to(tl.uint32) * 0
    return tl.philox(
        seed,
        zero + offset.to(tl.uint32),
        zero + lane.to(tl.uint32),
        zero + row.to(tl.uint32),
        zero + group.to(tl.uint32),
    )


@triton.jit
def keep_tile(seed, offset, lane, rows, first_column, threshold, COLUMNS: tl.constexpr):
    """Which elements dropout keeps: bool (ROWS, COLUMNS) at the given rows and columns first_column + 0 .. COLUMNS - 1.

    rows: (ROWS,) integers. first_column: a multiple of 4. threshold: fastattn.philox.threshold(p), int64.
    """
    groups = first_column // 4 + tl.arange(0, COLUMNS // 4)
    w0, w1, w2, w3 = dropout_words(seed, offset, lane + tl.zeros_like(rows)[:, None], rows[:, None], groups[None, :])
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., a, b] is word 2 a + b
    return words.reshape(rows.shape[0], COLUMNS).to(tl.int64) >= threshold


#: Finite, and below every score that counts: what a maximum begins with where -inf - -inf would be NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def exp(x):
    """To about a unit in the last place, of an x of at most 88: tl.exp rounds x log2(e), which costs |x| roundings.

    Below -87 it is 0.
    """
    shifted = x * 1.4426950408889634 + 12582912.0  # 1.5 2^23: the nearest integer is in the lowest bits
    n = shifted - 12582912.0
    # log(2) in two parts, the first so short that its products with n are exact.
    rest = x - n * 0.693145751953125 - n * 1.428606765330187e-06
    power = ((shifted.to(tl.int32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.0, 0.0, tl.exp2(rest * 1.4426950408889634) * power)


@triton.jit
def fast_exp(x):
    """As tl.exp, but what is below 2^-126 is 0, which takes half the instructions: for results of 16 bits, for sums."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def exponentials(x, PRECISE: tl.constexpr):
    """`exp` for results of 32 bits, `fast_exp` for those of 16."""
    return exp(x) if PRECISE else fast_exp(x)


@triton.jit
def no_exponentials(LANES: tl.constexpr):
    """(top, total) for `add_exponentials` to begin with."""
    return tl.full((LANES,), LOWEST, tl.float32), tl.zeros((LANES,), tl.float32)


@triton.jit
def add_exponentials(top, total, x):
    """Online sums of exponentials, one for each lane: (top, total) with the rows of x (PARTS, LANES) added.

    -inf adds nothing; +inf and NaN make the total NaN.
    """
    now = tl.maximum(top, tl.max(x, 0))
    return now, total * fast_exp(top - now) + tl.sum(fast_exp(x - now[None, :]), 0)


@triton.jit
def combine_exponentials(top, total):
    """(maximum, sum of exponentials relative to it) of all lanes."""
    highest = tl.max(top, 0)
    return highest, tl.sum(total * fast_exp(top - highest), 0)


@triton.jit
def row_tile(PARTS: tl.constexpr, LANES: tl.constexpr):
    """The columns of the first tile of a row that registers do not hold, (PARTS, LANES): lanes are neighbours."""
    return tl.arange(0, PARTS)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def last_tile(columns, TILE: tl.constexpr):
    """Where a row's last tile begins: what is read a second time is read backwards, from what the caches still have."""
    return (columns + TILE - 1) // TILE * TILE - TILE


@triton.jit
def fill(row_ptr, value, first, columns, PARTS: tl.constexpr, LANES: tl.constexpr):
    """Writes a value to a row's columns from `first` on, where a tile begins."""
    for start in range(first, columns, PARTS * LANES):
        column = start + row_tile(PARTS, LANES)
        tl.store(row_ptr + column, tl.full((PARTS, LANES), value, tl.float32), mask=column < columns)
