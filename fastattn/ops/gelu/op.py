"""GELU of input + bias: the public function and the op's contract.

GELU(x) = x Phi(x), Phi the distribution function of the standard normal (Hendrycks and Gimpel 2016, section 2), or
with Phi(x) taken as (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import Op, Problem, check_size
from fastattn.numerics import FLOATING, accumulation_dtype

APPROXIMATIONS = ("none", "tanh")


@dataclass(frozen=True)
class GeluProblem(Problem):
    shape: tuple[int, ...]
    approximate: str
    bias_dtype: torch.dtype | None


def _forward_fake(input: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return input.new_empty(input.shape)


def _backward_fake(
    grad_output: Tensor, input: Tensor, bias: Tensor | None, tanh: bool, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    if bias is None:
        return input.new_empty(input.shape), input.new_empty((0,), dtype=torch.float32)
    return input.new_empty(input.shape), bias.new_empty(bias.shape if bias_grad else (0,))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    input, bias, ctx.tanh = inputs
    ctx.save_for_backward(input, bias)


def _backward(kernel: Any, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    input, bias = ctx.saved_tensors
    bias_grad = bias is not None and ctx.needs_input_grad[1]
    grad_input, grad_bias = kernel(grad_output, input, bias, ctx.tanh, bias_grad)
    return grad_input, grad_bias if bias_grad else None, None


OP = Op(
    "gelu",
    forward_schema="(Tensor input, Tensor? bias, bool tanh) -> Tensor",
    backward_schema=(
        "(Tensor grad_output, Tensor input, Tensor? bias, bool tanh, bool bias_grad)"
        " -> (Tensor grad_input, Tensor grad_bias)"
    ),
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _check(input: Tensor, approximate: str, bias: Tensor | None) -> None:
    if input.dtype not in FLOATING:
        raise ValueError(f"gelu: input must be float32, bfloat16, float16 or float64, got {input.dtype}")
    check_size("gelu", "an input", input.shape)
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"gelu: approximate must be one of {APPROXIMATIONS}, got {approximate!r}")
    if bias is None:
        return
    if input.ndim == 0 or tuple(bias.shape) != tuple(input.shape[-1:]):
        raise ValueError(
            f"gelu: bias must have shape ({input.shape[-1] if input.ndim else 'columns'},) for an input of shape"
            f" {tuple(input.shape)}, got {tuple(bias.shape)}"
        )
    if bias.dtype not in FLOATING or bias.device != input.device:
        raise ValueError(f"gelu: bias must be floating and on {input.device}, got {bias.dtype} on {bias.device}")


def _canonical(input: Tensor, bias: Tensor | None) -> Tensor | None:
    """The bias as kernels take it: contiguous, of the input's dtype or float32 (float64 for float64 input)."""
    if bias is None:
        return None
    if bias.dtype != input.dtype:
        bias = bias.to(accumulation_dtype(input.dtype))
    return bias.contiguous()


def _problem(input: Tensor, approximate: str, bias: Tensor | None) -> GeluProblem:
    return GeluProblem(
        device=input.device.type,
        dtype=input.dtype,
        shape=tuple(input.shape),
        approximate=approximate,
        bias_dtype=None if bias is None else bias.dtype,
    )


def gelu(input: Tensor, approximate: str = "none", *, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """torch.nn.functional.gelu, optionally of input + bias in one pass.

    Args:
        input: any shape and strides, float32, bfloat16, float16 or float64.
        approximate: "none": x Phi(x) by the error function; "tanh": the approximation by tanh.
        bias: (columns,), added along the last dimension before the activation, any floating dtype. The sum is float32
            (float64 for float64) and is not rounded in between.
        backend: serve with this backend or raise BackendUnsupported.

    Returns: contiguous, the input's shape and dtype. The bias' gradient is accumulated in float32.
    Raises: ValueError for shapes, dtypes, devices or an approximation that do not fit.
    """
    if torch.compiler.is_compiling():
        _check(input, approximate, bias)
        b = _canonical(input, bias)
        compute = OP.resolve(_problem(input, approximate, b), backend).public
    else:
        signature = (
            input.shape, input.dtype, input.device, approximate,
            None if bias is None else (bias.shape, bias.dtype, bias.device),
        )  # fmt: skip

        def problem() -> GeluProblem:
            _check(input, approximate, bias)
            return _problem(input, approximate, _canonical(input, bias))

        compute = OP.resolve_cached(signature, problem, backend).run
        b = _canonical(input, bias)
    return compute(input, b, approximate == "tanh")


def _prepare(
    input: Tensor, approximate: str = "none", *, bias: Tensor | None = None, **_: Any
) -> tuple[Op, GeluProblem]:
    _check(input, approximate, bias)
    return OP, _problem(input, approximate, _canonical(input, bias))


gelu.prepare = _prepare  # type: ignore[attr-defined]
