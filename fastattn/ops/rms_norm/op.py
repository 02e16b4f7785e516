"""RMSNorm, and RMSNorm of a sum: the public functions and the contracts of the ops.

rms_norm        y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)     (Zhang and Sennrich 2019, equation 4)
add_rms_norm    s = residual + dropout(input), y = rms_norm(s): a pre-norm block's addition and the norm that follows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import Op, Problem
from fastattn.norms import (
    check,
    check_residual,
    check_values,
    dims_of,
    dropout_state,
    key_of,
    parameter_fake,
    parameters_for,
    plain_cpu,
    rows_of,
    sides,
)
from fastattn.numerics import accumulation_dtype

_FLOAT_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class RMSNormProblem(Problem):
    """dtype is the input's."""

    shape: tuple[int, ...]
    normalized_ndim: int
    weight_dtype: torch.dtype | None


@dataclass(frozen=True)
class AddRMSNormProblem(RMSNormProblem):
    """dtype is that of the sum, of residual and of the output."""

    input_dtype: torch.dtype
    dropout: bool


# ---- rms_norm ----


def _forward_fake(
    input: Tensor,
    weight: Tensor | None,
    normalized_ndim: int,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    statistics = input.new_empty((rows_of(input, normalized_ndim),), dtype=accumulation_dtype(input.dtype))
    return input.new_empty(input.shape), statistics


def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    normalized_ndim: int,
    weight_offset: float,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), parameter_fake(input, weight, weight_grad)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    input, weight, ctx.normalized_ndim, _, ctx.weight_offset = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, weight, rstd)


def _backward(kernel: Any, ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_output is None:
        return None, None, None, None, None
    input, weight, rstd = ctx.saved_tensors
    weight_grad = weight is not None and ctx.needs_input_grad[1]
    grad_input, grad_weight = kernel(
        grad_output, input, weight, rstd, ctx.normalized_ndim, ctx.weight_offset, weight_grad
    )
    return grad_input, grad_weight if weight_grad else None, None, None, None


OP = Op(
    "rms_norm",
    forward_schema=(
        "(Tensor input, Tensor? weight, int normalized_ndim, float eps, float weight_offset)"
        " -> (Tensor output, Tensor rstd)"
    ),
    backward_schema=(
        "(Tensor grad_output, Tensor input, Tensor? weight, Tensor rstd,"
        " int normalized_ndim, float weight_offset, bool weight_grad)"
        " -> (Tensor grad_input, Tensor grad_weight)"
    ),
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    hidden=1,
)


# ---- add_rms_norm ----


def _add_forward_fake(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    philox: Tensor | None,
    normalized_ndim: int,
    eps: float,
    weight_offset: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    output, rstd = _forward_fake(residual, weight, normalized_ndim, eps, weight_offset)
    return output, residual.new_empty(residual.shape), rstd


def _add_backward_fake(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    philox: Tensor | None,
    normalized_ndim: int,
    weight_offset: float,
    dropout_p: float,
    input_dtype: torch.dtype,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    apart = dropout_p > 0.0 or input_dtype != sum.dtype
    grad_input = sum.new_empty(sum.shape if apart else (0,), dtype=input_dtype)
    return grad_input, sum.new_empty(sum.shape), parameter_fake(sum, weight, weight_grad)


def _add_setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    input, _, weight, philox, ctx.normalized_ndim, _, ctx.weight_offset, ctx.dropout_p = inputs
    _, total, rstd = output
    ctx.input_dtype = input.dtype
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, rstd, philox)


def _add_backward(
    kernel: Any, ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    total, weight, rstd, philox = ctx.saved_tensors
    apart = ctx.dropout_p > 0.0 or ctx.input_dtype != total.dtype
    if grad_output is None:
        if grad_sum is None or not apart:
            return grad_sum, grad_sum, *(None,) * 6
        grad_output = torch.zeros_like(total)
    weight_grad = weight is not None and ctx.needs_input_grad[2]
    grad_input, grad_residual, grad_weight = kernel(
        grad_output,
        grad_sum,
        total,
        weight,
        rstd,
        philox,
        ctx.normalized_ndim,
        ctx.weight_offset,
        ctx.dropout_p,
        ctx.input_dtype,
        weight_grad,
    )
    return (
        grad_input if apart else grad_residual,
        grad_residual,
        grad_weight if weight_grad else None,
        *(None,) * 5,
    )


ADD_OP = Op(
    "add_rms_norm",
    forward_schema=(
        "(Tensor input, Tensor residual, Tensor? weight, Tensor? philox, int normalized_ndim, float eps,"
        " float weight_offset, float dropout_p) -> (Tensor output, Tensor sum, Tensor rstd)"
    ),
    backward_schema=(
        "(Tensor grad_output, Tensor? grad_sum, Tensor sum, Tensor? weight, Tensor rstd,"
        " Tensor? philox, int normalized_ndim, float weight_offset, float dropout_p, ScalarType input_dtype,"
        " bool weight_grad)"
        " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight)"
    ),
    forward_fake=_add_forward_fake,
    backward_fake=_add_backward_fake,
    setup_context=_add_setup_context,
    backward=_add_backward,
    hidden=1,
)


def _default_eps(dtype: torch.dtype) -> float:
    """torch's: the machine epsilon of the dtype that it accumulates in."""
    return torch.finfo(accumulation_dtype(dtype)).eps


# ---- the public functions ----


def _plain(input: Tensor, shape: tuple[int, ...], weight: Tensor | None, eps: float | None) -> Tensor | None:
    """The commonest call, where overhead counts; None for others."""
    if not plain_cpu(input, shape, weight):
        return None
    results = OP.attempt(input, weight, len(shape), _FLOAT_EPS if eps is None else eps, 0.0)
    return None if results is None else results[0]


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Any:
    """torch.nn.functional.rms_norm, optionally of input + residual in one pass.

    Args:
        input: (..., *normalized_shape), float32, bfloat16, float16 or float64, any strides.
        normalized_shape: the trailing dimensions that are normalised together.
        weight: normalized_shape, any floating dtype (float32 with 16-bit inputs costs no copy).
        eps: added to the mean square; None is torch's default, the epsilon of float32 (float64 for float64).
        residual: the input's shape; s = input + residual (rounded to their common dtype) is normalised, as
            `add_rms_norm` does.
        prenorm: also return s, for the next residual connection.
        weight_offset: added to a weight that is given.
        backend: serve with this backend or raise BackendUnsupported.

    Returns:
        Contiguous, the input's shape and dtype; with prenorm a tuple of it and s. Statistics are float32 for 16-bit
        dtypes; the weight's gradient is accumulated in float32.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit.
    """
    shape = dims_of(normalized_shape)
    if residual is not None:
        results = _added("rms_norm", input, residual, shape, weight, eps, 0.0, weight_offset, None, backend)
        return results if prenorm else results[0]

    if backend is None and weight_offset == 0.0 and not torch.compiler.is_compiling():
        plain = _plain(input, shape, weight, eps)
        if plain is not None:
            return (plain, input) if prenorm else plain
    if weight_offset != 0.0:
        check_values("rms_norm", weight_offset)

    def problem() -> RMSNormProblem:
        return _problem(input, shape, weight)

    if torch.compiler.is_compiling():
        compute = OP.resolve(problem(), backend).public
    else:
        signature = (input.shape, shape, input.dtype, input.device, key_of(weight))
        compute = OP.resolve_cached(signature, problem, backend).run
    eps = _default_eps(input.dtype) if eps is None else float(eps)
    (weight,) = parameters_for(input.dtype, weight)
    output, _rstd = compute(input, weight, len(shape), eps, float(weight_offset))
    return (output, input) if prenorm else output


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
    seed: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """s = residual + dropout(input) and rms_norm(s), in one pass forward and one backward.

    Args:
        input: (..., *normalized_shape), float32, bfloat16, float16 or float64, any strides; what dropout is applied to.
        residual: the input's shape. s is rounded once to the common dtype of both and normalised as it was rounded; a
            16-bit input with a float32 residual, as autocast makes them, costs no copy.
        normalized_shape: the trailing dimensions that are normalised together.
        weight: normalized_shape, any floating dtype.
        eps: added to the mean square; None is torch's default, the epsilon of float32 (float64 for float64).
        dropout_p: probability in [0, 1] of dropping an element of input; the kept ones are scaled by 1 / (1 - p).
            The mask is a function of (seed, offset) drawn from torch's generator (fastattn.philox.row_mask).
        weight_offset: added to a weight that is given.
        seed: fixes the dropout mask: an int in [0, 2**63).
        backend: serve with this backend or raise BackendUnsupported.

    Returns:
        The norm and s, contiguous, of the input's shape and the common dtype. Gradients may come in through both.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit.
    """
    shape = dims_of(normalized_shape)
    return _added("add_rms_norm", input, residual, shape, weight, eps, dropout_p, weight_offset, seed, backend)


def _added(
    op: str,
    input: Tensor,
    residual: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    eps: float | None,
    dropout_p: float,
    weight_offset: float,
    seed: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    if (
        dropout_p == 0.0 and weight_offset == 0.0 and seed is None and backend is None
        and not torch.compiler.is_compiling() and plain_cpu(input, shape, weight)
        and type(residual) is Tensor and residual.is_cpu and residual.dtype == input.dtype
        and residual.shape == input.shape
    ):  # fmt: skip
        results = ADD_OP.attempt(
            input, residual, weight, None, len(shape), _FLOAT_EPS if eps is None else eps, 0.0, 0.0
        )
        if results is not None:
            return results[0], results[1]
    check_values(op, weight_offset, dropout_p, seed)

    def problem() -> AddRMSNormProblem:
        return _add_problem(op, input, residual, shape, weight, dropout_p > 0.0)

    if torch.compiler.is_compiling():
        compute = ADD_OP.resolve(problem(), backend).public
    else:
        signature = (
            op, input.shape, shape, input.dtype, input.device, key_of(residual), key_of(weight),
            dropout_p > 0.0,
        )  # fmt: skip
        compute = ADD_OP.resolve_cached(signature, problem, backend).run
    x, r = sides(input, residual)
    (weight,) = parameters_for(r.dtype, weight)
    philox = dropout_state(x.device, dropout_p, seed)
    eps = _default_eps(r.dtype) if eps is None else float(eps)
    output, total, _rstd = compute(x, r, weight, philox, len(shape), eps, float(weight_offset), float(dropout_p))
    return output, total


# ---- what dispatch would do ----


def _problem(input: Tensor, shape: tuple[int, ...], weight: Tensor | None) -> RMSNormProblem:
    check("rms_norm", input, shape, weight=weight)
    (weight,) = parameters_for(input.dtype, weight)
    return RMSNormProblem(
        device=input.device.type,
        dtype=input.dtype,
        shape=tuple(input.shape),
        normalized_ndim=len(shape),
        weight_dtype=None if weight is None else weight.dtype,
    )


def _add_problem(
    op: str,
    input: Tensor,
    residual: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    dropout: bool,
) -> AddRMSNormProblem:
    check(op, input, shape, weight=weight)
    check_residual(op, input, residual)
    x, r = sides(input, residual)
    (weight,) = parameters_for(r.dtype, weight)
    return AddRMSNormProblem(
        device=input.device.type,
        dtype=r.dtype,
        shape=tuple(input.shape),
        normalized_ndim=len(shape),
        weight_dtype=None if weight is None else weight.dtype,
        input_dtype=x.dtype,
        dropout=dropout,
    )


def _prepare(
    input: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    **_: Any,
) -> tuple[Op, Problem]:
    shape = dims_of(normalized_shape)
    check_values("rms_norm", weight_offset)
    if residual is None:
        return OP, _problem(input, shape, weight)
    return ADD_OP, _add_problem("rms_norm", input, residual, shape, weight, False)


def _add_prepare(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
    seed: int | None = None,
    **_: Any,
) -> tuple[Op, Problem]:
    check_values("add_rms_norm", weight_offset, dropout_p, seed)
    return ADD_OP, _add_problem("add_rms_norm", input, residual, dims_of(normalized_shape), weight, dropout_p > 0.0)


rms_norm.prepare = _prepare  # type: ignore[attr-defined]
add_rms_norm.prepare = _add_prepare  # type: ignore[attr-defined]
