"""LayerNorm, with an optional residual added first: the public function and the op's contract.

s = input + residual        y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias     (Ba et al. 2016)
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
class LayerNormProblem(Problem):
    shape: tuple[int, ...]
    normalized_ndim: int
    weight_dtype: torch.dtype | None
    bias_dtype: torch.dtype | None
    residual: bool


def _rows(input: Tensor, normalized_ndim: int) -> int:
    return math.prod(input.shape[: input.ndim - normalized_ndim])


def _forward_fake(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = input.new_empty((_rows(input, normalized_ndim),), dtype=accumulation_dtype(input.dtype))
    total = input.new_empty((0,) if residual is None else input.shape)
    return input.new_empty(input.shape), total, statistics, torch.empty_like(statistics)


def _backward_fake(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    normalized_ndim: int,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def parameter(tensor: Tensor | None, wanted: bool) -> Tensor:
        if tensor is None:
            return input.new_empty((0,), dtype=torch.float32)
        return tensor.new_empty(tensor.shape if wanted else (0,))

    return input.new_empty(input.shape), parameter(weight, weight_grad), parameter(bias, bias_grad)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    input, residual, weight, bias, ctx.normalized_ndim, _ = inputs
    _, total, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(*((mean, rstd) if ctx.has_residual else (total, mean, rstd)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total if ctx.has_residual else input, weight, bias, mean, rstd)


def _backward(kernel: Any, ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None, *_: Any) -> tuple[Any, ...]:
    total, weight, bias, mean, rstd = ctx.saved_tensors
    if grad_output is None:
        return grad_sum, grad_sum if ctx.has_residual else None, None, None, None, None
    weight_grad = weight is not None and ctx.needs_input_grad[2]
    bias_grad = bias is not None and ctx.needs_input_grad[3]
    grad_input, grad_weight, grad_bias = kernel(
        grad_output,
        grad_sum if ctx.has_residual else None,
        total,
        weight,
        bias,
        mean,
        rstd,
        ctx.normalized_ndim,
        weight_grad,
        bias_grad,
    )
    return (
        grad_input,
        grad_input if ctx.has_residual else None,
        grad_weight if weight_grad else None,
        grad_bias if bias_grad else None,
        None,
        None,
    )


OP = Op(
    "layer_norm",
    forward_schema=(
        "(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, int normalized_ndim, float eps)"
        " -> (Tensor output, Tensor sum, Tensor mean, Tensor rstd)"
    ),
    backward_schema=(
        "(Tensor grad_output, Tensor? grad_sum, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
        " int normalized_ndim, bool weight_grad, bool bias_grad)"
        " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
    ),
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _check(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    if input.dtype not in FLOATING:
        raise ValueError(f"layer_norm: input must be float32, bfloat16, float16 or float64, got {input.dtype}")
    check_size("layer_norm", "an input", input.shape)
    n = len(normalized_shape)
    if n == 0 or n > input.ndim or tuple(input.shape[input.ndim - n :]) != normalized_shape:
        raise ValueError(
            f"layer_norm: the input's last dimensions must be normalized_shape {normalized_shape}, got an input of"
            f" shape {tuple(input.shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != normalized_shape:
            raise ValueError(f"layer_norm: {name} must have shape {normalized_shape}, got {tuple(tensor.shape)}")
        if tensor.dtype not in FLOATING or tensor.device != input.device:
            raise ValueError(
                f"layer_norm: {name} must be floating and on {input.device}, got {tensor.dtype} on {tensor.device}"
            )
    if residual is not None and (residual.shape != input.shape or residual.device != input.device):
        raise ValueError(
            f"layer_norm: residual must have the input's shape {tuple(input.shape)} and device {input.device}, got"
            f" {tuple(residual.shape)} on {residual.device}"
        )
    if residual is not None and residual.dtype not in FLOATING:
        raise ValueError(f"layer_norm: residual must be floating, got {residual.dtype}")


def _canonical(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Tensors as kernels take them: input and residual of one dtype; weight and bias contiguous and of one dtype,
    the input's or float32 (float64 for float64 input)."""
    if residual is not None and residual.dtype != input.dtype:
        common = torch.promote_types(input.dtype, residual.dtype)
        input, residual = input.to(common), residual.to(common)
    dtype = input.dtype
    if (weight is not None and weight.dtype != dtype) or (bias is not None and bias.dtype != dtype):
        dtype = accumulation_dtype(dtype)
    if weight is not None:
        weight = weight.to(dtype).contiguous()
    if bias is not None:
        bias = bias.to(dtype).contiguous()
    return input, weight, bias, residual


def _problem(
    input: Tensor, normalized_ndim: int, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> LayerNormProblem:
    return LayerNormProblem(
        device=input.device.type,
        dtype=input.dtype,
        shape=tuple(input.shape),
        normalized_ndim=normalized_ndim,
        weight_dtype=None if weight is None else weight.dtype,
        bias_dtype=None if bias is None else bias.dtype,
        residual=residual is not None,
    )


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    backend: str | None = None,
) -> Any:
    """torch.nn.functional.layer_norm, optionally of input + residual in one pass.

    Args:
        input: (..., *normalized_shape), float32, bfloat16, float16 or float64, any strides.
        normalized_shape: the trailing dimensions that are normalised together.
        weight, bias: normalized_shape, any floating dtype (float32 parameters with 16-bit inputs cost no copy).
        eps: added to the variance.
        residual: the input's shape; s = input + residual (rounded to their common dtype) is normalised.
        prenorm: also return s, for the next residual connection.
        backend: serve with this backend or raise BackendUnsupported.

    Returns:
        Contiguous, the input's shape and dtype; with prenorm a tuple of it and s. Statistics are float32 for 16-bit
        dtypes; weight and bias gradients are accumulated in float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    ndim = len(shape)
    if torch.compiler.is_compiling():
        _check(input, shape, weight, bias, residual)
        x, w, b, r = _canonical(input, weight, bias, residual)
        bound = OP.resolve(_problem(x, ndim, w, b, r), backend)
    else:
        signature = (
            input.shape, shape, input.dtype, input.device,
            None if weight is None else (weight.shape, weight.dtype, weight.device),
            None if bias is None else (bias.shape, bias.dtype, bias.device),
            None if residual is None else (residual.shape, residual.dtype, residual.device),
        )  # fmt: skip

        def problem() -> LayerNormProblem:
            _check(input, shape, weight, bias, residual)
            x, w, b, r = _canonical(input, weight, bias, residual)
            return _problem(x, ndim, w, b, r)

        bound = OP.resolve_cached(signature, problem, backend)
        x, w, b, r = _canonical(input, weight, bias, residual)
    output, total, _mean, _rstd = bound(x, r, w, b, ndim, float(eps))
    if not prenorm:
        return output
    return output, (x if r is None else total)


def _prepare(
    input: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    **_: Any,
) -> tuple[Op, LayerNormProblem]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    _check(input, shape, weight, bias, residual)
    x, w, b, r = _canonical(input, weight, bias, residual)
    return OP, _problem(x, len(shape), w, b, r)


layer_norm.prepare = _prepare  # type: ignore[attr-defined]
