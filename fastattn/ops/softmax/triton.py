"""softmax and log_softmax on the triton backend."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fastattn.dispatch import Implementation
from fastattn.gpu import devices, tuning
from fastattn.gpu.deferred import Deferred
from fastattn.gpu.rows import as_rows
from fastattn.ops.softmax.op import SoftmaxProblem

KERNELS = Deferred("fastattn.ops.softmax.triton_kernels")
MASK_DIMS = 4  # that kernels follow by strides, after dimensions that lie one in another have been joined
Strides = tuple[int, int, int, int, int, int, int]  # sizes of the inner three, strides of all

_NO_MASK: Strides = (1, 1, 1, 0, 0, 0, 0)


def supports(problem: SoftmaxProblem) -> str | None:
    for dtype in (problem.dtype, problem.output_dtype):
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"has no kernel for {dtype}: float32, bfloat16, float16"
    return None


def _choice(direction: str, target: devices.Target, columns: int) -> tuple[str, int, tuning.Options]:
    """(kernel, rows that a program takes, options): rows that do not fit into registers are read twice."""
    options = tuning.options("softmax", f"{direction}_rows", target, dim=columns)
    if options["COLUMNS"] >= columns:
        return f"{direction}_rows", options["ROWS"], options
    return f"{direction}_long", 1, tuning.options("softmax", f"{direction}_long", target)


@functools.lru_cache(maxsize=4096)
def _mask_strides(shape: torch.Size, mask: torch.Size, strides: tuple[int, ...]) -> Strides | None:
    """How a row's number leads to its mask; None where that takes more dimensions than kernels follow."""
    joined: list[list[int]] = []  # [size, stride], the innermost first
    for size, there, stride in reversed(list(zip(shape[:-1], mask[:-1], strides[:-1], strict=True))):
        if size == 1:
            continue
        stride = 0 if there == 1 else stride
        if joined and joined[-1][0] * joined[-1][1] == stride:
            joined[-1][0] *= size
        else:
            joined.append([size, stride])
    if len(joined) > MASK_DIMS:
        return None
    joined += [[1, 0]] * (MASK_DIMS - len(joined))
    (a, i), (b, j), (c, k), (_, last) = joined
    return a, b, c, i, j, k, last


def _mask_arguments(input: Tensor, mask: Tensor | None) -> tuple[Tensor, int, Strides, int]:
    """(tensor, kind, strides, elements from one column to the next) as kernels take masks."""
    if mask is None:
        return input, 0, _NO_MASK, 0
    kind = 1 if mask.dtype == torch.bool else 2
    strides = _mask_strides(input.shape, mask.shape, mask.stride())
    if strides is None:
        mask = mask.expand(input.shape[:-1] + mask.shape[-1:]).contiguous()
        strides = _mask_strides(input.shape, mask.shape, mask.stride())
        assert strides is not None
    step = 0 if mask.shape[-1] == 1 else 1
    return mask.view(torch.uint8) if kind == 1 else mask, kind, strides, step


def _causal_arguments(tensor: Tensor, causal: int) -> tuple[int, int]:
    """(rows of a matrix, columns that the first one sees)."""
    if not causal:
        return 1, 0
    rows, columns = tensor.shape[-2:]
    return rows, 1 if causal == 1 else columns - rows + 1


def _across(direction: str, results: Tensor, tensors: tuple[Tensor, ...], dim: int, log: bool) -> None:
    """Rows along another dimension than the innermost: tensors are read contiguous."""
    shape = results.shape
    columns, inner = shape[dim], math.prod(shape[dim + 1 :])
    options = tuning.options("softmax", f"{direction}_columns", devices.target_of(results.device), dim=inner)
    grid = (math.prod(shape[:dim]) * -(-inner // options["LANES"]),)
    read = [tensor.contiguous() for tensor in tensors]
    with devices.on(results):
        getattr(KERNELS, f"{direction}_columns")[grid](results, *read, columns, inner, LOG=log, **options)


def forward(
    input: Tensor,
    dim: int,
    log: bool,
    dtype: torch.dtype,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: int = 0,
) -> Tensor:
    output = torch.empty_like(input, dtype=dtype, memory_format=torch.contiguous_format)
    elements = output.numel()
    if elements == 0:
        return output
    shape = input.shape
    columns = shape[dim]
    dims = len(shape) - dim
    if dims > 1 and math.prod(shape[dim + 1 :]) != 1:
        _across("forward", output, (input,), dim, log)
        return output
    rows = elements // columns
    kernel, together, options = _choice("forward", devices.target_of(output.device), columns)
    read, stride = as_rows(input, dims)
    masks, kind, strides, step = _mask_arguments(input, mask)
    with devices.on(output):
        getattr(KERNELS, kernel)[(-(-rows // together),)](
            output, read, masks, stride, scale, rows, columns, *_causal_arguments(input, causal), *strides, step,
            LOG=log, MASK=kind, CAUSAL=causal != 0, **options,
        )  # fmt: skip
    return output


def backward(
    grad_output: Tensor,
    output: Tensor,
    dim: int,
    log: bool,
    dtype: torch.dtype,
    scale: float = 1.0,
    masked: bool = False,
    causal: int = 0,
) -> Tensor:
    grad_input = torch.empty_like(output, dtype=dtype, memory_format=torch.contiguous_format)
    elements = grad_input.numel()
    if elements == 0:
        return grad_input
    shape = output.shape
    columns = shape[dim]
    dims = len(shape) - dim
    if dims > 1 and math.prod(shape[dim + 1 :]) != 1:
        _across("backward", grad_input, (grad_output, output), dim, log)
        return grad_input
    rows = elements // columns
    kernel, together, options = _choice("backward", devices.target_of(output.device), columns)
    grad, grad_stride = as_rows(grad_output, dims)
    read, stride = as_rows(output, dims)
    with devices.on(output):
        getattr(KERNELS, kernel)[(-(-rows // together),)](
            grad_input, grad, read, grad_stride, stride, scale, rows, columns, *_causal_arguments(output, causal),
            LOG=log, HIDES=masked or causal != 0, CAUSAL=causal != 0, **options,
        )  # fmt: skip
    return grad_input


IMPLEMENTATION = Implementation(supports, forward, backward)
