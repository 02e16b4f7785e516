"""linear_cross_entropy in plain torch: all logits at once, float32 (float64 for float64) from the products on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear as torchs_linear

from fastattn.dispatch import Implementation
from fastattn.losses import check_targets, coefficients
from fastattn.numerics import accumulation_dtype


def _logits(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    acc = accumulation_dtype(input.dtype)
    return torchs_linear(input.to(acc), weight.to(acc), None if bias is None else bias.to(acc))


def _gradients(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of input, weight and bias, in the accumulation dtype."""
    logits = _logits(input, weight, bias)
    a, divisor = coefficients(target, class_weight, logits.shape[1], logits.dtype, ignore_index, smoothing)
    per_row = grad[:, None] if reduction == 0 else (grad / divisor.sum() if reduction == 1 else grad)
    of_logits = (torch.softmax(logits, 1) * a.sum(1, keepdim=True) - a) * per_row
    if not target.is_floating_point():
        of_logits = of_logits.masked_fill((target == ignore_index)[:, None], 0.0)
    return of_logits @ weight.to(logits.dtype), of_logits.t() @ input.to(logits.dtype), of_logits.sum(0)


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, lse, gradients of a reduced loss that were asked for)."""
    check_targets("linear_cross_entropy", target, weight.shape[0], ignore_index)
    logits = _logits(input, weight, bias)
    lse = torch.logsumexp(logits, 1) if logits.shape[1] else logits.new_full(logits.shape[:1], -torch.inf)
    a, divisor = coefficients(target, class_weight, logits.shape[1], logits.dtype, ignore_index, label_smoothing)
    loss = (a * -torch.log_softmax(logits, 1)).masked_fill(a == 0.0, 0.0).sum(1)
    if reduction == 1:
        loss = loss.sum() / divisor.sum()
    elif reduction == 2:
        loss = loss.sum()
    wanted = (input_grad, weight_grad, bias_grad)
    gradients = [logits.new_empty((0,)) for _ in wanted]
    if any(wanted):
        options = (ignore_index, label_smoothing, reduction)
        found = _gradients(logits.new_ones(()), input, weight, bias, target, class_weight, *options)
        gradients = [f.contiguous() if w else g for f, g, w in zip(found, gradients, wanted, strict=True)]
    return loss, lse, gradients[0], gradients[1], gradients[2]


def backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    lse: Tensor,
    ahead_input: Tensor,
    ahead_weight: Tensor,
    ahead_bias: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the inputs, not from the gradients that were computed ahead, so that it can be differentiated."""
    options = (ignore_index, label_smoothing, reduction)
    found = _gradients(grad, input, weight, bias, target, class_weight, *options)
    wanted = (input_grad, weight_grad, bias_grad and bias is not None)
    likes = (input, weight, input if bias is None else bias)
    gradients = [
        g.to(like.dtype).contiguous() if w else like.new_empty((0,))
        for g, w, like in zip(found, wanted, likes, strict=True)
    ]
    return gradients[0], gradients[1], gradients[2]


IMPLEMENTATION = Implementation(lambda problem: None, forward, backward, differentiable=True)
