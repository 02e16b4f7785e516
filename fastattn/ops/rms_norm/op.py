"""RMSNorm, and RMSNorm of a sum: the public functions and the contracts of the ops.

rms_norm        y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)     (Zhang and Sennrich 2019, equation 4)
add_rms_norm    s = residual + dropout(input), y = rms_norm(s): a pre-norm block's addition and the norm that follows
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
from fastattn.numerics import accumulation_dtype

_FLOAT_EPS = torch.finfo(torch.float32).eps

CONTRACT = NormContract(
    "rms_norm",
    parameters=("weight",),
    statistics=1,
    forward_schema=(
        "(Tensor input, Tensor? weight, int normalized_ndim, float eps, float weight_offset)"
        " -> (Tensor output, Tensor rstd)"
    ),
    backward_schema=(
        "(Tensor grad_output, Tensor input, Tensor? weight, Tensor rstd,"
        " int normalized_ndim, float weight_offset, bool weight_grad)"
        " -> (Tensor grad_input, Tensor grad_weight)"
    ),
    add_forward_schema=(
        "(Tensor input, Tensor residual, Tensor? weight, Tensor? philox, int normalized_ndim, float eps,"
        " float weight_offset, float dropout_p) -> (Tensor output, Tensor sum, Tensor rstd)"
    ),
    add_backward_schema=(
        "(Tensor grad_output, Tensor? grad_sum, Tensor sum, Tensor? weight, Tensor rstd,"
        " Tensor? philox, int normalized_ndim, float weight_offset, float dropout_p, ScalarType input_dtype,"
        " bool weight_grad)"
        " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight)"
    ),
)
OP, ADD_OP = CONTRACT.op, CONTRACT.add_op


def _default_eps(dtype: torch.dtype) -> float:
    """torch's: the machine epsilon of the dtype that it accumulates in."""
    return torch.finfo(accumulation_dtype(dtype)).eps


# ---- the public functions ----


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

    # The commonest call, where overhead counts.
    if (
        backend is None and weight_offset == 0.0 and not torch.compiler.is_compiling()
        and plain_cpu(input, shape, weight)
    ):  # fmt: skip
        output = OP.attempt(input, weight, len(shape), _FLOAT_EPS if eps is None else eps, 0.0, visible=True)
        if output is not None:
            return (output, input) if prenorm else output
    if weight_offset != 0.0:
        check_values("rms_norm", weight_offset)

    def problem() -> NormProblem:
        return CONTRACT.problem(input, shape, (weight,))

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
            input, residual, weight, None, len(shape), _FLOAT_EPS if eps is None else eps, 0.0, 0.0, visible=True
        )
        if results is not None:
            return results
    check_values(op, weight_offset, dropout_p, seed)

    def problem() -> AddNormProblem:
        return CONTRACT.add_problem(op, input, residual, shape, (weight,), dropout_p > 0.0)

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
    return CONTRACT.prepared("rms_norm", input, residual, shape, (weight,), 0.0, weight_offset, None)


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
    shape = dims_of(normalized_shape)
    return CONTRACT.prepared("add_rms_norm", input, residual, shape, (weight,), dropout_p, weight_offset, seed)


rms_norm.prepare = _prepare  # type: ignore[attr-defined]
add_rms_norm.prepare = _add_prepare  # type: ignore[attr-defined]
