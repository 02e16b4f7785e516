"""Cross entropy in plain torch, float32 (float64 for float64) inside."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.dispatch import Implementation
from fastattn.losses import check_targets, coefficients
from fastattn.numerics import accumulation_dtype


def _logits(input: Tensor, softcap: float) -> Tensor:
    x = input.to(accumulation_dtype(input.dtype))
    return softcap * (x / softcap).tanh() if softcap else x


def _ignored(target: Tensor, ignore_index: int) -> Tensor:
    """(rows,) bool"""
    if target.is_floating_point():
        return target.new_zeros(target.shape[:1], dtype=torch.bool)
    return target == ignore_index


def forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, lse, total): per row or reduced loss, log-sum-exp of each row, the divisor of the mean."""
    check_targets("cross_entropy", target, input.shape[1], ignore_index)
    x = _logits(input, softcap)
    lse = torch.logsumexp(x, dim=1) if x.shape[1] else x.new_full(x.shape[:1], -torch.inf)
    a, divisor = coefficients(target, weight, x.shape[1], x.dtype, ignore_index, label_smoothing)
    # Not lse - x: far from zero that would cancel. 0 * inf: a class that does not count adds nothing, however
    # impossible it is.
    terms = (a * -torch.log_softmax(x, dim=1)).masked_fill(a == 0.0, 0.0)
    loss, total = terms.sum(1), divisor.sum()
    if z_loss:
        loss = loss + (z_loss * lse.square()).masked_fill(_ignored(target, ignore_index), 0.0)
    if reduction == 1:
        loss = loss.sum() / total
    elif reduction == 2:
        loss = loss.sum()
    return loss, lse, total


def backward(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    total: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """(softmax(x) * sum(a) - a) * grad, grad divided by the total for the mean."""
    x = _logits(input, softcap)
    a, _ = coefficients(target, weight, x.shape[1], x.dtype, ignore_index, label_smoothing)
    per_row = grad[:, None] if reduction == 0 else (grad / total if reduction == 1 else grad)
    # Not exp(x - lse): the rounding of a large lse would be an error of the whole row.
    probabilities = torch.softmax(x, dim=1)
    ignored = _ignored(target, ignore_index)[:, None]
    gradient = ((probabilities * a.sum(1, keepdim=True) - a) * per_row).masked_fill(ignored, 0.0)
    if z_loss:
        share = 2.0 * z_loss * torch.logsumexp(x, dim=1, keepdim=True) * probabilities
        gradient = gradient + (share * per_row).masked_fill(ignored, 0.0)
    if softcap:
        gradient = gradient * (1.0 - (x / softcap).square())
    return gradient.to(input.dtype).contiguous()


IMPLEMENTATION = Implementation(lambda problem: None, forward, backward, differentiable=True)
