"""Device code of cross entropy: losses of rows that are read once, their sum, gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.gpu.functions import (
    add_exponentials,
    combine_exponentials,
    exponentials,
    fast_exp,
    fill,
    last_tile,
    no_exponentials,
    row_tile,
    tanh,
)
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


@triton.jit
def _logits(raw, softcap, inside, CAPPED: tl.constexpr, PRECISE: tl.constexpr):
    """What was loaded, capped. inside: the cap leaves -inf elsewhere; None where that makes no difference."""
    x = raw.to(tl.float32)
    if CAPPED:
        x = _capped(x, softcap, PRECISE)
        if inside is not None:
            x = tl.where(inside, x, float("-inf"))
    return x


@triton.jit
def _z_loss(z_loss, lse):
    return tl.where(z_loss == 0.0, 0.0, z_loss * lse * lse)


@triton.jit(do_not_specialize=SIZES)
def forward_rows(
    loss_ptr, lse_ptr, input_ptr, target_ptr, weight_ptr, input_stride, target_stride, rows, columns, ignore_index,
    smoothing, z_loss, softcap,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program for ROWS whole rows."""
    PRECISE: tl.constexpr = input_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    there = row < rows
    inside = there[:, None] & (column < columns)
    raw = tl.load(input_ptr + row[:, None] * input_stride + column, mask=inside, other=float("-inf"))
    x = _logits(raw, softcap, inside, CAPPED, PRECISE)
    top = highest_of_rows(x)
    log_total = tl.log(tl.sum(fast_exp(x - top[:, None]), 1))
    lse = top + log_total
    share, spread = 1.0 - smoothing, smoothing / columns
    loss = tl.zeros_like(lse)
    if PROBABILITIES or SMOOTH:
        a = coefficients(
            target_ptr + row[:, None] * target_stride, weight_ptr, column, inside, share, spread, PROBABILITIES
        )
        loss += tl.sum(term(a, log_total[:, None], x - top[:, None]), 1)
    if not PROBABILITIES:
        target, counts, valid = class_targets(target_ptr, row, there, columns, ignore_index)
        raw = tl.load(input_ptr + row * input_stride + target, mask=there, other=0.0)
        x_of_target = _logits(raw, softcap, there, CAPPED, PRECISE)
        loss += term(own_coefficient(weight_ptr, target, there, share), log_total, x_of_target - top)
    loss += _z_loss(z_loss, lse)
    if not PROBABILITIES:
        loss = judged(loss, counts, valid)
    tl.store(loss_ptr + row, loss, mask=there)
    tl.store(lse_ptr + row, lse, mask=there)


@triton.jit(do_not_specialize=SIZES)
def forward_long(
    loss_ptr, lse_ptr, input_ptr, target_ptr, weight_ptr, input_stride, target_stride, rows, columns, ignore_index,
    smoothing, z_loss, softcap,
    PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, CAPPED: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program for a row: every lane keeps its own maximum, and sums relative to it."""
    PRECISE: tl.constexpr = input_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    input_ptr += row * input_stride
    share, spread = 1.0 - smoothing, smoothing / columns
    target, own, counts, valid = targets(
        target_ptr, weight_ptr, row, row < rows, columns, ignore_index, share, PROBABILITIES
    )
    if not PROBABILITIES:
        x_of_target = _logits(tl.load(input_ptr + target), softcap, None, CAPPED, PRECISE)
    place = row_tile(PARTS, LANES)
    top, total, weights, weighted = no_terms(LANES)
    for start in range(0, columns, PARTS * LANES):
        column = start + place
        inside = column < columns
        raw = tl.load(input_ptr + column, mask=inside, other=float("-inf"), eviction_policy="evict_first")
        x = _logits(raw, softcap, inside, CAPPED, PRECISE)
        top, total, weights, weighted = add_terms(
            top, total, weights, weighted, x, target_ptr + row * target_stride, weight_ptr, column, inside, share,
            spread, PROBABILITIES, SMOOTH,
        )  # fmt: skip
    highest, whole = combine_exponentials(top, total)
    log_total = tl.log(whole)
    lse = highest + log_total
    loss = 0.0
    if PROBABILITIES or SMOOTH:
        loss += sum_of_terms(top, weights, weighted, highest, log_total)
    if not PROBABILITIES:
        loss += term(own, log_total, x_of_target - highest)
    tl.store(loss_ptr + row, judged(loss + _z_loss(z_loss, lse), counts, valid))
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
            target, counts, _valid = class_targets(target_ptr, row, there, columns, ignore_index)
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
def _flowing(grad_ptr, total_ptr, row, there, REDUCTION: tl.constexpr):
    """The gradient of a row's loss."""
    if REDUCTION == 0:
        return tl.load(grad_ptr + row, mask=there, other=0.0)
    elif REDUCTION == 1:
        return tl.load(grad_ptr) / tl.load(total_ptr)
    else:
        return tl.load(grad_ptr)


@triton.jit
def _sum_of_coefficients(own, weight_ptr, weight_sum_ptr, columns, spread, SMOOTH: tl.constexpr):
    """Of class numbers."""
    if SMOOTH:
        own += spread * (tl.load(weight_sum_ptr) if weight_ptr is not None else columns)
    return own


@triton.jit
def _gradient(x, raw, shift, inverse, a, whole, grad, extra, softcap, PRECISE: tl.constexpr, CAPPED: tl.constexpr):
    """(softmax * sum(a) - a) * grad + softmax * extra, through the cap. whole: the sum of a."""
    p = probability(x, shift, inverse, PRECISE)
    found = (p * whole - a) * grad + p * extra
    if CAPPED:
        found *= _slope(raw, softcap)
    return found


@triton.jit(do_not_specialize=SIZES)
def backward_rows(
    grad_input_ptr, grad_ptr, input_ptr, target_ptr, weight_ptr, weight_sum_ptr, lse_ptr, total_ptr,
    input_stride, target_stride, rows, columns, ignore_index, smoothing, z_loss, softcap,
    REDUCTION: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, CAPPED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program for ROWS whole rows; their exponentials are summed up once more, for lse is rounded."""
    PRECISE: tl.constexpr = input_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    there = row < rows
    inside = there & (column < columns)
    share, spread = 1.0 - smoothing, smoothing / columns
    target, own, counts, valid = targets(
        target_ptr, weight_ptr, row, there, columns, ignore_index, share, PROBABILITIES
    )
    raw = tl.load(input_ptr + row * input_stride + column, mask=inside & counts, other=float("-inf")).to(tl.float32)
    x = _logits(raw, softcap, inside, CAPPED, PRECISE)
    top = tl.max(x, 1)[:, None]
    inverse = tl.div_rn(1.0, tl.sum(exponentials(x - top, PRECISE), 1)[:, None])
    grad = _flowing(grad_ptr, total_ptr, row, there, REDUCTION) + tl.zeros_like(top)
    extra = tl.zeros_like(grad)
    if z_loss != 0.0:
        extra = grad * 2.0 * z_loss * tl.load(lse_ptr + row, mask=there, other=0.0)
    a = whole_coefficients(
        target_ptr + row * target_stride, weight_ptr, column, inside, target, own, share, spread, PROBABILITIES, SMOOTH
    )
    if PROBABILITIES:
        whole = tl.sum(a, 1)[:, None]
    else:
        whole = _sum_of_coefficients(own, weight_ptr, weight_sum_ptr, columns, spread, SMOOTH)
        grad = tl.where(valid, grad, float("nan"))
    found = _gradient(x, raw, top, inverse, a, whole, grad, extra, softcap, PRECISE, CAPPED)
    tl.store(grad_input_ptr + row * columns + column, tl.where(counts, found, 0.0), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def backward_long(
    grad_input_ptr, grad_ptr, input_ptr, target_ptr, weight_ptr, weight_sum_ptr, lse_ptr, total_ptr,
    input_stride, target_stride, rows, columns, ignore_index, smoothing, z_loss, softcap,
    REDUCTION: tl.constexpr, PROBABILITIES: tl.constexpr, SMOOTH: tl.constexpr, CAPPED: tl.constexpr,
    PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program for a row. Its exponentials are summed up once more where the rounding of lse would show: always in
    float32, and where lse is huge; then the row is read a second time, from its end, which is still in the caches."""
    PRECISE: tl.constexpr = input_ptr.dtype.element_ty == tl.float32
    TILE: tl.constexpr = PARTS * LANES
    row = tl.program_id(0).to(tl.int64)
    grad_input_ptr += row * columns
    input_ptr += row * input_stride
    place = row_tile(PARTS, LANES)
    share, spread = 1.0 - smoothing, smoothing / columns
    target, own, counts, valid = targets(
        target_ptr, weight_ptr, row, row < rows, columns, ignore_index, share, PROBABILITIES
    )
    target_ptr += row * target_stride
    if not counts:
        fill(grad_input_ptr, 0.0, 0, columns, PARTS, LANES)
        return
    lse = tl.load(lse_ptr + row)
    grad = _flowing(grad_ptr, total_ptr, row, row < rows, REDUCTION)
    extra = tl.where(z_loss == 0.0, 0.0, grad * 2.0 * z_loss * lse)
    if PROBABILITIES:
        sums = tl.zeros((LANES,), tl.float32)
        for start in range(0, columns, TILE):
            column = start + place
            sums += tl.sum(coefficients(target_ptr, weight_ptr, column, column < columns, share, spread, True), 0)
        whole = tl.sum(sums, 0)
    else:
        whole = _sum_of_coefficients(own, weight_ptr, weight_sum_ptr, columns, spread, SMOOTH)
        grad = tl.where(valid, grad, float("nan"))
    shift = lse
    inverse = 1.0
    if PRECISE or tl.abs(lse) > 1024.0:
        top, total = no_exponentials(LANES)
        for start in range(0, columns, TILE):
            column = start + place
            inside = column < columns
            raw = tl.load(input_ptr + column, mask=inside, other=float("-inf"), eviction_policy="evict_last")
            top, total = add_exponentials(top, total, _logits(raw, softcap, inside, CAPPED, PRECISE))
        shift, sum_again = combine_exponentials(top, total)
        inverse = tl.div_rn(1.0, sum_again)
    last = last_tile(columns, TILE)
    for back in range(0, columns, TILE):
        column = last - back + place
        inside = column < columns
        raw = tl.load(input_ptr + column, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        x = _logits(raw, softcap, None, CAPPED, PRECISE)
        a = whole_coefficients(
            target_ptr, weight_ptr, column, inside, target, own, share, spread, PROBABILITIES, SMOOTH
        )
        found = _gradient(x, raw, shift, inverse, a, whole, grad, extra, softcap, PRECISE, CAPPED)
        tl.store(grad_input_ptr + column, found, mask=inside)
