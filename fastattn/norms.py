"""What LayerNorm and RMSNorm have in common: the arguments they take, the form their kernels get them in, dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import philox as philox_mask
from fastattn.dispatch import check_size
from fastattn.numerics import FLOATING, accumulation_dtype

HALVES = (torch.bfloat16, torch.float16)
PLAIN = (Tensor, torch.nn.Parameter)


def rows_of(tensor: Tensor, normalized_ndim: int) -> int:
    return math.prod(tensor.shape[: tensor.ndim - normalized_ndim])


def dims_of(normalized_shape: Sequence[int] | int) -> tuple[int, ...]:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


def key_of(tensor: Tensor | None) -> Any:
    """What dispatch must know of a tensor."""
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def parameter_fake(like: Tensor, tensor: Tensor | None, wanted: bool) -> Tensor:
    """The gradient of a parameter: (0,) where there is none or nobody asks."""
    if tensor is None:
        return like.new_empty((0,), dtype=torch.float32)
    return tensor.new_empty(tensor.shape if wanted else (0,))


def check(op: str, input: Tensor, normalized_shape: tuple[int, ...], **parameters: Tensor | None) -> None:
    """ValueError unless the input and its parameters fit."""
    if input.dtype not in FLOATING:
        raise ValueError(f"{op}: input must be float32, bfloat16, float16 or float64, got {input.dtype}")
    check_size(op, "an input", input.shape)
    n = len(normalized_shape)
    if n == 0 or n > input.ndim or tuple(input.shape[input.ndim - n :]) != normalized_shape:
        raise ValueError(
            f"{op}: the input's last dimensions must be normalized_shape {normalized_shape}, got an input of"
            f" shape {tuple(input.shape)}"
        )
    for name, tensor in parameters.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != normalized_shape:
            raise ValueError(f"{op}: {name} must have shape {normalized_shape}, got {tuple(tensor.shape)}")
        if tensor.dtype not in FLOATING or tensor.device != input.device:
            raise ValueError(
                f"{op}: {name} must be floating and on {input.device}, got {tensor.dtype} on {tensor.device}"
            )


def check_residual(op: str, input: Tensor, residual: Tensor) -> None:
    """ValueError unless the two can be added."""
    if residual.shape != input.shape or residual.device != input.device:
        raise ValueError(
            f"{op}: residual must have the input's shape {tuple(input.shape)} and device {input.device}, got"
            f" {tuple(residual.shape)} on {residual.device}"
        )
    if residual.dtype not in FLOATING:
        raise ValueError(f"{op}: residual must be floating, got {residual.dtype}")


def check_values(op: str, weight_offset: float, dropout_p: float = 0.0, seed: int | None = None) -> None:
    """ValueError for numbers that mean nothing."""
    if not -math.inf < weight_offset < math.inf:  # also refuses NaN
        raise ValueError(f"{op}: weight_offset must be finite, got {weight_offset}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1], got {dropout_p}")
    philox_mask.check_seed(op, seed)


def parameters_for(dtype: torch.dtype, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """Parameters as kernels take them: contiguous and of one dtype, `dtype` or float32 (float64 for float64)."""
    if any(tensor is not None and tensor.dtype != dtype for tensor in parameters):
        dtype = accumulation_dtype(dtype)
    return tuple(tensor if tensor is None or _fits(tensor, dtype) else tensor.to(dtype).contiguous()
                 for tensor in parameters)  # fmt: skip


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Asked before `to` and `contiguous`, which take their time to find that there is nothing to do."""
    return tensor.dtype == dtype and tensor.is_contiguous()


def plain_cpu(input: Tensor, shape: tuple[int, ...], *parameters: Tensor | None) -> bool:
    """Whether a call is of the commonest kind, which goes straight to the native kernel: tensors on the CPU that are
    normalised over `shape`.

    The kernel compares what a row and each parameter have of elements: one shape, of one dimension, decides them all.
    (A tensor's shape is a new tuple every time that it is asked for, and takes as long as three other questions.)
    """
    if type(input) is not Tensor or not input.is_cpu or not shape:
        return False
    single = len(shape) == 1
    compared = False
    for parameter in parameters:
        if parameter is None:
            continue
        if type(parameter) not in PLAIN or not parameter.is_cpu:
            return False
        if not (parameter.ndim == 1 if compared and single else parameter.shape == shape):
            return False
        compared = True
    return (compared and single) or input.shape[-len(shape) :] == shape


def sides(input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """input and residual as kernels take them: residual of their common dtype, input of that or of fewer bits than
    float32."""
    common = torch.promote_types(input.dtype, residual.dtype)
    if input.dtype != common and not (common == torch.float32 and input.dtype in HALVES):
        input = input.to(common)
    return input, residual.to(common)


def dropout_state(device: torch.device, dropout_p: float, seed: int | None) -> Tensor | None:
    """(seed, offset) of the mask, from torch's generator unless fixed; None without dropout."""
    return None if dropout_p == 0.0 else philox_mask.state_of(seed, device)


# ---- in plain torch ----


def matrix_of(tensor: Tensor, normalized_ndim: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns) of what is normalised together."""
    rows = tensor.shape[: tensor.ndim - normalized_ndim].numel()
    return tensor.reshape(rows, tensor.shape[tensor.ndim - normalized_ndim :].numel()).to(dtype)


def scale_of(weight: Tensor | None, weight_offset: float, dtype: torch.dtype) -> Tensor | float:
    return 1.0 if weight is None else weight.reshape(-1).to(dtype) + weight_offset


def dropped(x: Tensor, philox: Tensor | None, p: float) -> Tensor:
    """x, (rows, columns), with its elements dropped or scaled."""
    if p == 0.0:
        return x
    assert philox is not None
    keep = philox_mask.row_mask(philox, p, *x.shape)
    return x * keep * (1.0 / (1.0 - p) if p < 1.0 else 0.0)


def dropped_branch(input: Tensor, columns: int, p: float, seed: int | None) -> Tensor:
    """input after the dropout that `seed` fixes; `columns` are normalised together."""
    if p == 0.0:
        return input
    assert seed is not None
    rows = input.reshape(input.numel() // max(columns, 1), columns)
    return dropped(rows, philox_mask.fixed(seed, input.device), p).reshape(input.shape)
