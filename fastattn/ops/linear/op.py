"""Linear layers with their bias and activation: the public function and the op's contract.

    y = activation(x W^T + b)

gelu is x times the standard normal distribution function, gelu_tanh its approximation by tanh (Hendrycks and Gimpel
2016).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import preference
from fastattn.dispatch import Op, Problem, autocast_enabled, check_size, forced_backend, key_of
from fastattn.numerics import FLOATING

#: By number, as the torch ops take them.
ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu")
RELU = ACTIVATIONS.index("relu")


@dataclass(frozen=True)
class LinearProblem(Problem):
    """rows: of the input; inner, outer: columns of input and output."""

    rows: int
    inner: int
    outer: int
    weight_dtype: torch.dtype
    bias: bool
    activation: str | None


def _forward_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: int, save: bool
) -> tuple[Tensor, Tensor]:
    output = input.new_empty((*input.shape[:-1], weight.shape[0]))
    return output, torch.empty_like(output) if save else input.new_empty((0,))


def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    saved: Tensor | None,
    activation: int,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    parameter = input if bias is None else bias
    return (
        input.new_empty(input.shape if input_grad else (0,)),
        weight.new_empty(weight.shape if weight_grad else (0,)),
        parameter.new_empty((weight.shape[0],) if bias_grad else (0,)),
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    input, weight, bias, ctx.activation, _ = inputs
    result, preactivation = output
    if preactivation.numel() == 0:
        ctx.mark_non_differentiable(preactivation)
    ctx.set_materialize_grads(False)
    # The output of relu says where it was cut off.
    saved = None if ctx.activation == 0 else result if ctx.activation == RELU else preactivation
    ctx.save_for_backward(input, weight, bias, saved)


def _backward(
    kernel: Any, ctx: Any, grad_output: Tensor | None, grad_preactivation: Tensor | None = None
) -> tuple[Any, ...]:
    """The preactivation has a gradient of its own where a gradient is differentiated again."""
    input, weight, bias, saved = ctx.saved_tensors
    wanted = tuple(ctx.needs_input_grad[:3])
    gradients: list[Tensor | None] = [None] * 3
    for grad, before, activation in ((grad_output, saved, ctx.activation), (grad_preactivation, None, 0)):
        if grad is not None:
            if activation == 0 and wanted[1] and weight.stride(0) == 1 and weight.stride(1) > 1:
                found = _transposed_backward(kernel, grad, input, weight, bias, *wanted)
            else:
                found = kernel(grad, input, weight, bias, before, activation, *wanted)
            gradients = [g if total is None else total + g for total, g in zip(gradients, found, strict=True)]
    return (*(g if w else None for g, w in zip(gradients, wanted, strict=True)), None, None)


def _transposed_backward(
    kernel: Any,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a weight that is the transpose of what lies in memory: its gradient lies there like it.

    Autograd would copy it, and a transposing copy takes as long as a tenth of the product.
    """
    count = math.prod(input.shape[:-1])
    rows, outer = input.reshape(count, weight.shape[1]), grad_output.reshape(count, weight.shape[0])
    # x^T g, (in, out), is the weight gradient of a layer whose input is g and whose output's gradient is x.
    grad_weight = kernel(rows, outer, weight.t(), None, None, 0, False, True, False)[1].t()
    if not (input_grad or bias_grad):
        nothing = input.new_empty((0,))
        return nothing, grad_weight, nothing
    grad_input, _, grad_bias = kernel(grad_output, input, weight, bias, None, 0, input_grad, False, bias_grad)
    return grad_input, grad_weight, grad_bias


def _forward_flops(input: tuple[int, ...], weight: tuple[int, ...], *_: Any) -> int:
    return 2 * math.prod(input) * weight[0]


def _backward_flops(
    grad_output: tuple[int, ...],
    input: tuple[int, ...],
    weight: tuple[int, ...],
    bias: Any,
    saved: Any,
    activation: int,
    input_grad: bool,
    weight_grad: bool,
    *_: Any,
) -> int:
    return (input_grad + weight_grad) * _forward_flops(input, weight)


def _preference_class(problem: LinearProblem) -> str:
    name = str(problem.dtype).removeprefix("torch.")
    return f"{name}, one row" if problem.rows == 1 else name


OP = Op(
    "linear",
    forward_schema=(
        "(Tensor input, Tensor weight, Tensor? bias, int activation, bool save)"
        " -> (Tensor output, Tensor preactivation)"
    ),
    backward_schema=(
        "(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, Tensor? saved, int activation,"
        " bool input_grad, bool weight_grad, bool bias_grad)"
        " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
    ),
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    forward_flops=_forward_flops,
    backward_flops=_backward_flops,
    preference_class=_preference_class,
)


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if input.dtype not in FLOATING:
        raise ValueError(f"linear: input must be float32, bfloat16, float16 or float64, got {input.dtype}")
    if weight.ndim not in (1, 2):
        raise ValueError(f"linear: weight must be (out, in) or (in,), got {tuple(weight.shape)}")
    if input.ndim < 1 or input.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"linear: for a weight of shape {tuple(weight.shape)} the input's last dimension must be"
            f" {weight.shape[-1]}, got an input of shape {tuple(input.shape)}"
        )
    check_size("linear", "an input", input.shape)
    check_size("linear", "an output", (*input.shape[:-1], *weight.shape[:-1]))
    if bias is not None and tuple(bias.shape) != tuple(weight.shape[:-1]):
        raise ValueError(f"linear: bias must have shape {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}")
    cast = autocast_enabled(input.device.type)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != input.device:
            raise ValueError(f"linear: {name} is on {tensor.device}, input on {input.device}")
        if tensor.dtype != input.dtype and not (cast and tensor.dtype in FLOATING):
            raise ValueError(f"linear: {name} must be {input.dtype} as the input, got {tensor.dtype}")


def _canonical(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tensors as kernels take them. Autocast rounds the input; float32 parameters are rounded where they are read."""
    weight = weight if weight.ndim == 2 else weight[None]
    if bias is not None and bias.ndim == 0:
        bias = bias[None]
    if autocast_enabled(input.device.type):
        cast = torch.get_autocast_dtype(input.device.type)

        def lower(tensor: Tensor) -> Tensor:
            return tensor if tensor.dtype == torch.float64 else tensor.to(cast)

        input = lower(input)
        wide = input.dtype == cast
        weight = weight if wide and weight.dtype == torch.float32 else lower(weight)
        if bias is not None:
            bias = bias if wide and bias.dtype == torch.float32 else lower(bias)
    return input, weight, bias


def _problem(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> LinearProblem:
    return LinearProblem(
        device=input.device.type,
        dtype=input.dtype,
        rows=math.prod(input.shape[:-1]),
        inner=weight.shape[1],
        outer=weight.shape[0],
        weight_dtype=weight.dtype,
        bias=bias is not None,
        activation=activation,
    )


def short(input: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the call decides what a product in this dtype takes (preference.SHORT_PRODUCT). Compiled code has no
    calls, and exported code must not ask for sizes."""
    if dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    return input.numel() * (weight.shape[0] if weight.ndim == 2 else 1) < preference.SHORT_PRODUCT


def prefers_torch(input: Tensor, weight: Tensor, activation: str | None = None) -> bool:
    """Whether torch's own function is the choice for such an input: its product is preferred, or all there is, or the
    shorter way to a short product; False where a backend is forced."""
    if forced_backend() is not None:
        return False
    device, dtype = input.device.type, input.dtype
    if dtype != torch.float64 and autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if activation is None and short(input, weight, dtype):
        return True
    one_row = input.ndim < 2 or input.numel() == input.shape[-1]

    def problem() -> LinearProblem:
        return LinearProblem(device, dtype, 1 if one_row else 2, 1, 1, weight.dtype, False, None)

    if torch.compiler.is_compiling():
        return OP.resolve(problem()).backend == "reference"
    return OP.resolve_cached(("prefers_torch", device, dtype, one_row), problem, None).backend == "reference"


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.linear, with the activation that often follows it: activation(input @ weight.T + bias).

    Args:
        input: (..., in), float32, bfloat16, float16 or float64, any strides.
        weight: (out, in), or (in,) for an output without the last dimension.
        bias: (out,), or () with a weight of one dimension.
        activation: None, "gelu", "gelu_tanh" or "relu".
        backend: serve with this backend or raise BackendUnsupported.

    Returns:
        (..., out), contiguous, of the input's dtype. Under autocast the input is cast as torch.nn.functional.linear
        casts it; float32 parameters are rounded as the kernels read them, and their gradients are float32 sums.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an unknown activation.
    """
    if torch.compiler.is_compiling():
        _check(input, weight, bias, activation)
        x, w, b = _canonical(input, weight, bias)
        compute = OP.resolve(_problem(x, w, b, activation), backend).public
    else:
        signature = (
            input.shape, input.dtype, input.device, weight.shape, weight.dtype, weight.device,
            key_of(bias), activation,
            autocast_enabled(input.device.type) and torch.get_autocast_dtype(input.device.type),
        )  # fmt: skip

        def problem() -> LinearProblem:
            _check(input, weight, bias, activation)
            return _problem(*_canonical(input, weight, bias), activation)

        compute = OP.resolve_cached(signature, problem, backend).run
        x, w, b = _canonical(input, weight, bias)
    index = ACTIVATIONS.index(activation)
    save = (
        index not in (0, RELU) and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, b))
    )
    output, _preactivation = compute(x, w, b, index, save)
    return output if weight.ndim == 2 else output.squeeze(-1)


def _prepare(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> tuple[Op, LinearProblem]:
    _check(input, weight, bias, activation)
    return OP, _problem(*_canonical(input, weight, bias), activation)


linear.prepare = _prepare  # type: ignore[attr-defined]
