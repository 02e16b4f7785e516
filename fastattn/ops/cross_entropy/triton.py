"""Cross entropy on the triton backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.dispatch import Implementation, takes_dtype
from fastattn.gpu import devices, tuning
from fastattn.gpu.deferred import Deferred
from fastattn.gpu.rows import as_rows
from fastattn.losses import check_targets

KERNELS = Deferred("fastattn.ops.cross_entropy.triton_kernels")
CHUNK = 8192  # rows whose losses are summed up by one program


def _targets(target: Tensor) -> tuple[Tensor, int, bool]:
    """(class numbers or rows of probabilities, from one row to the next, whether they are probabilities)"""
    if target.dtype == torch.int64:
        return target.contiguous(), 1, False
    return *as_rows(target), True


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
    rows, columns = input.shape
    device = input.device
    on = devices.target_of(device)
    if on.interpreted:  # on a GPU kernels stay within memory, and say so under FASTATTN_DEBUG
        check_targets("cross_entropy", target, columns, ignore_index)
    losses = torch.empty(rows, dtype=torch.float32, device=device)
    lse, total = torch.empty_like(losses), torch.empty((), dtype=torch.float32, device=device)
    loss = losses if reduction == 0 else torch.empty_like(total)
    goal, goal_stride, probabilities = _targets(target)
    with devices.on(input):
        if columns == 0:
            lse.fill_(-torch.inf)
            losses.fill_(torch.inf if z_loss else 0.0)
        elif rows > 0:
            read, stride = as_rows(input)
            kernel, together, options = tuning.row_kernel("cross_entropy", "forward_rows", "forward_long", on, columns)
            getattr(KERNELS, kernel)[(-(-rows // together),)](
                losses, lse, read, goal, weight, stride, goal_stride, rows, columns, ignore_index,
                label_smoothing, z_loss, softcap,
                PROBABILITIES=probabilities, SMOOTH=label_smoothing > 0.0, CAPPED=softcap > 0.0,
                **options, **devices.assertions(on),
            )  # fmt: skip
        _reduce(
            None if reduction == 0 else loss, total, losses, None if probabilities else goal, weight, columns,
            ignore_index, reduction == 1, on,
        )  # fmt: skip
    return loss, lse, total


def _reduce(
    loss: Tensor | None,
    total: Tensor,
    losses: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    columns: int,
    ignore_index: int,
    mean: bool,
    on: devices.Target,
) -> None:
    """The losses' sum or mean (not where loss is None), and what the mean divides by."""
    options = tuning.options("cross_entropy", "reduce", on)
    rows, shares = losses.numel(), None
    while rows > CHUNK:
        chunks = -(-rows // CHUNK)
        sums, parts = torch.empty((2, chunks), dtype=torch.float32, device=losses.device).unbind()
        KERNELS.reduce[(chunks,)](
            None if loss is None else sums, parts, losses, shares, target, weight, rows, columns, ignore_index, CHUNK,
            MEAN=mean, FINISH=False, **options,
        )  # fmt: skip
        losses, shares, target, weight, rows = sums, parts, None, None, chunks
    KERNELS.reduce[(1,)](
        loss, total, losses, shares, target, weight, rows, columns, ignore_index, rows, MEAN=mean, FINISH=True,
        **options,
    )  # fmt: skip


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
    rows, columns = input.shape
    on = devices.target_of(input.device)
    if on.interpreted:
        check_targets("cross_entropy", target, columns, ignore_index)
    grad_input = torch.empty_like(input, memory_format=torch.contiguous_format)
    if grad_input.numel() == 0:
        return grad_input
    goal, goal_stride, probabilities = _targets(target)
    smooth = label_smoothing > 0.0
    weight_sum = weight.sum() if weight is not None and smooth and not probabilities else None
    read, stride = as_rows(input)
    kernel, together, options = tuning.row_kernel("cross_entropy", "backward_rows", "backward_long", on, columns)
    with devices.on(input):
        getattr(KERNELS, kernel)[(-(-rows // together),)](
            grad_input, grad, read, goal, weight, weight_sum, lse, total, stride, goal_stride, rows, columns,
            ignore_index, label_smoothing, z_loss, softcap,
            REDUCTION=reduction, PROBABILITIES=probabilities, SMOOTH=smooth, CAPPED=softcap > 0.0,
            **options, **devices.assertions(on),
        )  # fmt: skip
    return grad_input


IMPLEMENTATION = Implementation(takes_dtype, forward, backward)
