"""LayerNorm, and LayerNorm of a sum: the public functions and the contracts of the ops.

layer_norm        y = (x - mean(x)) / sqrt(var(x) + eps) * (weight + weight_offset) + bias      (Ba et al. 2016)
add_layer_norm    s = residual + dropout(input), y = layer_norm(s): a pre-LN block's addition and the norm that follows
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


@dataclass(frozen=True)
class LayerNormProblem(Problem):
    """dtype is the input's."""

    shape: tuple[int, ...]
    normalized_ndim: int
    weight_dtype: torch.dtype | None
    bias_dtype: torch.dtype | None


@dataclass(frozen=True)
class AddLayerNormProblem(LayerNormProblem):
    """dtype is that of the sum, of residual and of the output."""

    input_dtype: torch.dtype
    dropout: bool


# ---- layer_norm ----


def _forward_fake(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = input.new_empty((rows_of(input, normalized_ndim),), dtype=accumulation_dtype(input.dtype))
    return input.new_empty(input.shape), statistics, torch.empty_like(statistics)


def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    normalized_ndim: int,
    weight_offset: float,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    parameters = parameter_fake(input, weight, weight_grad), parameter_fake(input, bias, bias_grad)
    return input.new_empty(input.shape), *parameters


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    input, weight, bias, ctx.normalized_ndim, _, ctx.weight_offset = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, weight, bias, mean, rstd)


def _backward(kernel: Any, ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_output is None:
        return None, None, None, None, None, None
    input, weight, bias, mean, rstd = ctx.saved_tensors
    weight_grad = weight is not None and ctx.needs_input_grad[1]
    bias_grad = bias is not None and ctx.needs_input_grad[2]
    grad_input, grad_weight, grad_bias = kernel(
        grad_output, input, weight, bias, mean, rstd, ctx.normalized_ndim, ctx.weight_offset, weight_grad, bias_grad
    )
    return grad_input, grad_weight if weight_grad else None, grad_bias if bias_grad else None, None, None, None


OP = Op(
    "layer_norm",
    forward_schema=(
        "(Tensor input, Tensor? weight, Tensor? bias, int normalized_ndim, float eps, float weight_offset)"
        " -> (Tensor output, Tensor mean, Tensor rstd)"
    ),
    backward_schema=(
        "(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
        " int normalized_ndim, float weight_offset, bool weight_grad, bool bias_grad)"
        " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
    ),
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    hidden=2,
)


# ---- add_layer_norm ----


def _add_forward_fake(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    philox: Tensor | None,
    normalized_ndim: int,
    eps: float,
    weight_offset: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output, mean, rstd = _forward_fake(residual, weight, bias, normalized_ndim, eps, weight_offset)
    return output, residual.new_empty(residual.shape), mean, rstd


def _add_backward_fake(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    philox: Tensor | None,
    normalized_ndim: int,
    weight_offset: float,
    dropout_p: float,
    input_dtype: torch.dtype,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    apart = dropout_p > 0.0 or input_dtype != sum.dtype
    grad_input = sum.new_empty(sum.shape if apart else (0,), dtype=input_dtype)
    parameters = parameter_fake(sum, weight, weight_grad), parameter_fake(sum, bias, bias_grad)
    return grad_input, sum.new_empty(sum.shape), *parameters


def _add_setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    input, _, weight, bias, philox, ctx.normalized_ndim, _, ctx.weight_offset, ctx.dropout_p = inputs
    _, total, mean, rstd = output
    ctx.input_dtype = input.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, bias, mean, rstd, philox)


def _add_backward(
    kernel: Any, ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    total, weight, bias, mean, rstd, philox = ctx.saved_tensors
    apart = ctx.dropout_p > 0.0 or ctx.input_dtype != total.dtype
    if grad_output is None:
        if grad_sum is None or not apart:
            return grad_sum, grad_sum, *(None,) * 7
        grad_output = torch.zeros_like(total)
    weight_grad = weight is not None and ctx.needs_input_grad[2]
    bias_grad = bias is not None and ctx.needs_input_grad[3]
    grad_input, grad_residual, grad_weight, grad_bias = kernel(
        grad_output,
        grad_sum,
        total,
        weight,
        bias,
        mean,
        rstd,
        philox,
        ctx.normalized_ndim,
        ctx.weight_offset,
        ctx.dropout_p,
        ctx.input_dtype,
        weight_grad,
        bias_grad,
    )
    return (
        grad_input if apart else grad_residual,
        grad_residual,
        grad_weight if weight_grad else None,
        grad_bias if bias_grad else None,
        *(None,) * 5,
    )


ADD_OP = Op(
    "add_layer_norm",
    forward_schema=(
        "(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, Tensor? philox, int normalized_ndim, float eps,"
        " float weight_offset, float dropout_p) -> (Tensor output, Tensor sum, Tensor mean, Tensor rstd)"
    ),
    backward_schema=(
        "(Tensor grad_output, Tensor? grad_sum, Tensor sum, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
        " Tensor? philox, int normalized_ndim, float weight_offset, float dropout_p, ScalarType input_dtype,"
        " bool weight_grad, bool bias_grad)"
        " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)"
    ),
    forward_fake=_add_forward_fake,
    backward_fake=_add_backward_fake,
    setup_context=_add_setup_context,
    backward=_add_backward,
    hidden=2,
)


# ---- the public functions ----


def _plain(
    input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """The commonest call, where overhead counts; None for others."""
    if not plain_cpu(input, shape, weight, bias):
        return None
    results = OP.attempt(input, weight, bias, len(shape), eps, 0.0)
    return None if results is None else results[0]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Any:
    """torch.nn.functional.layer_norm, optionally of input + residual in one pass.

    Args:
        input: (..., *normalized_shape), float32, bfloat16, float16 or float64, any strides.
        normalized_shape: the trailing dimensions that are normalised together.
        weight, bias: normalized_shape, any floating dtype (float32 parameters with 16-bit inputs cost no copy).
        eps: added to the variance.
        residual: the input's shape; s = input + residual (rounded to their common dtype) is normalised, as
            `add_layer_norm` does.
        prenorm: also return s, for the next residual connection.
        weight_offset: added to a weight that is given.
        backend: serve with this backend or raise BackendUnsupported.

    Returns:
        Contiguous, the input's shape and dtype; with prenorm a tuple of it and s. Statistics are float32 for 16-bit
        dtypes; weight and bias gradients are accumulated in float32.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit.
    """
    shape = dims_of(normalized_shape)
    if residual is not None:
        results = _added("layer_norm", input, residual, shape, weight, bias, eps, 0.0, weight_offset, None, backend)
        return results if prenorm else results[0]

    if backend is None and weight_offset == 0.0 and not torch.compiler.is_compiling():
        plain = _plain(input, shape, weight, bias, eps)
        if plain is not None:
            return (plain, input) if prenorm else plain
    if weight_offset != 0.0:
        check_values("layer_norm", weight_offset)

    def problem() -> LayerNormProblem:
        return _problem(input, shape, weight, bias)

    if torch.compiler.is_compiling():
        compute = OP.resolve(problem(), backend).public
    else:
        signature = (input.shape, shape, input.dtype, input.device, key_of(weight), key_of(bias))
        compute = OP.resolve_cached(signature, problem, backend).run
    weight, bias = parameters_for(input.dtype, weight, bias)
    output, _mean, _rstd = compute(input, weight, bias, len(shape), float(eps), float(weight_offset))
    return (output, input) if prenorm else output


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
    seed: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """s = residual + dropout(input) and layer_norm(s), in one pass forward and one backward.

    Args:
        input: (..., *normalized_shape), float32, bfloat16, float16 or float64, any strides; what dropout is applied to.
        residual: the input's shape. s is rounded once to the common dtype of both and normalised as it was rounded; a
            16-bit input with a float32 residual, as autocast makes them, costs no copy.
        normalized_shape: the trailing dimensions that are normalised together.
        weight, bias: normalized_shape, any floating dtype.
        eps: added to the variance.
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
    return _added("add_layer_norm", input, residual, shape, weight, bias, eps, dropout_p, weight_offset, seed, backend)


def _added(
    op: str,
    input: Tensor,
    residual: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    weight_offset: float,
    seed: int | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    if (
        dropout_p == 0.0 and weight_offset == 0.0 and seed is None and backend is None
        and not torch.compiler.is_compiling() and plain_cpu(input, shape, weight, bias)
        and type(residual) is Tensor and residual.is_cpu and residual.dtype == input.dtype
        and residual.shape == input.shape
    ):  # fmt: skip
        results = ADD_OP.attempt(input, residual, weight, bias, None, len(shape), eps, 0.0, 0.0)
        if results is not None:
            return results[0], results[1]
    check_values(op, weight_offset, dropout_p, seed)

    def problem() -> AddLayerNormProblem:
        return _add_problem(op, input, residual, shape, weight, bias, dropout_p > 0.0)

    if torch.compiler.is_compiling():
        compute = ADD_OP.resolve(problem(), backend).public
    else:
        signature = (
            op, input.shape, shape, input.dtype, input.device, key_of(residual), key_of(weight), key_of(bias),
            dropout_p > 0.0,
        )  # fmt: skip
        compute = ADD_OP.resolve_cached(signature, problem, backend).run
    x, r = sides(input, residual)
    weight, bias = parameters_for(r.dtype, weight, bias)
    philox = dropout_state(x.device, dropout_p, seed)
    output, total, _mean, _rstd = compute(
        x, r, weight, bias, philox, len(shape), float(eps), float(weight_offset), float(dropout_p)
    )
    return output, total


# ---- what dispatch would do ----


def _problem(input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> LayerNormProblem:
    check("layer_norm", input, shape, weight=weight, bias=bias)
    weight, bias = parameters_for(input.dtype, weight, bias)
    return LayerNormProblem(
        device=input.device.type,
        dtype=input.dtype,
        shape=tuple(input.shape),
        normalized_ndim=len(shape),
        weight_dtype=None if weight is None else weight.dtype,
        bias_dtype=None if bias is None else bias.dtype,
    )


def _add_problem(
    op: str,
    input: Tensor,
    residual: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    dropout: bool,
) -> AddLayerNormProblem:
    check(op, input, shape, weight=weight, bias=bias)
    check_residual(op, input, residual)
    x, r = sides(input, residual)
    weight, bias = parameters_for(r.dtype, weight, bias)
    return AddLayerNormProblem(
        device=input.device.type,
        dtype=r.dtype,
        shape=tuple(input.shape),
        normalized_ndim=len(shape),
        weight_dtype=None if weight is None else weight.dtype,
        bias_dtype=None if bias is None else bias.dtype,
        input_dtype=x.dtype,
        dropout=dropout,
    )


def _prepare(
    input: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    **_: Any,
) -> tuple[Op, Problem]:
    shape = dims_of(normalized_shape)
    check_values("layer_norm", weight_offset)
    if residual is None:
        return OP, _problem(input, shape, weight, bias)
    return ADD_OP, _add_problem("layer_norm", input, residual, shape, weight, bias, False)


def _add_prepare(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    weight_offset: float = 0.0,
    seed: int | None = None,
    **_: Any,
) -> tuple[Op, Problem]:
    check_values("add_layer_norm", weight_offset, dropout_p, seed)
    return ADD_OP, _add_problem(
        "add_layer_norm", input, residual, dims_of(normalized_shape), weight, bias, dropout_p > 0.0
    )


layer_norm.prepare = _prepare  # type: ignore[attr-defined]
add_layer_norm.prepare = _add_prepare  # type: ignore[attr-defined]
