"""softmax and log_softmax: public functions and the op's contract.

softmax(x)_i = exp(x_i) / sum_j exp(x_j)        log_softmax(x)_i = x_i - log sum_j exp(x_j)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import Op, Problem, autocast_enabled, check_size

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class SoftmaxProblem(Problem):
    shape: tuple[int, ...]
    dim: int
    log: bool
    output_dtype: torch.dtype


def _forward_fake(input: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
    return input.new_empty(input.shape, dtype=dtype)


def _backward_fake(grad_output: Tensor, output: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
    return output.new_empty(output.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    input, *ctx.options, _ = inputs
    ctx.input_dtype = input.dtype
    ctx.save_for_backward(output)


def _backward(kernel: Any, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    (output,) = ctx.saved_tensors
    return kernel(grad_output, output, *ctx.options, ctx.input_dtype), None, None, None


OP = Op(
    "softmax",
    forward_schema="(Tensor input, int dim, bool log, ScalarType dtype) -> Tensor",
    backward_schema="(Tensor grad_output, Tensor output, int dim, bool log, ScalarType dtype) -> Tensor",
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _canonical(name: str, input: Tensor, dim: int | None, dtype: torch.dtype | None) -> tuple[Tensor, int, torch.dtype]:
    """The input in a floating dtype, the dimension counted from the front, the output's dtype."""
    if dim is None:
        raise ValueError(f"{name}: dim must be given")
    limit = max(input.ndim, 1)
    if not -limit <= dim < limit:
        raise ValueError(f"{name}: dim must be in [{-limit}, {limit - 1}] for a {input.ndim}-D input, got {dim}")
    if dtype is not None and dtype not in FLOATING:
        raise ValueError(f"{name}: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    if dtype is None and autocast_enabled(input.device.type) and input.device.type != "cpu":
        dtype = torch.float32 if input.dtype in (torch.bfloat16, torch.float16) else None  # torch's list for GPUs
    if dtype is not None and input.dtype != dtype:
        widened = dtype == torch.float32 and input.dtype in (torch.bfloat16, torch.float16)
        input = input if widened else input.to(dtype)  # widening is part of the kernel
    if input.dtype not in FLOATING:
        raise ValueError(
            f"{name}: input must be float32, bfloat16, float16 or float64, got {input.dtype}; pass dtype= to convert it"
        )
    return input, dim % limit, dtype or input.dtype


def _problem(input: Tensor, dim: int, log: bool, dtype: torch.dtype) -> SoftmaxProblem:
    check_size("log_softmax" if log else "softmax", "an input", input.shape)
    return SoftmaxProblem(input.device.type, input.dtype, tuple(input.shape), dim, log, dtype)


def _softmax(
    name: str, input: Tensor, dim: int | None, dtype: torch.dtype | None, backend: str | None, log: bool
) -> Tensor:
    x, axis, out = _canonical(name, input, dim, dtype)
    if torch.compiler.is_compiling():
        bound = OP.resolve(_problem(x, axis, log, out), backend)
    else:
        bound = OP.resolve_cached(
            (x.shape, x.dtype, x.device, axis, log, out), lambda: _problem(x, axis, log, out), backend
        )
    if x.ndim == 0:
        return bound(x.reshape(1), 0, log, out).reshape(())
    return bound(x, axis, log, out)


def softmax(
    input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, *, backend: str | None = None
) -> Tensor:
    """torch.nn.functional.softmax: exp(x - max) normalised to sum 1 along `dim`.

    Args:
        input: any shape and strides, float32, bfloat16, float16 or float64 (other dtypes with dtype=).
        dim: the dimension that sums to 1; negative counts from the end.
        dtype: the input is converted to it first; the result's dtype.
        backend: serve with this backend or raise BackendUnsupported.

    Returns: contiguous, the input's shape. Sums and exponentials are float32 for 16-bit dtypes. A row of -inf is NaN.
    Raises: ValueError for a dim or dtype that does not fit.
    """
    return _softmax("softmax", input, dim, dtype, backend, False)


def log_softmax(
    input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, *, backend: str | None = None
) -> Tensor:
    """torch.nn.functional.log_softmax: x - max - log(sum(exp(x - max))) along `dim`; arguments as for softmax."""
    return _softmax("log_softmax", input, dim, dtype, backend, True)


def _prepare_for(name: str, log: bool) -> Any:
    def prepare(
        input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **_: Any
    ) -> tuple[Op, SoftmaxProblem]:
        x, axis, out = _canonical(name, input, dim, dtype)
        return OP, _problem(x, axis, log, out)

    return prepare


softmax.prepare = _prepare_for("softmax", False)  # type: ignore[attr-defined]
log_softmax.prepare = _prepare_for("log_softmax", True)  # type: ignore[attr-defined]
