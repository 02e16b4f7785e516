"""What device code of cross entropy has in common, of logits that are there and of logits that are made on the way.

Coefficients a_c = weight_c * ((1 - smoothing) * t_c + smoothing / C); a class with a_c = 0 adds nothing, however
impossible it is. share is 1 - smoothing, spread is smoothing / C. Targets that are no class are not followed: the row
is NaN. Whole rows are the first dimension of a tile; a long row is in tiles of lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.gpu.functions import LOWEST, add_exponentials, exponentials, no_exponentials


@triton.jit
def class_targets(target_ptr, row, there, columns, ignore_index):
    """(a class to read, whether the row counts, whether its target is one) of rows that are there."""
    target = tl.load(target_ptr + row, mask=there, other=ignore_index)
    valid = (target >= 0) & (target < columns)
    tl.device_assert(valid | (target == ignore_index), "cross entropy: a target is no class", mask=there)
    return tl.where(valid, target, 0), target != ignore_index, valid


@triton.jit
def own_coefficient(weight_ptr, target, there, share):
    """The one-hot's part of a."""
    if weight_ptr is not None:
        share *= tl.load(weight_ptr + target, mask=there, other=0.0)
    return share


@triton.jit
def targets(target_ptr, weight_ptr, row, there, columns, ignore_index, share, PROBABILITIES: tl.constexpr):
    """`class_targets` with the `own_coefficient` second; for class probabilities no class, and nothing of its own."""
    if PROBABILITIES:
        return -1, 0.0, there, there
    else:
        target, counts, valid = class_targets(target_ptr, row, there, columns, ignore_index)
        return target, own_coefficient(weight_ptr, target, there, share), counts, valid


@triton.jit
def judged(x, counts, valid):
    """x, 0 of rows that do not count, NaN of those whose target is no class."""
    return tl.where(counts, tl.where(valid, x, float("nan")), 0.0)


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
def whole_coefficients(
    target_ptr, weight_ptr, column, inside, target, own, share, spread,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """a_c. target, own: as `targets` has them."""
    if PROBABILITIES:
        return coefficients(target_ptr, weight_ptr, column, inside, share, spread, True)
    else:
        a = tl.where(column == target, own, 0.0)
        if SMOOTH:
            a += coefficients(target_ptr, weight_ptr, column, inside, share, spread, False)
        return a


@triton.jit
def term(a, log_total, x):
    """a (lse - x), x and lse relative to the row's maximum."""
    return tl.where(a == 0.0, 0.0, a * (log_total - x))


@triton.jit
def probability(x, top, inverse, PRECISE: tl.constexpr):
    """softmax(x). inverse: one over the row's sum of exponentials relative to top."""
    return exponentials(x - top, PRECISE) * inverse


@triton.jit
def no_terms(LANES: tl.constexpr):
    """(top, total, weights, weighted) for `add_terms` to begin with."""
    top, total = no_exponentials(LANES)
    return top, total, tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)


@triton.jit
def add_terms(
    top, total, weights, weighted, x, target_ptr, weight_ptr, column, inside, share, spread,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """`add_exponentials`, and for each lane the sums of a and of a (x - top), but for the one-hot of class numbers."""
    now, total = add_exponentials(top, total, x)
    if PROBABILITIES or SMOOTH:
        weighted += tl.where(weights == 0.0, 0.0, weights * (top - now))
        away = x - now[None, :]
        if PROBABILITIES or weight_ptr is not None:
            a = coefficients(target_ptr, weight_ptr, column, inside, share, spread, PROBABILITIES)
            weights += tl.sum(a, 0)
            weighted += tl.sum(tl.where(a == 0.0, 0.0, a * away), 0)
        else:
            # a is `spread` inside. What is summed up depends on x, NaN or not: what depends on no memory Triton lays
            # out otherwise, and would bring from one layout to the other every time.
            weights += spread * tl.sum(tl.where(inside & (x == x), 1.0, 0.0), 0)
            weighted += spread * tl.sum(tl.where(inside, away, 0.0), 0)
    return now, total, weights, weighted


@triton.jit
def sum_of_terms(top, weights, weighted, highest, log_total):
    """sum_c a_c (lse - x_c) of all lanes, lse = highest + log_total."""
    weighted += tl.where(weights == 0.0, 0.0, weights * (top - highest))
    return tl.sum(tl.where(weights == 0.0, 0.0, weights * log_total - weighted), 0)


@triton.jit
def highest_of_rows(x):
    """Finite where a row is -inf."""
    top = tl.max(x, 1)
    return tl.where(top == float("-inf"), LOWEST, top)
