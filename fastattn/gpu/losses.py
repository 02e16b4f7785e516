"""What device code of cross entropy has in common, of logits that are there and of logits that are made on the way.

Coefficients a_c = weight_c * ((1 - smoothing) * t_c + smoothing / C); a class with a_c = 0 adds nothing, however
impossible it is. Targets that are no class are not followed: the row is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.gpu.functions import add_exponentials


@triton.jit
def class_targets(target_ptr, row, there, columns, ignore_index, DEBUG: tl.constexpr):
    """(a class to read, whether the row counts, whether its target is one) of rows that are there."""
    target = tl.load(target_ptr + row, mask=there, other=ignore_index)
    valid = (target >= 0) & (target < columns)
    if DEBUG:
        tl.device_assert(valid | (target == ignore_index), "cross entropy: a target is no class", mask=there)
    return tl.where(valid, target, 0), target != ignore_index, valid


@triton.jit
def coefficients(target_ptr, weight_ptr, column, inside, share, spread, PROBABILITIES: tl.constexpr):
    """a_c but for the one-hot of class numbers. target_ptr: the row's class probabilities. weight_ptr may be None."""
    if PROBABILITIES:
        a = share * tl.load(target_ptr + column, mask=inside, other=0.0).to(tl.float32) + spread
    else:
        a = spread + tl.zeros_like(column).to(tl.float32)
    if weight_ptr is not None:
        a *= tl.load(weight_ptr + column, mask=inside, other=0.0)
    return tl.where(inside, a, 0.0)


@triton.jit
def add_terms(top, total, weights, weighted, x, a):
    """`add_exponentials`, and for each lane the sums of a and of a (x - top)."""
    now, total = add_exponentials(top, total, x)
    weighted += tl.where(weights == 0.0, 0.0, weights * (top - now))
    weighted += tl.sum(tl.where(a == 0.0, 0.0, a * (x - now[None, :])), 0)
    return now, total, weights + tl.sum(a, 0), weighted


@triton.jit
def add_even_terms(top, total, weights, weighted, x, inside, spread):
    """`add_terms` where a is `spread` inside. What is summed up depends on x, NaN or not: what depends on no memory
    Triton lays out otherwise, and would bring from one layout to the other every time."""
    now, total = add_exponentials(top, total, x)
    weighted += tl.where(weights == 0.0, 0.0, weights * (top - now))
    weighted += spread * tl.sum(tl.where(inside, x - now[None, :], 0.0), 0)
    return now, total, weights + spread * tl.sum(tl.where(inside & (x == x), 1.0, 0.0), 0), weighted


@triton.jit
def sum_of_terms(top, weights, weighted, highest, log_total):
    """sum_c a_c (lse - x_c) of all lanes, lse = highest + log_total."""
    weighted += tl.where(weights == 0.0, 0.0, weights * (top - highest))
    return tl.sum(tl.where(weights == 0.0, 0.0, weights * log_total - weighted), 0)
