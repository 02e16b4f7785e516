"""What GELU and SiLU have in common: an activation of input + bias as an op, what it asks of its arguments, its way to
a backend, and its reference. They are x times a gate: a number between 0 and 1 that grows with x."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import Implementation, Op, Problem, check_size, key_of
from fastattn.numerics import FLOATING, accumulation_dtype


@dataclass(frozen=True)
class ActivationProblem(Problem):
    shape: tuple[int, ...]
    bias_dtype: torch.dtype | None


def _forward_fake(input: Tensor, bias: Tensor | None, *form: int) -> Tensor:
    return input.new_empty(input.shape)


def _backward_fake(
    grad_output: Tensor, input: Tensor, bias: Tensor | None, bias_grad: bool, *form: int
) -> tuple[Tensor, Tensor]:
    if bias is None:
        return input.new_empty(input.shape), input.new_empty((0,), dtype=torch.float32)
    return input.new_empty(input.shape), bias.new_empty(bias.shape if bias_grad else (0,))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    input, bias, *ctx.form = inputs
    ctx.save_for_backward(input, bias)


def _backward(kernel: Any, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    input, bias = ctx.saved_tensors
    bias_grad = bias is not None and ctx.needs_input_grad[1]
    grad_input, grad_bias = kernel(grad_output, input, bias, bias_grad, *ctx.form)
    return grad_input, grad_bias if bias_grad else None, *(None for _ in ctx.form)


def activation_op(name: str, form: str = "") -> Op:
    """The op. form: of an activation that has several, the argument that says by number which, as schemas have it."""
    form = form and f", {form}"
    return Op(
        name,
        forward_schema=f"(Tensor input, Tensor? bias{form}) -> Tensor",
        backward_schema=(
            f"(Tensor grad_output, Tensor input, Tensor? bias, bool bias_grad{form})"
            " -> (Tensor grad_input, Tensor grad_bias)"
        ),
        forward_fake=_forward_fake,
        backward_fake=_backward_fake,
        setup_context=_setup_context,
        backward=_backward,
    )


# ---- calls ----


def check(op: str, input: Tensor, bias: Tensor | None) -> None:
    """ValueError unless the two fit."""
    if input.dtype not in FLOATING:
        raise ValueError(f"{op}: input must be float32, bfloat16, float16 or float64, got {input.dtype}")
    check_size(op, "an input", input.shape)
    if bias is None:
        return
    if input.ndim == 0 or tuple(bias.shape) != tuple(input.shape[-1:]):
        raise ValueError(
            f"{op}: bias must have shape ({input.shape[-1] if input.ndim else 'columns'},) for an input of shape"
            f" {tuple(input.shape)}, got {tuple(bias.shape)}"
        )
    if bias.dtype not in FLOATING or bias.device != input.device:
        raise ValueError(f"{op}: bias must be floating and on {input.device}, got {bias.dtype} on {bias.device}")


def canonical(input: Tensor, bias: Tensor) -> Tensor:
    """The bias as kernels take it: contiguous, of the input's dtype or float32 (float64 for float64 input)."""
    if bias.dtype != input.dtype:
        bias = bias.to(accumulation_dtype(input.dtype))
    return bias.contiguous()


def facts(input: Tensor, bias: Tensor | None) -> dict[str, Any]:
    """The fields of an ActivationProblem."""
    return {
        "device": input.device.type, "dtype": input.dtype, "shape": tuple(input.shape),
        "bias_dtype": None if bias is None else canonical(input, bias).dtype,
    }  # fmt: skip


def compute(
    op: Op,
    problem: Callable[[], ActivationProblem],
    input: Tensor,
    bias: Tensor | None,
    backend: str | None,
    form: tuple[int, ...] | None = (),
) -> Any:
    """The activation of input + bias. problem: validates the arguments and says what they are; form: the argument that
    the op has for it, None for one that is not valid."""
    # The commonest call, where overhead counts.
    if (
        backend is None and bias is None and form is not None and type(input) is Tensor and input.is_cpu
        and not torch.compiler.is_compiling()
    ):  # fmt: skip
        output = op.attempt(input, None, *form)
        if output is not None:
            return output
    if torch.compiler.is_compiling():
        run = op.resolve(problem(), backend).public
    else:
        run = op.resolve_cached((key_of(input), key_of(bias), form), problem, backend).run
    if bias is not None and not (bias.dtype == input.dtype and bias.is_contiguous()):
        bias = canonical(input, bias)
    assert form is not None
    return run(input, bias, *form)


# ---- in plain torch ----

#: Of x, and of the form's number where there are several.
Elementwise = Callable[..., Tensor]


def reference(gate: Elementwise, density: Elementwise) -> Implementation:
    """x gate(x) of x = input + bias in plain torch, float32 (float64 for float64) inside. density: the gate's
    derivative."""

    def total(input: Tensor, bias: Tensor | None) -> Tensor:
        x = input.to(accumulation_dtype(input.dtype))
        return x if bias is None else x + bias

    def forward(input: Tensor, bias: Tensor | None, *form: int) -> Tensor:
        x = total(input, bias)
        return (x * gate(x, *form)).to(input.dtype).contiguous()

    def backward(
        grad_output: Tensor, input: Tensor, bias: Tensor | None, bias_grad: bool, *form: int
    ) -> tuple[Tensor, Tensor]:
        """g (gate(x) + x density(x)); the bias' gradient is the sum over rows."""
        x = total(input, bias)
        grad = grad_output.to(x.dtype) * (gate(x, *form) + x * density(x, *form))
        if bias is None:
            grad_bias = input.new_empty((0,), dtype=torch.float32)
        elif bias_grad:
            rows = math.prod(input.shape[:-1])
            grad_bias = grad.reshape(rows, input.shape[-1]).sum(0).to(bias.dtype)
        else:
            grad_bias = bias.new_empty((0,))
        return grad.to(input.dtype).contiguous(), grad_bias

    return Implementation(lambda problem: None, forward, backward, differentiable=True)
