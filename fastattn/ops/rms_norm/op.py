"""RMSNorm, with an optional residual added first: the public function and the op's contract.

s = input + residual        y = s / sqrt(mean(s^2) + eps) * weight     (Zhang and Sennrich 2019, equation 4)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import Op, Problem, check_size
from fastattn.numerics import accumulation_dtype

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class RMSNormProblem(Problem):
    shape: tuple[int, ...]
    normalized_ndim: int
    weight_dtype: torch.dtype | None
    residual: bool


def _forward_fake(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, normalized_ndim: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = math.prod(input.shape[: input.ndim - normalized_ndim])
    total = input.new_empty((0,) if residual is None else input.shape)
    return input.new_empty(input.shape), total, input.new_empty((rows,), dtype=accumulation_dtype(input.dtype))


def _backward_fake(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    normalized_ndim: int,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    if weight is None:
        return input.new_empty(input.shape), input.new_empty((0,), dtype=torch.float32)
    return input.new_empty(input.shape), weight.new_empty(weight.shape if weight_grad else (0,))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    input, residual, weight, ctx.normalized_ndim, _ = inputs
    _, total, rstd = output
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(*((rstd,) if ctx.has_residual else (total, rstd)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total if ctx.has_residual else input, weight, rstd)


def _backward(kernel: Any, ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None, *_: Any) -> tuple[Any, ...]:
    total, weight, rstd = ctx.saved_tensors
    if grad_output is None:
        return grad_sum, grad_sum if ctx.has_residual else None, None, None, None
    weight_grad = weight is not None and ctx.needs_input_grad[2]
    grad_input, grad_weight = kernel(
        grad_output,
        grad_sum if ctx.has_residual else None,
        total,
        weight,
        rstd,
        ctx.normalized_ndim,
        weight_grad,
    )
    return grad_input, grad_input if ctx.has_residual else None, grad_weight if weight_grad else None, None, None


OP = Op(
    "rms_norm",
    forward_schema=(
        "(Tensor input, Tensor? residual, Tensor? weight, int normalized_ndim, float eps)"
        " -> (Tensor output, Tensor sum, Tensor rstd)"
    ),
    backward_schema=(
        "(Tensor grad_output, Tensor? grad_sum, Tensor input, Tensor? weight, Tensor rstd, int normalized_ndim,"
        " bool weight_grad) -> (Tensor grad_input, Tensor grad_weight)"
    ),
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _check(input: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None, residual: Tensor | None) -> None:
    if input.dtype not in FLOATING:
        raise ValueError(f"rms_norm: input must be float32, bfloat16, float16 or float64, got {input.dtype}")
    check_size("rms_norm", "an input", input.shape)
    n = len(normalized_shape)
    if n == 0 or n > input.ndim or tuple(input.shape[input.ndim - n :]) != normalized_shape:
        raise ValueError(
            f"rms_norm: the input's last dimensions must be normalized_shape {normalized_shape}, got an input of"
            f" shape {tuple(input.shape)}"
        )
    if weight is not None and tuple(weight.shape) != normalized_shape:
        raise ValueError(f"rms_norm: weight must have shape {normalized_shape}, got {tuple(weight.shape)}")
    if weight is not None and (weight.dtype not in FLOATING or weight.device != input.device):
        raise ValueError(
            f"rms_norm: weight must be floating and on {input.device}, got {weight.dtype} on {weight.device}"
        )
    if residual is not None and (residual.shape != input.shape or residual.device != input.device):
        raise ValueError(
            f"rms_norm: residual must have the input's shape {tuple(input.shape)} and device {input.device}, got"
            f" {tuple(residual.shape)} on {residual.device}"
        )
    if residual is not None and residual.dtype not in FLOATING:
        raise ValueError(f"rms_norm: residual must be floating, got {residual.dtype}")


def _canonical(
    input: Tensor, weight: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Tensors as kernels take them: input and residual of one dtype; weight contiguous, of the input's dtype or
    float32 (float64 for float64 input)."""
    if residual is not None and residual.dtype != input.dtype:
        common = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(common), residual.to(common)
    if weight is not None:
        if weight.dtype != input.dtype:
            weight = weight.to(accumulation_dtype(input.dtype))
        weight = weight.contiguous()
    return input, weight, residual


def _default_eps(input: Tensor) -> float:
    """torch's: the machine epsilon of the dtype that it accumulates in."""
    return torch.finfo(accumulation_dtype(input.dtype)).eps


def _problem(input: Tensor, normalized_ndim: int, weight: Tensor | None, residual: Tensor | None) -> RMSNormProblem:
    return RMSNormProblem(
        device=input.device.type,
        dtype=input.dtype,
        shape=tuple(input.shape),
        normalized_ndim=normalized_ndim,
        weight_dtype=None if weight is None else weight.dtype,
        residual=residual is not None,
    )


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    backend: str | None = None,
) -> Any:
    """torch.nn.functional.rms_norm, optionally of input + residual in one pass.

    Args:
        input: (..., *normalized_shape), float32, bfloat16, float16 or float64, any strides.
        normalized_shape: the trailing dimensions that are normalised together.
        weight: normalized_shape, any floating dtype (float32 with 16-bit inputs costs no copy).
        eps: added to the mean square; None is torch's default, the epsilon of float32 (float64 for float64).
        residual: the input's shape; s = input + residual (rounded to their common dtype) is normalised.
        prenorm: also return s, for the next residual connection.
        backend: serve with this backend or raise BackendUnsupported.

    Returns:
        Contiguous, the input's shape and dtype; with prenorm a tuple of it and s. Statistics are float32 for 16-bit
        dtypes; the weight's gradient is accumulated in float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    ndim = len(shape)
    if torch.compiler.is_compiling():
        _check(input, shape, weight, residual)
        x, w, r = _canonical(input, weight, residual)
        bound = OP.resolve(_problem(x, ndim, w, r), backend)
    else:
        signature = (
            input.shape, shape, input.dtype, input.device,
            None if weight is None else (weight.shape, weight.dtype, weight.device),
            None if residual is None else (residual.shape, residual.dtype, residual.device),
        )  # fmt: skip

        def problem() -> RMSNormProblem:
            _check(input, shape, weight, residual)
            x, w, r = _canonical(input, weight, residual)
            return _problem(x, ndim, w, r)

        bound = OP.resolve_cached(signature, problem, backend)
        x, w, r = _canonical(input, weight, residual)
    output, total, _rstd = bound(x, r, w, ndim, _default_eps(x) if eps is None else float(eps))
    if not prenorm:
        return output
    return output, (x if r is None else total)


def _prepare(
    input: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    **_: Any,
) -> tuple[Op, RMSNormProblem]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    _check(input, shape, weight, residual)
    x, w, r = _canonical(input, weight, residual)
    return OP, _problem(x, len(shape), w, r)


rms_norm.prepare = _prepare  # type: ignore[attr-defined]
