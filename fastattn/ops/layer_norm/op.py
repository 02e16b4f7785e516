"""LayerNorm, and LayerNorm of a sum: the public functions and the contracts of the ops.

layer_norm        y = (x - mean(x)) / sqrt(var(x) + eps) * (weight + weight_offset) + bias      (Ba et al. 2016)
add_layer_norm    s = residual + dropout(input), y = layer_norm(s): a pre-LN block's addition and the norm that follows
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import Op, Problem, key_of
from fastattn.norms import (
    AddNormProblem,
    NormContract,
    NormProblem,
    check_values,
    dims_of,
    dropout_state,
    parameters_for,
    plain_cpu,
    sides,
)

CONTRACT = NormContract(
    "layer_norm",
    parameters=("weight", "bias"),
    statistics=2,
    forward_schema=(
        "(Tensor input, Tensor? weight, Tensor? bias, int normalized_ndim, float eps, float weight_offset)"
        " -> (Tensor output, Tensor mean, Tensor rstd)"
    ),
    backward_schema=(
        "(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
        " int normalized_ndim, float weight_offset, bool weight_grad, bool bias_grad)"
        " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
    ),
    add_forward_schema=(
        "(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, Tensor? philox, int normalized_ndim, float eps,"
        " float weight_offset, float dropout_p) -> (Tensor output, Tensor sum, Tensor mean, Tensor rstd)"
    ),
    add_backward_schema=(
        "(Tensor grad_output, Tensor? grad_sum, Tensor sum, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
        " Tensor? philox, int normalized_ndim, float weight_offset, float dropout_p, ScalarType input_dtype,"
        " bool weight_grad, bool bias_grad)"
        " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)"
    ),
)
OP, ADD_OP = CONTRACT.op, CONTRACT.add_op


# ---- the public functions ----


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

    # The commonest call, where overhead counts.
    if (
        backend is None and weight_offset == 0.0 and not torch.compiler.is_compiling()
        and plain_cpu(input, shape, weight, bias)
    ):  # fmt: skip
        output = OP.attempt(input, weight, bias, len(shape), eps, 0.0, visible=True)
        if output is not None:
            return (output, input) if prenorm else output
    if weight_offset != 0.0:
        check_values("layer_norm", weight_offset)

    def problem() -> NormProblem:
        return CONTRACT.problem(input, shape, (weight, bias))

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
        results = ADD_OP.attempt(input, residual, weight, bias, None, len(shape), eps, 0.0, 0.0, visible=True)
        if results is not None:
            return results
    check_values(op, weight_offset, dropout_p, seed)

    def problem() -> AddNormProblem:
        return CONTRACT.add_problem(op, input, residual, shape, (weight, bias), dropout_p > 0.0)

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
    return CONTRACT.prepared("layer_norm", input, residual, shape, (weight, bias), 0.0, weight_offset, None)


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
    shape = dims_of(normalized_shape)
    return CONTRACT.prepared("add_layer_norm", input, residual, shape, (weight, bias), dropout_p, weight_offset, seed)


layer_norm.prepare = _prepare  # type: ignore[attr-defined]
add_layer_norm.prepare = _add_prepare  # type: ignore[attr-defined]
