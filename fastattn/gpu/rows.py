"""Tensors as rows: what kernels that take one row after the other need to know."""

from __future__ import annotations

import math

from torch import Tensor


def row_stride(tensor: Tensor, dims: int = 1) -> int | None:
    """Elements from one row to the next, a row being the last `dims` dimensions, adjacent in memory; None where no
    single number says it."""
    shape = tensor.shape
    if tensor.is_contiguous():  # the common case, in little time
        return shape[-1] if dims == 1 and shape else math.prod(shape[len(shape) - dims :])
    strides = tensor.stride()
    split = len(shape) - dims
    expected = 1
    for size, stride in zip(reversed(shape[split:]), reversed(strides[split:]), strict=True):
        if size != 1 and stride != expected:
            return None
        expected *= size
    step = width = None
    for size, stride in zip(reversed(shape[:split]), reversed(strides[:split]), strict=True):
        if size == 1:
            continue
        if step is None:
            step, width = stride, stride * size
        elif stride != width:
            return None
        else:
            width = stride * size
    return expected if step is None else step


def as_rows(tensor: Tensor, dims: int = 1) -> tuple[Tensor, int]:
    """The tensor, copied only where its rows are no rows in memory, and the elements from one row to the next."""
    stride = row_stride(tensor, dims)
    if stride is None:
        tensor = tensor.contiguous()
        stride = math.prod(tensor.shape[tensor.ndim - dims :])
    return tensor, stride
