"""LayerNorm and RMSNorm on GPUs, of a sum as well: the launches that both ops' triton backends share.

Rows that registers hold are read once; longer ones twice, in blocks. The sums for weight and bias are cut into chunks
of rows by the shape of the problem alone, so that no device or occupancy changes their bits.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import philox as philox_mask
from fastattn.gpu import devices, tuning
from fastattn.gpu.columns import column_sums, partial_sums
from fastattn.gpu.deferred import Deferred
from fastattn.gpu.rows import as_rows

KERNELS = Deferred("fastattn.gpu.norm_kernels")


class Forward(NamedTuple):
    output: Tensor
    sum: Tensor | None
    mean: Tensor | None
    rstd: Tensor


class Backward(NamedTuple):
    """grad: of what was normalised. branch: of the input that was dropped or cast before it was added, None where that
    is the same. (0,) stands for a parameter's gradient that nobody asks for."""

    grad: Tensor
    branch: Tensor | None
    weight: Tensor
    bias: Tensor


@functools.lru_cache(maxsize=4096)
def _padded(columns: int) -> int:
    return max(16, 1 << (columns - 1).bit_length())


def _matrix(shape: torch.Size, normalized_ndim: int) -> tuple[int, int]:
    """(rows, columns) of what is normalised together."""
    if normalized_ndim == 1:
        return shape[:-1].numel(), shape[-1]
    return math.prod(shape[: len(shape) - normalized_ndim]), math.prod(shape[len(shape) - normalized_ndim :])


def _resident(dtype: torch.dtype, residual: bool, dropout: bool) -> int:
    """Columns of a row that the registers of one program hold forwards."""
    if dropout:
        return 8192
    return 16384 if residual or dtype == torch.float32 else 32768


def _resident_backward(op: str, dtype: torch.dtype, apart: bool) -> int:
    """As `_resident`, beside the sums for weight and bias, two of LayerNorm and one of RMSNorm. apart: there are two
    gradients of different values."""
    if apart:
        return 4096
    return 16384 if op == "rms_norm" and dtype != torch.float32 else 8192


def _dropout(dropout_p: float) -> tuple[int, float]:
    """What a word must reach to be kept, and the factor of what is kept."""
    return philox_mask.threshold(dropout_p), 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def forward(
    op: str,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    philox: Tensor | None,
    normalized_ndim: int,
    eps: float,
    weight_offset: float,
    dropout_p: float = 0.0,
) -> Forward:
    """op: "layer_norm" or "rms_norm", whose table is looked up."""
    shape, device = input.shape, input.device
    like = input if residual is None else residual
    output = torch.empty_like(like, memory_format=torch.contiguous_format)
    rows, columns = _matrix(shape, normalized_ndim)
    total = None if residual is None else torch.empty_like(output)
    mean = torch.empty((rows,), dtype=torch.float32, device=device) if op == "layer_norm" else None
    rstd = torch.empty((rows,), dtype=torch.float32, device=device)
    if columns == 0:
        rstd.fill_(math.nan)
        if mean is not None:
            mean.fill_(math.nan)
    if rows == 0 or columns == 0:
        return Forward(output, total, mean, rstd)
    x, x_stride = as_rows(input, normalized_ndim)
    r, r_stride = (None, 0) if residual is None else as_rows(residual, normalized_ndim)
    threshold, scale = (0, 1.0) if philox is None else _dropout(dropout_p)
    tensors = output, total, mean, rstd, x, r, weight, bias, philox, x_stride, r_stride
    numbers = eps, weight_offset, threshold, scale
    target = devices.target_of(device)
    with devices.on(input):
        if columns <= _resident(like.dtype, residual is not None, philox is not None):
            options = tuning.options(op, "forward", target, like.dtype, columns)
            grid = (-(-rows // options["ROWS"]),)
            KERNELS.forward[grid](*tensors, rows, columns, *numbers, COLUMNS=_padded(columns), **options)
        else:
            options = tuning.options(op, "forward_long", target, like.dtype, columns)
            KERNELS.forward_long[(rows,)](*tensors, columns, *numbers, **options)
    return Forward(output, total, mean, rstd)


def _room(parameter: Tensor | None, wanted: bool, device: torch.device) -> Tensor:
    """For the gradient of a parameter."""
    if parameter is None:
        return torch.empty((0,), dtype=torch.float32, device=device)
    return torch.empty_like(parameter) if wanted else parameter.new_empty((0,))


@functools.lru_cache(maxsize=4096)
def chunk_rows(rows: int, columns: int, resident: bool) -> int:
    """Rows that one program adds up for the gradients of weight and bias.

    Few enough to keep a large device busy, many enough that the sums are little beside the rows themselves.
    """
    if not resident:
        return min(64, rows)
    chunks = 512 if columns <= 2048 else 256 if columns <= 4096 else 128
    return max(8, min(rows // 256, 32), 4096 // columns, -(-rows // chunks))


def backward(
    op: str,
    grad_output: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    philox: Tensor | None,
    normalized_ndim: int,
    weight_offset: float,
    dropout_p: float,
    branch_dtype: torch.dtype,
    weight_grad: bool,
    bias_grad: bool,
) -> Backward:
    """branch_dtype: the dtype of what was added to the residual, or the input's."""
    shape, device = input.shape, input.device
    apart = dropout_p > 0.0 or branch_dtype != input.dtype
    weight_grad, bias_grad = weight_grad and weight is not None, bias_grad and bias is not None
    grad = torch.empty_like(input, memory_format=torch.contiguous_format)
    branch = torch.empty(shape, dtype=branch_dtype, device=device) if apart else None
    results = Backward(grad, branch, _room(weight, weight_grad, device), _room(bias, bias_grad, device))
    sought = [tensor for tensor, wanted in ((results.weight, weight_grad), (results.bias, bias_grad)) if wanted]
    rows, columns = _matrix(shape, normalized_ndim)
    if rows == 0 or columns == 0:
        for tensor in sought:
            tensor.zero_()
        return results
    g, g_stride = as_rows(grad_output, normalized_ndim)
    s, s_stride = (None, 0) if grad_sum is None else as_rows(grad_sum, normalized_ndim)
    x, x_stride = as_rows(input, normalized_ndim)
    threshold, scale = (0, 1.0) if philox is None else _dropout(dropout_p)
    resident = columns <= _resident_backward(op, input.dtype, apart)
    chunk = chunk_rows(rows, columns, resident)
    chunks = -(-rows // chunk)
    partials = partial_sums(len(sought), chunks, columns, device) if sought else None
    target = devices.target_of(device)
    weight_sums = partials if weight_grad else None
    bias_sums = partials[1] if partials is not None and weight_grad and bias_grad else partials if bias_grad else None
    written = grad, branch, weight_sums, bias_sums
    read = g, s, x, weight, mean, rstd, philox, g_stride, s_stride, x_stride
    numbers = rows, columns, chunk, weight_offset, threshold, scale
    with devices.on(input):
        if resident:
            kind = "apart" if apart else "one"
            options = tuning.options(op, "backward", target, input.dtype, columns, kind)
            KERNELS.backward[(chunks,)](*written, *read, *numbers, COLUMNS=_padded(columns), **options)
        else:
            means = torch.empty((2, rows), dtype=torch.float32, device=device).unbind()
            options = tuning.options(op, "backward_means", target, input.dtype, columns)
            KERNELS.backward_means[(rows,)](
                *means, g, x, weight, mean, rstd, g_stride, x_stride, columns, weight_offset, **options
            )
            options = tuning.options(op, "backward_long", target, input.dtype, columns)
            grid = (chunks * -(-columns // options["COLUMNS"]),)
            KERNELS.backward_long[grid](*written, *means, *read, *numbers, **options)
    if partials is not None:
        column_sums(op, partials, *sought)
    return results
