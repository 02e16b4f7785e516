"""softmax and log_softmax on the triton backend."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

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


def _mask_arguments(input: Tensor, mask: Tensor | None) -> tuple[tuple[Any, ...], int]:
    """(tensor, sizes, strides, elements from one column to the next; kind) as kernels take masks."""
    if mask is None:
        return (input, *_NO_MASK, 0), 0
    kind = 1 if mask.dtype == torch.bool else 2
    strides = _mask_strides(input.shape, mask.shape, mask.stride())
    if strides is None:
        mask = mask.expand(input.shape[:-1] + mask.shape[-1:]).contiguous()
        strides = _mask_strides(input.shape, mask.shape, mask.stride())
        assert strides is not None
    step = 0 if mask.shape[-1] == 1 else 1
    return (mask.view(torch.uint8) if kind == 1 else mask, *strides, step), kind


@dataclass(frozen=True, slots=True)
class Plan:
    """What is launched for rows of so many columns. inner: how many rows lie side by side; 1 where they lie one behind
    the other. dims: of the tensors that a row is of, the last ones."""

    kernel: str
    grid: tuple[int]
    options: tuning.Options
    rows: int
    columns: int
    inner: int
    dims: int


@functools.lru_cache(maxsize=4096)
def _plan(direction: str, target: devices.Target, shape: torch.Size, dim: int) -> Plan | None:
    """None where there is nothing to do."""
    if 0 in shape:
        return None
    columns, inner, dims = shape[dim], math.prod(shape[dim + 1 :]), len(shape) - dim
    rows = math.prod(shape) // columns
    if inner == 1:
        whole, parts = f"{direction}_rows", f"{direction}_long"
        kernel, together, options = tuning.row_kernel("softmax", whole, parts, target, columns)
        return Plan(kernel, (-(-rows // together),), options, rows, columns, inner, dims)
    kernel = f"{direction}_columns"
    options = tuning.options("softmax", kernel, target, dim=inner)
    grid = (rows // inner * -(-inner // options["LANES"]),)
    return Plan(kernel, grid, options, rows, columns, inner, dims)


def _launch(
    direction: str,
    result: Tensor,
    tensors: tuple[Tensor, ...],
    dim: int,
    scale: float,
    causal: int,
    mask: tuple[Any, ...] = (),
    **constants: Any,
) -> None:
    """Rows along `dim` of tensors of one shape. mask: the last arguments of a kernel of whole rows; constants: what it
    is compiled for."""
    plan = _plan(direction, devices.target_of(result.device), result.shape, dim)
    if plan is None:
        return
    kernel = getattr(KERNELS, plan.kernel)[plan.grid]
    with devices.on(result):
        if plan.inner == 1:
            kernel(
                result, *[part for tensor in tensors for part in as_rows(tensor, plan.dims)], scale, plan.rows,
                plan.columns, *_causal_arguments(result.shape, causal), *mask, CAUSAL=causal != 0, **constants,
                **plan.options,
            )  # fmt: skip
        else:
            read = [tensor.contiguous() for tensor in tensors]
            kernel(result, *read, plan.columns, plan.inner, LOG=constants["LOG"], **plan.options)


def _causal_arguments(shape: torch.Size, causal: int) -> tuple[int, int]:
    """(rows of a matrix, columns that the first one sees)."""
    if not causal:
        return 1, 0
    rows, columns = shape[-2:]
    return rows, 1 if causal == 1 else columns - rows + 1


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
    arguments, kind = _mask_arguments(input, mask)
    _launch("forward", output, (input,), dim, scale, causal, arguments, LOG=log, MASK=kind)
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
    hides = masked or causal != 0
    _launch("backward", grad_input, (grad_output, output), dim, scale, causal, LOG=log, HIDES=hides)
    return grad_input


IMPLEMENTATION = Implementation(supports, forward, backward)
