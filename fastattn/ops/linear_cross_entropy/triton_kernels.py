"""Device code of linear_cross_entropy: rows of logits to losses and to gradients, which may take the logits' place."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.gpu.functions import combine_exponentials, exponentials, fast_exp, last_tile, row_tile
from fastattn.gpu.losses import (
    add_terms,
    class_targets,
    coefficients,
    highest_of_rows,
    judged,
    no_terms,
    own_coefficient,
    probability,
    sum_of_terms,
    targets,
    term,
    whole_coefficients,
)

#: What is no reason for another compilation: nothing is loaded faster for knowing it.
SIZES = ["rows", "ignore_index"]


@triton.jit
def _logits(logits_ptr, bias_ptr, column, inside):
    x = tl.load(logits_ptr + column, mask=inside, other=float("-inf"))
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _factor(factor_ptr, row, there, FACTORS: tl.constexpr):
    """Of a row's gradients."""
    return tl.load(factor_ptr + row, mask=there, other=0.0) if FACTORS else tl.load(factor_ptr)


@triton.jit(do_not_specialize=SIZES)
def rows(
    logits_ptr, grads_ptr, losses_ptr, lse_ptr, bias_ptr, target_ptr, weight_ptr, factor_ptr, target_stride, rows,
    columns, ignore_index, smoothing,
    LOSSES: tl.constexpr, FACTORS: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program for ROWS whole rows. grads_ptr: may be logits_ptr, or None. FACTORS: each row has one of its own."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    there = row < rows
    inside = there & (column < columns)
    share, spread = 1.0 - smoothing, smoothing / columns
    x = _logits(logits_ptr + row * columns, bias_ptr, column, inside)
    top = highest_of_rows(x)[:, None]
    total = tl.sum(fast_exp(x - top), 1)[:, None]
    log_total = tl.log(total)
    loss = tl.zeros_like(top)
    whole = tl.zeros_like(top)  # the sum of a; not taken of the one-hot, whose layout would have a row in every thread
    if PROBABILITIES or SMOOTH:
        a = coefficients(target_ptr + row * target_stride, weight_ptr, column, inside, share, spread, PROBABILITIES)
        whole += tl.sum(a, 1)[:, None] if PROBABILITIES or weight_ptr is not None else smoothing
        loss += tl.sum(term(a, log_total, x - top), 1)[:, None]
    else:
        a = tl.zeros_like(x)
    if not PROBABILITIES:
        target, counts, valid = class_targets(target_ptr, row, there, columns, ignore_index)
        # From registers: gradients may take the logits' place before a slower warp has read its target's.
        x_of_target = tl.sum(tl.where(column == target, x, 0.0), 1)[:, None]
        own = own_coefficient(weight_ptr, target, there, share)
        a += tl.where(column == target, own, 0.0)
        whole += own
        loss = judged(loss + term(own, log_total, x_of_target - top), counts, valid)
    if LOSSES:
        tl.store(losses_ptr + row, loss, mask=there)
        tl.store(lse_ptr + row, top + log_total, mask=there)
    if grads_ptr is not None:
        PRECISE: tl.constexpr = grads_ptr.dtype.element_ty == tl.float32
        if PRECISE:
            total = tl.sum(exponentials(x - top, True), 1)[:, None]
        p = probability(x, top, tl.div_rn(1.0, total), PRECISE)
        found = (p * whole - a) * _factor(factor_ptr, row, there, FACTORS)
        if not PROBABILITIES:
            found = judged(found, counts, valid)
        tl.store(grads_ptr + row * columns + column, found, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def long(
    logits_ptr, grads_ptr, losses_ptr, lse_ptr, bias_ptr, target_ptr, weight_ptr, factor_ptr, target_stride, rows,
    columns, ignore_index, smoothing,
    LOSSES: tl.constexpr, FACTORS: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr,
    PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program for a row that is read twice, the second time from its end, which is still in the caches. Arguments as
    for `rows`."""
    TILE: tl.constexpr = PARTS * LANES
    row = tl.program_id(0).to(tl.int64)
    there = row < rows
    logits_ptr += row * columns
    share, spread = 1.0 - smoothing, smoothing / columns
    place = row_tile(PARTS, LANES)
    target, own, counts, valid = targets(
        target_ptr, weight_ptr, row, there, columns, ignore_index, share, PROBABILITIES
    )
    target_ptr += row * target_stride
    if not PROBABILITIES:
        x_of_target = _logits(logits_ptr, bias_ptr, target, there)  # before a gradient takes its place
    top, total, weights, weighted = no_terms(LANES)
    for start in range(0, columns, TILE):
        column = start + place
        inside = column < columns
        x = _logits(logits_ptr, bias_ptr, column, inside)
        top, total, weights, weighted = add_terms(
            top, total, weights, weighted, x, target_ptr, weight_ptr, column, inside, share, spread, PROBABILITIES,
            SMOOTH,
        )  # fmt: skip
    highest, sum_of_all = combine_exponentials(top, total)
    if LOSSES:
        log_total = tl.log(sum_of_all)
        loss = 0.0
        if PROBABILITIES or SMOOTH:
            loss += sum_of_terms(top, weights, weighted, highest, log_total)
        if not PROBABILITIES:
            loss += term(own, log_total, x_of_target - highest)
        tl.store(losses_ptr + row, judged(loss, counts, valid))
        tl.store(lse_ptr + row, highest + log_total)
    if grads_ptr is not None:
        PRECISE: tl.constexpr = grads_ptr.dtype.element_ty == tl.float32
        grads_ptr += row * columns
        factor = _factor(factor_ptr, row, there, FACTORS)
        whole = own + tl.sum(weights, 0)
        inverse = tl.div_rn(1.0, sum_of_all)
        last = last_tile(columns, TILE)
        for back in range(0, columns, TILE):
            column = last - back + place
            inside = column < columns
            x = _logits(logits_ptr, bias_ptr, column, inside)
            a = whole_coefficients(
                target_ptr, weight_ptr, column, inside, target, own, share, spread, PROBABILITIES, SMOOTH
            )
            found = (probability(x, highest, inverse, PRECISE) * whole - a) * factor
            if not PROBABILITIES:
                found = judged(found, counts, valid)
            tl.store(grads_ptr + column, found, mask=inside)
