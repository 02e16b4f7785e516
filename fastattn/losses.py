"""What cross_entropy and linear_cross_entropy have in common: what they ask of targets, weights and options, the
gradient of class probabilities, the coefficients of classes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.numerics import FLOATING

REDUCTIONS = ("none", "mean", "sum")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_weight(op: str, weight: Tensor | None, classes: int) -> None:
    """ValueError unless there is a number for every class."""
    if weight is not None and (tuple(weight.shape) != (classes,) or weight.dtype not in FLOATING):
        raise ValueError(
            f"{op}: weight must be floating of shape ({classes},), got {weight.dtype} {tuple(weight.shape)}"
        )


def check_options(op: str, reduction: str, label_smoothing: float) -> None:
    """ValueError for what means nothing."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")


def check_targets(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """RuntimeError for an index target that is no class, in the native kernels' words. Asked where that costs no
    synchronisation: of CPU tensors that hold values."""
    if target.device.type != "cpu" or target.is_floating_point() or torch._C._functorch.is_batchedtensor(target):
        return
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise RuntimeError(
            f"{op}: target {int(target[row])} at row {row} is not in [0, {classes}) and is not ignore_index"
            f" ({ignore_index})"
        )


# ---- in plain torch, for every backend ----


def grad_probabilities(
    grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, lse: Tensor, smoothing: float, reduction: int
) -> Tensor:
    """Gradient of class-probability targets: -(1 - smoothing) * weight * log_softmax."""
    logits = logits.to(lse.dtype)
    # For a second derivative lse is no constant.
    log_probabilities = torch.log_softmax(logits, -1) if torch.is_grad_enabled() else logits - lse[:, None]
    if weight is not None:
        log_probabilities = log_probabilities * weight
    per_row = grad[:, None] if reduction == 0 else grad / (logits.shape[0] if reduction == 1 else 1)
    return (log_probabilities * per_row * (smoothing - 1.0)).to(target.dtype)


def coefficients(
    target: Tensor, weight: Tensor | None, classes: int, dtype: torch.dtype, ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """a (rows, C), 0 in ignored rows: a row's loss is sum(a * -log_softmax); and what each row adds to the divisor of
    the mean, (rows,)."""
    rows = target.shape[0]
    if target.is_floating_point():
        a = target.to(dtype) * (1.0 - smoothing) + smoothing / max(classes, 1)
        return a if weight is None else a * weight, torch.ones(rows, dtype=dtype, device=target.device)
    kept = target != ignore_index
    safe = target.masked_fill(~kept, 0)
    one_hot = torch.zeros(rows, classes, dtype=dtype, device=target.device).scatter(1, safe[:, None], 1.0)
    a = one_hot * (1.0 - smoothing) + smoothing / max(classes, 1)
    divisor = kept.to(dtype)
    if weight is not None:
        a, divisor = a * weight, divisor * weight[safe]
    return a * kept[:, None], divisor
