"""Cross entropy of a linear layer's outputs, without keeping them: the public function and the op's contract.

    loss_n = -sum_c a_nc log_softmax(x_n W^T + b)_c

with a as in cross_entropy. The logits exist for a few hundred rows at a time. Where the loss is reduced and gradients
will be wanted, they are computed while a chunk's logits are there (Hsu et al. 2024, "Liger Kernel"): three products
instead of the four that recomputing the logits takes. They are for a loss whose own gradient is 1; the backward scales
them. Losses that are not reduced are recomputed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as torchs_linear

from fastattn.dispatch import Op, Problem, autocast_enabled, check_size
from fastattn.losses import INTEGERS, REDUCTIONS, check_options, check_weight, grad_probabilities
from fastattn.numerics import FLOATING, accumulation_dtype


@dataclass(frozen=True)
class LinearCrossEntropyProblem(Problem):
    rows: int
    inner: int
    classes: int
    weight_dtype: torch.dtype
    target_dtype: torch.dtype
    bias: bool
    weight: bool
    label_smoothing: bool
    reduction: str


def _forward_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = (input.shape[0],)
    shapes: tuple[tuple[int, ...], ...] = (
        rows if reduction == 0 else (),
        rows,
        tuple(input.shape) if input_grad else (0,),
        tuple(weight.shape) if weight_grad else (0,),
        (weight.shape[0],) if bias_grad else (0,),
    )
    made = [input.new_empty(shape, dtype=accumulation_dtype(input.dtype)) for shape in shapes]
    return made[0], made[1], made[2], made[3], made[4]


def _backward_fake(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    lse: Tensor,
    ahead_input: Tensor,
    ahead_weight: Tensor,
    ahead_bias: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    parameter = input if bias is None else bias
    return (
        input.new_empty(input.shape if input_grad else (0,)),
        weight.new_empty(weight.shape if weight_grad else (0,)),
        parameter.new_empty((weight.shape[0],) if bias_grad and bias is not None else (0,)),
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    input, weight, bias, target, class_weight, *options = inputs
    ctx.options = options[:3]
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, weight, bias, target, class_weight, *saved)


def _grad_probabilities(
    grad: Tensor, tensors: tuple[Any, ...], lse: Tensor, smoothing: float, reduction: int
) -> Tensor:
    """Gradient of class-probability targets, which are as large as the logits: the same for every backend."""
    input, weight, bias, target, class_weight = tensors
    acc = lse.dtype
    logits = torchs_linear(input.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
    return grad_probabilities(grad, logits, target, class_weight, lse, smoothing, reduction)


# Whether the graph that is being walked will be walked again (torch's own compiled functions ask the same).
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _is_one_for_good(grad: Tensor) -> bool:
    """Whether a loss's own gradient is a plain 1, as it mostly is, and nobody will ask again: then what was computed
    ahead is the result itself, and nothing needs to be scaled or copied."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(grad) is not Tensor or _graph_is_kept():
        return False
    plain = grad.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(grad)
    return plain and grad.item() == 1.0


def _backward(kernel: Any, ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * 11
    if grad is None:
        return nothing
    *tensors, lse, ahead_input, ahead_weight, ahead_bias = ctx.saved_tensors
    _, smoothing, reduction = ctx.options
    input_grad, weight_grad, bias_grad, target_grad = ctx.needs_input_grad[:4]
    found: list[Any] = [None] * 3
    if input_grad or weight_grad or bias_grad:
        wanted = (input_grad, weight_grad, bias_grad)
        ahead = (ahead_input, ahead_weight, ahead_bias)
        if reduction != 0 and _is_one_for_good(grad):
            dtypes = (None if t is None else t.dtype for t in tensors[:3])
            results: Any = [a.to(d) if w else None for a, d, w in zip(ahead, dtypes, wanted, strict=True)]
        else:
            results = kernel(grad.contiguous(), *tensors, lse, *ahead, *ctx.options, *wanted)
        found = [g if w else None for g, w in zip(results, wanted, strict=True)]
    grad_target = _grad_probabilities(grad, tuple(tensors), lse, smoothing, reduction) if target_grad else None
    return (*found, grad_target, *nothing[4:])


def _product_flops(input: tuple[int, ...], weight: tuple[int, ...]) -> int:
    return 2 * math.prod(input) * weight[0]


def _forward_flops(input: tuple[int, ...], weight: tuple[int, ...], *rest: Any) -> int:
    input_grad, weight_grad = rest[6:8]
    return (1 + input_grad + weight_grad) * _product_flops(input, weight)


def _backward_flops(grad: tuple[int, ...], input: tuple[int, ...], weight: tuple[int, ...], *rest: Any) -> int:
    """Nothing for gradients that were computed ahead."""
    reduction, input_grad, weight_grad = rest[9], rest[10], rest[11]
    if reduction != 0 and (not input_grad or len(rest[4]) == 2) and (not weight_grad or len(rest[5]) == 2):
        return 0
    return (1 + input_grad + weight_grad) * _product_flops(input, weight)


OP = Op(
    "linear_cross_entropy",
    forward_schema=(
        "(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, int ignore_index,"
        " float label_smoothing, int reduction, bool input_grad, bool weight_grad, bool bias_grad)"
        " -> (Tensor loss, Tensor lse, Tensor ahead_input, Tensor ahead_weight, Tensor ahead_bias)"
    ),
    backward_schema=(
        "(Tensor grad, Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, Tensor lse,"
        " Tensor ahead_input, Tensor ahead_weight, Tensor ahead_bias, int ignore_index, float label_smoothing,"
        " int reduction, bool input_grad, bool weight_grad, bool bias_grad)"
        " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
    ),
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    forward_flops=_forward_flops,
    backward_flops=_backward_flops,
)


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
) -> None:
    name = "linear_cross_entropy"
    if input.dtype not in FLOATING:
        raise ValueError(f"{name}: input must be float32, bfloat16, float16 or float64, got {input.dtype}")
    if input.ndim not in (1, 2):
        raise ValueError(f"{name}: input must be (in,) or (N, in), got {tuple(input.shape)}")
    if linear_weight.ndim < 2 or linear_weight.shape[-1] != input.shape[-1]:
        raise ValueError(
            f"{name}: for an input of shape {tuple(input.shape)} linear_weight must be (C, {input.shape[-1]}) or"
            f" (C, d1, ..., {input.shape[-1]}), got {tuple(linear_weight.shape)}"
        )
    if linear_weight.ndim > 2 and input.ndim == 1:
        raise ValueError(f"{name}: a linear_weight with positions needs an input (N, in), got {tuple(input.shape)}")
    check_size(name, "a linear_weight", linear_weight.shape)
    shape = (*input.shape[:-1], *linear_weight.shape[:-1])
    check_size(name, "logits", shape)
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise ValueError(
            f"{name}: linear_bias must have shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    cast = autocast_enabled(input.device.type)
    for what, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != input.dtype and not (cast and tensor.dtype in FLOATING):
            raise ValueError(f"{name}: {what} must be {input.dtype} as the input, got {tensor.dtype}")
    if target.dtype in INTEGERS:
        wanted, kind = (*input.shape[:-1], *linear_weight.shape[1:-1]), "class indices"
    elif target.dtype in FLOATING:
        wanted, kind = shape, "class probabilities"
        if ignore_index is not None:
            raise ValueError(f"{name}: ignore_index goes with class indices, not with class probabilities")
    else:
        raise ValueError(f"{name}: target must hold integers or class probabilities, got {target.dtype}")
    if tuple(target.shape) != tuple(wanted):
        raise ValueError(f"{name}: a target of {kind} must have shape {tuple(wanted)}, got {tuple(target.shape)}")
    check_weight(name, weight, linear_weight.shape[0])
    for what, tensor in (("linear_weight", linear_weight), ("target", target), ("linear_bias", linear_bias),
                         ("weight", weight)):  # fmt: skip
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{name}: {what} is on {tensor.device}, input on {input.device}")
    check_options(name, reduction, label_smoothing)


def _canonical(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """(rows, in) and (classes, in); autocast rounds the input, and float32 parameters where they are read."""
    if autocast_enabled(input.device.type) and input.dtype != torch.float64:
        input = input.to(torch.get_autocast_dtype(input.device.type))
    kept = (input.dtype, torch.float32)
    linear_weight = linear_weight if linear_weight.dtype in kept else linear_weight.to(input.dtype)
    if linear_bias is not None:
        linear_bias = (linear_bias if linear_bias.dtype in kept else linear_bias.to(input.dtype)).contiguous()
    accumulation = accumulation_dtype(input.dtype)
    target = target.to(torch.int64 if target.dtype in INTEGERS else accumulation)
    if input.ndim == 1:
        input, target = input[None], target[None]
    return input, linear_weight, linear_bias, target, None if weight is None else weight.to(accumulation).contiguous()


def _problem(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
) -> LinearCrossEntropyProblem:
    return LinearCrossEntropyProblem(
        device=input.device.type,
        dtype=input.dtype,
        rows=input.shape[0],
        inner=input.shape[1],
        classes=linear_weight.shape[0],
        weight_dtype=linear_weight.dtype,
        target_dtype=target.dtype,
        bias=linear_bias is not None,
        weight=weight is not None,
        label_smoothing=label_smoothing > 0.0,
        reduction=reduction,
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.linear_cross_entropy: cross_entropy(linear(input, linear_weight, linear_bias), target).

    The logits of all rows are never in memory: extra memory does not grow with the number of rows. When the loss is
    reduced and gradients will be wanted, the forward pass computes them, and they stay in memory until the backward.

    Args:
        input: (in,) or (N, in), float32, bfloat16, float16 or float64.
        linear_weight: (C, in), or (C, d1, ..., in) for a loss at positions d1, ...
        target: class indices () or (N, d1, ...) of any integer dtype, or class probabilities of the logits' shape
            (C,) or (N, C, d1, ...) (differentiable).
        linear_bias: (C, d1, ...).
        weight: (C,) weight of each class.
        reduction: "none", "mean" (over weights of the targets; over N d1 ... for probabilities) or "sum".
        ignore_index: index targets of this value add nothing; None: -100. Not with probabilities.
        label_smoothing: in [0, 1], the share of the target spread over all classes.
        options: torch's chunking options; accepted and not needed, chunks are always used.
        backend: serve with this backend or raise BackendUnsupported.

    Returns:
        The loss in the input's dtype, promoted with class probabilities (float32 under autocast); logits, losses and
        sums are float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or values that do not fit.
        RuntimeError: an index target that is neither a class nor ignore_index (checked on CPU).
    """
    label_smoothing = float(label_smoothing)
    _check(input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing)
    number = -100 if ignore_index is None else ignore_index
    dtype = input.dtype if target.dtype in INTEGERS else torch.promote_types(input.dtype, target.dtype)
    if dtype in (torch.bfloat16, torch.float16) and autocast_enabled(input.device.type):
        dtype = torch.float32
    if linear_weight.ndim > 2:
        loss = _at_positions(
            input, linear_weight, target, linear_bias, weight, reduction, number, label_smoothing, backend
        )
    else:
        loss = _loss(input, linear_weight, target, linear_bias, weight, reduction, number, label_smoothing, backend)
        if reduction == "none":
            loss = loss.reshape(input.shape[:-1])
    return loss if loss.dtype == dtype else loss.to(dtype)


def _loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    backend: str | None,
) -> Tensor:
    x, w, b, t, c = _canonical(input, linear_weight, target, linear_bias, weight)
    if torch.compiler.is_compiling():
        compute = OP.resolve(_problem(x, w, b, t, c, label_smoothing, reduction), backend).public
    else:
        signature = (x.shape, w.shape, x.dtype, w.dtype, t.dtype, x.device, b is None, c is None, reduction,
                     label_smoothing)  # fmt: skip
        compute = OP.resolve_cached(signature, lambda: _problem(x, w, b, t, c, label_smoothing, reduction), backend).run
    ahead = reduction != "none" and torch.is_grad_enabled()
    wanted = (ahead and y is not None and y.requires_grad for y in (x, w, b))
    return compute(x, w, b, t, c, ignore_index, label_smoothing, REDUCTIONS.index(reduction), *wanted)[0]


def _at_positions(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    backend: str | None,
) -> Tensor:
    """A linear layer of its own for every position (d1, ...)."""
    positions = linear_weight.shape[1:-1]
    weights = linear_weight.flatten(1, -2)
    biases = None if linear_bias is None else linear_bias.flatten(1)
    indices = target.dtype in INTEGERS
    targets = target.flatten(1) if indices else target.flatten(2)
    losses = [
        _loss(
            input, weights[:, i], targets[..., i], None if biases is None else biases[:, i], weight,
            "none" if reduction == "none" else "sum", ignore_index, label_smoothing, backend,
        )
        for i in range(weights.shape[1])
    ]  # fmt: skip
    if reduction == "none":
        return torch.stack(losses, -1).reshape(input.shape[0], *positions)
    total = torch.stack(losses).sum()
    if reduction == "sum":
        return total
    if not indices:
        return total / targets[:, 0].numel()
    kept = targets != ignore_index
    if weight is None:
        return total / kept.sum()
    return total / (weight.to(total.dtype)[targets.masked_fill(~kept, 0).long()] * kept).sum()


def _prepare(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    **_: Any,
) -> tuple[Op, LinearCrossEntropyProblem]:
    _check(input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing)
    if linear_weight.ndim > 2:
        linear_weight, linear_bias = linear_weight.flatten(1, -2)[:, 0], None
        target = target.flatten(1)[:, 0] if target.dtype in INTEGERS else target.flatten(2)[..., 0]
    canonical = _canonical(input, linear_weight, target, linear_bias, weight)
    return OP, _problem(*canonical, label_smoothing, reduction)


linear_cross_entropy.prepare = _prepare  # type: ignore[attr-defined]
