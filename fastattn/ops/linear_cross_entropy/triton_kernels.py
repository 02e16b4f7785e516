"""Device code of linear_cross_entropy: rows of logits to losses and to gradients, which may take the logits' place."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.gpu.functions import LOWEST, add_exponentials, combine_exponentials, exp, fast_exp
from fastattn.gpu.losses import add_even_terms, add_terms, class_targets, coefficients, sum_of_terms

#: What is no reason for another compilation: nothing is loaded faster for knowing it.
SIZES = ["rows", "ignore_index"]


@triton.jit
def _logits(logits_ptr, bias_ptr, column, inside):
    x = tl.load(logits_ptr + column, mask=inside, other=float("-inf"))
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _gradient(x, highest, inverse, a, whole, factor, PRECISE: tl.constexpr):
    """(softmax * sum(a) - a) * factor. whole: the sum of a."""
    p = (exp(x - highest) if PRECISE else fast_exp(x - highest)) * inverse
    return (p * whole - a) * factor


@triton.jit(do_not_specialize=SIZES)
def rows(
    logits_ptr, grads_ptr, losses_ptr, lse_ptr, bias_ptr, target_ptr, weight_ptr, factor_ptr, target_stride, rows,
    columns, ignore_index, smoothing,
    LOSSES: tl.constexpr, FACTORS: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr,
    DEBUG: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program for ROWS whole rows. grads_ptr: may be logits_ptr, or None. FACTORS: each row has one of its own."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    there = row < rows
    inside = there & (column < columns)
    share, spread = 1.0 - smoothing, smoothing / columns
    x = _logits(logits_ptr + row * columns, bias_ptr, column, inside)
    top = tl.max(x, 1)[:, None]
    top = tl.where(top == float("-inf"), LOWEST, top)
    e = fast_exp(x - top)
    total = tl.sum(e, 1)[:, None]
    log_total = tl.log(total)
    loss = tl.zeros_like(top)
    whole = tl.zeros_like(top)  # the sum of a; not taken of the one-hot, whose layout would have a row in every thread
    if PROBABILITIES or SMOOTH:
        a = coefficients(target_ptr + row * target_stride, weight_ptr, column, inside, share, spread, PROBABILITIES)
        whole += tl.sum(a, 1)[:, None] if PROBABILITIES or weight_ptr is not None else smoothing
        loss += tl.sum(tl.where(a == 0.0, 0.0, a * (log_total - (x - top))), 1)[:, None]
    else:
        a = tl.zeros_like(x)
    if not PROBABILITIES:
        target, counts, valid = class_targets(target_ptr, row, there, columns, ignore_index, DEBUG)
        # From registers: gradients may take the logits' place before a slower warp has read its target's.
        x_of_target = tl.sum(tl.where(column == target, x, 0.0), 1)[:, None]
        own = tl.zeros_like(top) + share
        if weight_ptr is not None:
            own *= tl.load(weight_ptr + target, mask=there, other=0.0)
        a += tl.where(column == target, own, 0.0)
        whole += own
        loss += tl.where(own == 0.0, 0.0, own * (log_total - (x_of_target - top)))
        loss = tl.where(counts, tl.where(valid, loss, float("nan")), 0.0)
    if LOSSES:
        tl.store(losses_ptr + row, loss, mask=there)
        tl.store(lse_ptr + row, top + log_total, mask=there)
    if grads_ptr is not None:
        PRECISE: tl.constexpr = grads_ptr.dtype.element_ty == tl.float32
        if PRECISE:
            total = tl.sum(exp(x - top), 1)[:, None]
        factor = tl.load(factor_ptr + row, mask=there, other=0.0) if FACTORS else tl.load(factor_ptr)
        found = _gradient(x, top, tl.div_rn(1.0, total), a, whole, factor, PRECISE)
        if not PROBABILITIES:
            found = tl.where(counts, tl.where(valid, found, float("nan")), 0.0)
        tl.store(grads_ptr + row * columns + column, found, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def long(
    logits_ptr, grads_ptr, losses_ptr, lse_ptr, bias_ptr, target_ptr, weight_ptr, factor_ptr, target_stride, rows,
    columns, ignore_index, smoothing,
    LOSSES: tl.constexpr, FACTORS: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr,
    DEBUG: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program for a row that is read twice, the second time from its end, which is still in the caches. Arguments as
    for `rows`."""
    SOFT: tl.constexpr = PROBABILITIES or SMOOTH
    TILE: tl.constexpr = PARTS * LANES
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * columns
    share, spread = 1.0 - smoothing, smoothing / columns
    place = tl.arange(0, PARTS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    own = 0.0
    if PROBABILITIES:
        target = -1
    else:
        target, counts, valid = class_targets(target_ptr, row, row < rows, columns, ignore_index, DEBUG)
        x_of_target = tl.load(logits_ptr + target)  # before a gradient takes its place
        if bias_ptr is not None:
            x_of_target += tl.load(bias_ptr + target).to(tl.float32)
        own += share
        if weight_ptr is not None:
            own *= tl.load(weight_ptr + target)
    top = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    weights = tl.zeros((LANES,), tl.float32)
    weighted = tl.zeros((LANES,), tl.float32)
    for start in range(0, columns, TILE):
        column = start + place
        inside = column < columns
        x = _logits(logits_ptr, bias_ptr, column, inside)
        if SOFT and (PROBABILITIES or weight_ptr is not None):
            a = coefficients(target_ptr + row * target_stride, weight_ptr, column, inside, share, spread, PROBABILITIES)
            top, total, weights, weighted = add_terms(top, total, weights, weighted, x, a)
        elif SOFT:
            top, total, weights, weighted = add_even_terms(top, total, weights, weighted, x, inside, spread)
        else:
            top, total = add_exponentials(top, total, x)
    highest, sum_of_all = combine_exponentials(top, total)
    whole = own + tl.sum(weights, 0)
    if LOSSES:
        log_total = tl.log(sum_of_all)
        loss = 0.0
        if SOFT:
            loss += sum_of_terms(top, weights, weighted, highest, log_total)
        if not PROBABILITIES:
            loss += tl.where(own == 0.0, 0.0, own * (log_total - (x_of_target - highest)))
            loss = tl.where(counts, tl.where(valid, loss, float("nan")), 0.0)
        tl.store(losses_ptr + row, loss)
        tl.store(lse_ptr + row, highest + log_total)
    if grads_ptr is not None:
        PRECISE: tl.constexpr = grads_ptr.dtype.element_ty == tl.float32
        grads_ptr += row * columns
        factor = tl.load(factor_ptr + row) if FACTORS else tl.load(factor_ptr)
        inverse = tl.div_rn(1.0, sum_of_all)
        last = (columns + TILE - 1) // TILE * TILE - TILE
        for back in range(0, columns, TILE):
            column = last - back + place
            inside = column < columns
            x = _logits(logits_ptr, bias_ptr, column, inside)
            if SOFT:
                a = coefficients(
                    target_ptr + row * target_stride, weight_ptr, column, inside, share, spread, PROBABILITIES
                )
                a += tl.where(column == target, own, 0.0)
            else:
                a = tl.where(column == target, own, 0.0)
            found = _gradient(x, highest, inverse, a, whole, factor, PRECISE)
            if not PROBABILITIES:
                found = tl.where(counts, tl.where(valid, found, float("nan")), 0.0)
            tl.store(grads_ptr + column, found, mask=inside)
