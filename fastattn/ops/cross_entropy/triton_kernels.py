"""Device code of cross entropy: losses of rows that are read once, their sum, gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.gpu.functions import LOWEST, add_exponentials, combine_exponentials, exp, fast_exp, tanh
from fastattn.gpu.losses import add_even_terms, add_terms, class_targets, coefficients, sum_of_terms

#: What is no reason for another compilation: nothing is loaded faster for knowing it.
SIZES = ["rows", "ignore_index"]


@triton.jit
def _capped(x, softcap, PRECISE: tl.constexpr):
    """softcap * tanh(x / softcap); for 16-bit logits with an absolute error of a rounding of softcap."""
    x = x / softcap
    if PRECISE:
        return softcap * tanh(x)
    e = fast_exp(-2.0 * tl.abs(x))
    bound = (1.0 - e) / (1.0 + e)
    return softcap * tl.where(x < 0.0, -bound, bound)


@triton.jit
def _slope(x, softcap):
    """The derivative of _capped at x, which does not cancel."""
    e = fast_exp(-2.0 * tl.abs(x / softcap))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit(do_not_specialize=SIZES)
def forward_rows(
    loss_ptr, lse_ptr, input_ptr, target_ptr, weight_ptr, input_stride, target_stride, rows, columns, ignore_index,
    smoothing, z_loss, softcap,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, CAPPED: tl.constexpr, DEBUG: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program for ROWS whole rows."""
    PRECISE: tl.constexpr = input_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    there = row < rows
    inside = there[:, None] & (column < columns)
    x = tl.load(input_ptr + row[:, None] * input_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    if CAPPED:
        x = tl.where(inside, _capped(x, softcap, PRECISE), float("-inf"))
    top = tl.max(x, 1)
    top = tl.where(top == float("-inf"), LOWEST, top)
    total = tl.sum(fast_exp(x - top[:, None]), 1)
    log_total = tl.log(total)
    lse = top + log_total
    share, spread = 1.0 - smoothing, smoothing / columns
    loss = tl.zeros((ROWS,), tl.float32)
    if PROBABILITIES or SMOOTH:
        a = coefficients(
            target_ptr + row[:, None] * target_stride, weight_ptr, column, inside, share, spread, PROBABILITIES
        )
        loss += tl.sum(tl.where(a == 0.0, 0.0, a * (log_total[:, None] - (x - top[:, None]))), 1)
    if not PROBABILITIES:
        target, counts, valid = class_targets(target_ptr, row, there, columns, ignore_index, DEBUG)
        own = tl.load(input_ptr + row * input_stride + target, mask=there, other=0.0).to(tl.float32)
        if CAPPED:
            own = _capped(own, softcap, PRECISE)
        a = share
        if weight_ptr is not None:
            a *= tl.load(weight_ptr + target, mask=there, other=0.0)
        loss += tl.where(a == 0.0, 0.0, a * (log_total - (own - top)))
    loss += tl.where(z_loss == 0.0, 0.0, z_loss * lse * lse)
    if not PROBABILITIES:
        loss = tl.where(counts, tl.where(valid, loss, float("nan")), 0.0)
    tl.store(loss_ptr + row, loss, mask=there)
    tl.store(lse_ptr + row, lse, mask=there)


@triton.jit(do_not_specialize=SIZES)
def forward_long(
    loss_ptr, lse_ptr, input_ptr, target_ptr, weight_ptr, input_stride, target_stride, rows, columns, ignore_index,
    smoothing, z_loss, softcap,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, CAPPED: tl.constexpr, DEBUG: tl.constexpr,
    PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program for a row: every lane keeps its own maximum, and sums relative to it."""
    PRECISE: tl.constexpr = input_ptr.dtype.element_ty == tl.float32
    SOFT: tl.constexpr = PROBABILITIES or SMOOTH
    row = tl.program_id(0).to(tl.int64)
    input_ptr += row * input_stride
    share, spread = 1.0 - smoothing, smoothing / columns
    if not PROBABILITIES:
        target, counts, valid = class_targets(target_ptr, row, row < rows, columns, ignore_index, DEBUG)
        own = tl.load(input_ptr + target).to(tl.float32)
        if CAPPED:
            own = _capped(own, softcap, PRECISE)
    place = tl.arange(0, PARTS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    top = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    weights = tl.zeros((LANES,), tl.float32)  # sums of a_c
    weighted = tl.zeros((LANES,), tl.float32)  # sums of a_c (x_c - top)
    for start in range(0, columns, PARTS * LANES):
        column = start + place
        inside = column < columns
        x = tl.load(input_ptr + column, mask=inside, other=float("-inf"), eviction_policy="evict_first")
        x = x.to(tl.float32)
        if CAPPED:
            x = tl.where(inside, _capped(x, softcap, PRECISE), float("-inf"))
        if SOFT and (PROBABILITIES or weight_ptr is not None):
            a = coefficients(target_ptr + row * target_stride, weight_ptr, column, inside, share, spread, PROBABILITIES)
            top, total, weights, weighted = add_terms(top, total, weights, weighted, x, a)
        elif SOFT:
            top, total, weights, weighted = add_even_terms(top, total, weights, weighted, x, inside, spread)
        else:
            top, total = add_exponentials(top, total, x)
    highest, whole = combine_exponentials(top, total)
    log_total = tl.log(whole)
    lse = highest + log_total
    loss = 0.0
    if SOFT:
        loss += sum_of_terms(top, weights, weighted, highest, log_total)
    if not PROBABILITIES:
        a = share
        if weight_ptr is not None:
            a *= tl.load(weight_ptr + target)
        loss += tl.where(a == 0.0, 0.0, a * (log_total - (own - highest)))
    loss += tl.where(z_loss == 0.0, 0.0, z_loss * lse * lse)
    if not PROBABILITIES:
        loss = tl.where(counts, tl.where(valid, loss, float("nan")), 0.0)
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)


@triton.jit(do_not_specialize=SIZES)
def reduce(
    loss_ptr, total_ptr, losses_ptr, shares_ptr, target_ptr, weight_ptr, rows, columns, ignore_index, chunk,
    MEAN: tl.constexpr, FINISH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of a chunk of rows, or of sums of chunks: of their losses (loss_ptr None: not), of their shares of what the
    mean divides by, which it does with the last ones.

    shares_ptr: shares; None: they follow from the targets, or are 1 each where target_ptr is None, too.
    """
    program = tl.program_id(0).to(tl.int64)
    loss = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    end = tl.minimum((program + 1) * chunk, rows)
    for start in range(0, chunk, BLOCK):
        row = program * chunk + start + tl.arange(0, BLOCK)
        there = row < end
        if loss_ptr is not None:
            loss += tl.load(losses_ptr + row, mask=there, other=0.0)
        if shares_ptr is not None:
            share = tl.load(shares_ptr + row, mask=there, other=0.0)
        elif target_ptr is not None:
            target, counts, _valid = class_targets(target_ptr, row, there, columns, ignore_index, False)
            share = tl.where(there & counts, 1.0, 0.0)
            if weight_ptr is not None:
                share *= tl.load(weight_ptr + target, mask=there & counts, other=0.0)
        else:
            share = tl.where(there, 1.0, 0.0)
        total += share
    divisor = tl.sum(total, 0)
    tl.store(total_ptr + program, divisor)
    if loss_ptr is not None:
        whole = tl.sum(loss, 0)
        tl.store(loss_ptr + program, whole / divisor if MEAN and FINISH else whole)


@triton.jit
def _gradient(x, raw, shift, inverse, a, whole, grad, extra, softcap, PRECISE: tl.constexpr, CAPPED: tl.constexpr):
    """(softmax * sum(a) - a) * grad + softmax * extra, through the cap. whole: the sum of a."""
    p = (exp(x - shift) if PRECISE else fast_exp(x - shift)) * inverse
    found = (p * whole - a) * grad + p * extra
    if CAPPED:
        found *= _slope(raw, softcap)
    return found


@triton.jit(do_not_specialize=SIZES)
def backward_rows(
    grad_input_ptr, grad_ptr, input_ptr, target_ptr, weight_ptr, weight_sum_ptr, lse_ptr, total_ptr,
    input_stride, target_stride, rows, columns, ignore_index, smoothing, z_loss, softcap,
    REDUCTION: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, CAPPED: tl.constexpr,
    DEBUG: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program for ROWS whole rows; their exponentials are summed up once more, for lse is rounded."""
    PRECISE: tl.constexpr = input_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    there = row < rows
    inside = there & (column < columns)
    counts = there
    share, spread = 1.0 - smoothing, smoothing / columns
    if not PROBABILITIES:
        target, counts, valid = class_targets(target_ptr, row, there, columns, ignore_index, DEBUG)
    raw = tl.load(input_ptr + row * input_stride + column, mask=inside & counts, other=float("-inf")).to(tl.float32)
    x = raw
    if CAPPED:
        x = tl.where(inside, _capped(raw, softcap, PRECISE), float("-inf"))
    top = tl.max(x, 1)[:, None]
    e = exp(x - top) if PRECISE else fast_exp(x - top)
    inverse = tl.div_rn(1.0, tl.sum(e, 1)[:, None])
    if REDUCTION == 0:
        grad = tl.load(grad_ptr + row, mask=there, other=0.0)
    else:
        grad = tl.load(grad_ptr)
        if REDUCTION == 1:
            grad /= tl.load(total_ptr)
        grad += tl.zeros_like(top)
    extra = tl.zeros_like(grad)
    if z_loss != 0.0:
        extra = grad * 2.0 * z_loss * tl.load(lse_ptr + row, mask=there, other=0.0)
    if PROBABILITIES:
        a = coefficients(target_ptr + row * target_stride, weight_ptr, column, inside, share, spread, True)
        whole = tl.sum(a, 1)[:, None]
    else:
        own = tl.zeros_like(grad) + share
        if weight_ptr is not None:
            own *= tl.load(weight_ptr + target, mask=there, other=0.0)
        whole = own
        a = tl.where(column == target, own, 0.0)
        if SMOOTH:
            whole += spread * (tl.load(weight_sum_ptr) if weight_ptr is not None else columns)
            a += coefficients(target_ptr, weight_ptr, column, inside, share, spread, False)
        grad = tl.where(valid, grad, float("nan"))
    found = _gradient(x, raw, top, inverse, a, whole, grad, extra, softcap, PRECISE, CAPPED)
    tl.store(grad_input_ptr + row * columns + column, tl.where(counts, found, 0.0), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def backward_long(
    grad_input_ptr, grad_ptr, input_ptr, target_ptr, weight_ptr, weight_sum_ptr, lse_ptr, total_ptr,
    input_stride, target_stride, rows, columns, ignore_index, smoothing, z_loss, softcap,
    REDUCTION: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, CAPPED: tl.constexpr,
    DEBUG: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program for a row. Its exponentials are summed up once more where the rounding of lse would show: always in
    float32, and where lse is huge; then the row is read a second time, from its end, which is still in the caches."""
    PRECISE: tl.constexpr = input_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    grad_input_ptr += row * columns
    input_ptr += row * input_stride
    place = tl.arange(0, PARTS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    share, spread = 1.0 - smoothing, smoothing / columns
    counts = row < rows
    if not PROBABILITIES:
        target, counts, valid = class_targets(target_ptr, row, row < rows, columns, ignore_index, DEBUG)
    if not counts:
        for start in range(0, columns, PARTS * LANES):
            column = start + place
            tl.store(grad_input_ptr + column, tl.zeros((PARTS, LANES), tl.float32), mask=column < columns)
        return
    lse = tl.load(lse_ptr + row)
    grad = tl.load(grad_ptr + row) if REDUCTION == 0 else tl.load(grad_ptr)
    if REDUCTION == 1:
        grad /= tl.load(total_ptr)
    extra = tl.where(z_loss == 0.0, 0.0, grad * 2.0 * z_loss * lse)
    if PROBABILITIES:
        sums = tl.zeros((LANES,), tl.float32)
        for start in range(0, columns, PARTS * LANES):
            column = start + place
            inside = column < columns
            a = coefficients(target_ptr + row * target_stride, weight_ptr, column, inside, share, spread, True)
            sums += tl.sum(a, 0)
        whole = tl.sum(sums, 0)
        own = 0.0
        target = -1
    else:
        own = share
        if weight_ptr is not None:
            own *= tl.load(weight_ptr + target)
        whole = own
        if SMOOTH:
            whole += spread * (tl.load(weight_sum_ptr) if weight_ptr is not None else columns)
        grad = tl.where(valid, grad, float("nan"))
    shift = lse
    inverse = 1.0
    if PRECISE or tl.abs(lse) > 1024.0:
        top = tl.full((LANES,), LOWEST, tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        for start in range(0, columns, PARTS * LANES):
            column = start + place
            x = tl.load(input_ptr + column, mask=column < columns, other=float("-inf"), eviction_policy="evict_last")
            x = x.to(tl.float32)
            if CAPPED:
                x = tl.where(column < columns, _capped(x, softcap, PRECISE), float("-inf"))
            top, total = add_exponentials(top, total, x)
        shift, sum_again = combine_exponentials(top, total)
        inverse = tl.div_rn(1.0, sum_again)
    last = (columns + PARTS * LANES - 1) // (PARTS * LANES) * (PARTS * LANES) - PARTS * LANES
    for back in range(0, columns, PARTS * LANES):
        column = last - back + place
        inside = column < columns
        raw = tl.load(input_ptr + column, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        x = raw
        if CAPPED:
            x = _capped(raw, softcap, PRECISE)
        if PROBABILITIES or SMOOTH:
            a = coefficients(target_ptr + row * target_stride, weight_ptr, column, inside, share, spread, PROBABILITIES)
            a += tl.where(column == target, own, 0.0)
        else:
            a = tl.where(column == target, own, 0.0)
        found = _gradient(x, raw, shift, inverse, a, whole, grad, extra, softcap, PRECISE, CAPPED)
        tl.store(grad_input_ptr + column, found, mask=inside)
