"""LayerNorm and RMSNorm on GPUs, of a sum as well: the launches that both ops' triton backends share.

Rows that registers hold are read once; longer ones twice, in blocks. The sums for weight and bias are cut into chunks
of rows by the shape of the problem alone, so that no device or occupancy changes their bits.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import philox as philox_mask
from fastattn.gpu import devices, tuning
from fastattn.gpu.columns import column_sums, partial_sums
from fastattn.gpu.deferred import Deferred
from fastattn.gpu.rows import as_rows

KERNELS = Deferred("fastattn.gpu.norm_kernels")


@functools.lru_cache(maxsize=4096)
def _padded(columns: int) -> int:
    return max(16, tuning.power_of_two(columns))


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


def _resident_backward(dtype: torch.dtype, centred: bool, apart: bool) -> int:
    """As `_resident`, beside the sums for weight and bias, two of LayerNorm and one of RMSNorm. apart: there are two
    gradients of different values."""
    if apart:
        return 4096
    return 8192 if centred or dtype == torch.float32 else 16384


def _dropout(dropout_p: float) -> tuple[int, float]:
    """What a word must reach to be kept, and the factor of what is kept."""
    return philox_mask.threshold(dropout_p), 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


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


@dataclass(frozen=True)
class Norm:
    """A norm's triton backend, with the schemas of layer_norm and add_layer_norm: what has no mean (not centred) has no
    bias, and both are None. op: whose tile sizes are looked up."""

    op: str
    centred: bool

    def forward(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        normalized_ndim: int,
        eps: float,
        weight_offset: float,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        output, _, mean, rstd = self.add_forward(
            input, None, weight, bias, None, normalized_ndim, eps, weight_offset, 0.0
        )
        return output, mean, rstd

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
        normalized_ndim: int,
        weight_offset: float,
        weight_grad: bool,
        bias_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, grad, grad_weight, grad_bias = self.add_backward(
            grad_output, None, input, weight, bias, mean, rstd, None, normalized_ndim, weight_offset, 0.0, input.dtype,
            weight_grad, bias_grad,
        )  # fmt: skip
        return grad, grad_weight, grad_bias

    def add_forward(
        self,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        philox: Tensor | None,
        normalized_ndim: int,
        eps: float,
        weight_offset: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """residual: None where nothing is added, and there is no sum."""
        shape, device = input.shape, input.device
        like = input if residual is None else residual
        output = torch.empty_like(like, memory_format=torch.contiguous_format)
        rows, columns = _matrix(shape, normalized_ndim)
        total = None if residual is None else torch.empty_like(output)
        mean = torch.empty((rows,), dtype=torch.float32, device=device) if self.centred else None
        rstd = torch.empty((rows,), dtype=torch.float32, device=device)
        if columns == 0:
            rstd.fill_(math.nan)
            if mean is not None:
                mean.fill_(math.nan)
        if rows == 0 or columns == 0:
            return output, total, mean, rstd
        x, x_stride = as_rows(input, normalized_ndim)
        r, r_stride = (None, 0) if residual is None else as_rows(residual, normalized_ndim)
        threshold, scale = (0, 1.0) if philox is None else _dropout(dropout_p)
        tensors = output, total, mean, rstd, x, r, weight, bias, philox, x_stride, r_stride
        numbers = eps, weight_offset, threshold, scale
        target = devices.target_of(device)
        with devices.on(input):
            if columns <= _resident(like.dtype, residual is not None, philox is not None):
                options = tuning.options(self.op, "forward", target, like.dtype, columns)
                grid = (-(-rows // options["ROWS"]),)
                KERNELS.forward[grid](*tensors, rows, columns, *numbers, COLUMNS=_padded(columns), **options)
            else:
                options = tuning.options(self.op, "forward_long", target, like.dtype, columns)
                KERNELS.forward_long[(rows,)](*tensors, columns, *numbers, **options)
        return output, total, mean, rstd

    def add_backward(
        self,
        grad_output: Tensor,
        grad_sum: Tensor | None,
        sum: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor,
        philox: Tensor | None,
        normalized_ndim: int,
        weight_offset: float,
        dropout_p: float,
        input_dtype: torch.dtype,
        weight_grad: bool,
        bias_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(gradients of the input that was dropped or cast before it was added, of the sum, of weight and bias); (0,)
        where the first is the same as the second, and for a parameter whose gradient nobody asks for."""
        device = sum.device
        apart = dropout_p > 0.0 or input_dtype != sum.dtype
        weight_grad, bias_grad = weight_grad and weight is not None, bias_grad and bias is not None
        grad = torch.empty_like(sum, memory_format=torch.contiguous_format)
        branch = torch.empty(sum.shape if apart else (0,), dtype=input_dtype, device=device)
        grad_weight, grad_bias = _room(weight, weight_grad, device), _room(bias, bias_grad, device)
        sought = [tensor for tensor, wanted in ((grad_weight, weight_grad), (grad_bias, bias_grad)) if wanted]
        rows, columns = _matrix(sum.shape, normalized_ndim)
        if rows == 0 or columns == 0:
            for tensor in sought:
                tensor.zero_()
            return branch, grad, grad_weight, grad_bias
        g, g_stride = as_rows(grad_output, normalized_ndim)
        s, s_stride = (None, 0) if grad_sum is None else as_rows(grad_sum, normalized_ndim)
        x, x_stride = as_rows(sum, normalized_ndim)
        threshold, scale = (0, 1.0) if philox is None else _dropout(dropout_p)
        resident = columns <= _resident_backward(sum.dtype, self.centred, apart)
        chunk = chunk_rows(rows, columns, resident)
        chunks = -(-rows // chunk)
        partials = partial_sums(len(sought), chunks, columns, device) if sought else None
        weight_sums = partials if weight_grad else None
        bias_sums = partials[-1] if partials is not None and bias_grad else None
        target = devices.target_of(device)
        written = grad, branch if apart else None, weight_sums, bias_sums
        read = g, s, x, weight, mean, rstd, philox, g_stride, s_stride, x_stride
        numbers = rows, columns, chunk, weight_offset, threshold, scale
        with devices.on(sum):
            if resident:
                kind = "apart" if apart else "one"
                options = tuning.options(self.op, "backward", target, sum.dtype, columns, kind)
                KERNELS.backward[(chunks,)](*written, *read, *numbers, COLUMNS=_padded(columns), **options)
            else:
                means = torch.empty((2, rows), dtype=torch.float32, device=device).unbind()
                options = tuning.options(self.op, "backward_means", target, sum.dtype, columns)
                KERNELS.backward_means[(rows,)](
                    *means, g, x, weight, mean, rstd, g_stride, x_stride, columns, weight_offset, **options
                )
                options = tuning.options(self.op, "backward_long", target, sum.dtype, columns)
                grid = (chunks * -(-columns // options["COLUMNS"]),)
                KERNELS.backward_long[grid](*written, *means, *read, *numbers, **options)
        if partials is not None:
            column_sums(self.op, partials, *sought)
        return branch, grad, grad_weight, grad_bias
