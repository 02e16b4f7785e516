"""Cross entropy: the public function and the op's contract.

    loss_n = -sum_c a_nc log_softmax(x_n)_c + z_loss lse(x_n)^2

with a_nc = weight_c * t'_nc and t' = (1 - smoothing) * t + smoothing / C, where t is the one-hot of an index target or
the given class probabilities (Szegedy et al. 2016 for the smoothing; Chowdhery et al. 2022, section 5, for z_loss).
With a softcap, x = softcap * tanh(input / softcap) (Gemma 2, 2024, section 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import Op, Problem, autocast_enabled, check_size, key_of
from fastattn.losses import INTEGERS, REDUCTIONS, check_options, check_weight, grad_probabilities
from fastattn.numerics import FLOATING, accumulation_dtype


@dataclass(frozen=True)
class CrossEntropyProblem(Problem):
    rows: int
    classes: int
    target_dtype: torch.dtype
    weight: bool
    label_smoothing: bool
    reduction: str
    z_loss: bool = False
    softcap: bool = False


def _forward_fake(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(input.dtype)
    rows = (input.shape[0],)
    return (
        input.new_empty(rows if reduction == 0 else (), dtype=dtype),
        input.new_empty(rows, dtype=dtype),
        input.new_empty((), dtype=dtype),
    )


def _backward_fake(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    total: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    return input.new_empty(input.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    input, target, weight, *ctx.options = inputs
    ctx.given = len(inputs)
    _, lse, total = output
    ctx.mark_non_differentiable(lse, total)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, target, weight, lse, total)


def _backward(kernel: Any, ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    input, target, weight, lse, total = ctx.saved_tensors
    nothing = (None,) * ctx.given
    if grad is None:
        return nothing
    _, smoothing, reduction, *features = ctx.options
    grad_target = None
    if ctx.needs_input_grad[1]:
        x = input
        if features and features[1]:
            x = features[1] * (input.to(lse.dtype) / features[1]).tanh()
        grad_target = grad_probabilities(grad, x, target, weight, lse, smoothing, reduction)
    grad_input = None
    if ctx.needs_input_grad[0]:
        grad_input = kernel(grad.contiguous(), input, target, weight, lse, total, *ctx.options)
    return grad_input, grad_target, *nothing[2:]


OP = Op(
    "cross_entropy",
    forward_schema=(
        "(Tensor input, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, int reduction,"
        " float z_loss=0.0, float softcap=0.0) -> (Tensor loss, Tensor lse, Tensor total)"
    ),
    backward_schema=(
        "(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor lse, Tensor total, int ignore_index,"
        " float label_smoothing, int reduction, float z_loss=0.0, float softcap=0.0) -> Tensor grad_input"
    ),
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _check(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    if input.ndim < 1:
        raise ValueError("cross_entropy: input must have a class dimension: (C,), (N, C) or (N, C, d1, ...)")
    if input.dtype not in FLOATING:
        raise ValueError(f"cross_entropy: input must be float32, bfloat16, float16 or float64, got {input.dtype}")
    check_size("cross_entropy", "an input", input.shape)
    classes = input.shape[0] if input.ndim == 1 else input.shape[1]
    if target.dtype in INTEGERS:
        wanted = tuple(input.shape[:1] + input.shape[2:]) if input.ndim > 1 else ()
        kind = "class indices"
    elif target.dtype in FLOATING:
        wanted, kind = tuple(input.shape), "class probabilities"
    else:
        raise ValueError(f"cross_entropy: target must hold integers or class probabilities, got {target.dtype}")
    if tuple(target.shape) != wanted:
        raise ValueError(
            f"cross_entropy: for an input of shape {tuple(input.shape)} a target of {kind} has shape {wanted}, got"
            f" {tuple(target.shape)}"
        )
    if target.device != input.device:
        raise ValueError(f"cross_entropy: target is on {target.device}, input on {input.device}")
    check_weight("cross_entropy", weight, classes)
    if weight is not None and weight.device != input.device:
        raise ValueError(f"cross_entropy: weight is on {weight.device}, input on {input.device}")
    check_options("cross_entropy", reduction, label_smoothing)
    for what, value in (("z_loss", z_loss), ("softcap", softcap)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"cross_entropy: {what} must be a finite number of 0 or more, got {value}")


def _rows(tensor: Tensor) -> Tensor:
    """(C,), (N, C) or (N, C, d1, ...) as (rows, C)."""
    if tensor.ndim == 2:
        return tensor if tensor.stride(1) == 1 else tensor.contiguous()
    if tensor.ndim == 1:
        return tensor.reshape(1, -1)
    return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


def _canonical(input: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(rows, C) logits, (rows,) int64 or (rows, C) floating targets, a contiguous float32 (float64) weight."""
    accumulation = accumulation_dtype(input.dtype)
    rows = _rows(input)
    if target.dtype in INTEGERS:
        goal = target if target.dtype == torch.int64 and target.ndim == 1 else target.reshape(-1).to(torch.int64)
    else:
        goal = _rows(target if target.dtype == input.dtype else target.to(accumulation))
    return rows, goal, None if weight is None else weight.to(accumulation).contiguous()


def _problem(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
    z_loss: float,
    softcap: float,
) -> CrossEntropyProblem:
    return CrossEntropyProblem(
        device=input.device.type,
        dtype=input.dtype,
        rows=input.shape[0],
        classes=input.shape[1],
        target_dtype=target.dtype,
        weight=weight is not None,
        label_smoothing=label_smoothing > 0.0,
        reduction=reduction,
        z_loss=z_loss > 0.0,
        softcap=softcap > 0.0,
    )


def _result_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """torch's: the logits' dtype, promoted with class probabilities; float32 under autocast."""
    dtype = input.dtype if target.dtype in INTEGERS else torch.promote_types(input.dtype, target.dtype)
    if dtype in (torch.bfloat16, torch.float16) and autocast_enabled(input.device.type):
        return torch.float32
    return dtype


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    return_z_loss: bool = False,
    softcap: float = 0.0,
    backend: str | None = None,
) -> Any:
    """torch.nn.functional.cross_entropy: negative log-likelihood of softmax(input).

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...), float32, bfloat16, float16 or float64.
        target: class indices (), (N,) or (N, d1, ...) of any integer dtype, or class probabilities of the input's
            shape (differentiable).
        weight: (C,) weight of each class.
        size_average, reduce: torch's deprecated arguments; only None.
        ignore_index: index targets of this value add nothing to loss or gradient.
        reduction: "none", "mean" (over weights of the targets; over N d1 ... for probabilities) or "sum".
        label_smoothing: in [0, 1], the share of the target spread over all classes.
        z_loss: weight of the square of the log-sum-exp, added to the loss of every row that is not ignored and reduced
            with it (the mean divides both by the same number); it keeps logits near log-probabilities.
        return_z_loss: also return what z_loss added, reduced as the loss is, without a gradient.
        softcap: c > 0: the logits are c * tanh(input / c); 0: the input.
        backend: serve with this backend or raise BackendUnsupported.

    Returns:
        The loss in torch's result dtype, computed and reduced in float32 (float64 for float64); with return_z_loss a
        tuple (loss, z_loss), the first including the second.

    Raises:
        ValueError: shapes, dtypes or values that do not fit.
        RuntimeError: an index target that is neither a class nor ignore_index (checked on CPU).
    """
    if size_average is not None or reduce is not None:
        raise ValueError("cross_entropy: size_average and reduce are deprecated in torch; use reduction")
    label_smoothing, z_loss, softcap = float(label_smoothing), float(z_loss), float(softcap)
    if torch.compiler.is_compiling():
        _check(input, target, weight, reduction, label_smoothing, z_loss, softcap)
        x, t, w = _canonical(input, target, weight)
        compute = OP.resolve(_problem(x, t, w, label_smoothing, reduction, z_loss, softcap), backend).public
    else:
        signature = (
            input.shape, target.shape, input.dtype, target.dtype, input.device, target.device,
            key_of(weight), reduction, label_smoothing,
            z_loss, softcap,
        )  # fmt: skip

        def problem() -> CrossEntropyProblem:
            _check(input, target, weight, reduction, label_smoothing, z_loss, softcap)
            return _problem(*_canonical(input, target, weight), label_smoothing, reduction, z_loss, softcap)

        compute = OP.resolve_cached(signature, problem, backend).run
        x, t, w = _canonical(input, target, weight)
    options = ignore_index, label_smoothing, REDUCTIONS.index(reduction)
    features = (z_loss, softcap) if z_loss or softcap else ()
    loss, lse, total = compute(x, t, w, *options, *features)
    dtype = _result_dtype(input, target)

    def shaped(result: Tensor) -> Tensor:
        if reduction == "none":
            result = result.reshape(input.shape[:1] + input.shape[2:] if input.ndim > 1 else ())
        return result if result.dtype == dtype else result.to(dtype)

    if not return_z_loss:
        return shaped(loss)
    return shaped(loss), shaped(_z_loss(lse.detach(), t, total.detach(), ignore_index, reduction, z_loss))


def _z_loss(lse: Tensor, target: Tensor, total: Tensor, ignore_index: int, reduction: str, weight: float) -> Tensor:
    """The share of z_loss in a loss, from the statistics of the forward pass."""
    rows = weight * lse.square()
    if not target.is_floating_point():
        rows = rows.masked_fill(target == ignore_index, 0.0)
    if reduction == "none":
        return rows
    return rows.sum() / total if reduction == "mean" else rows.sum()


def _prepare(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    **_: Any,
) -> tuple[Op, CrossEntropyProblem]:
    _check(input, target, weight, reduction, label_smoothing, z_loss, softcap)
    return OP, _problem(*_canonical(input, target, weight), label_smoothing, reduction, z_loss, softcap)


cross_entropy.prepare = _prepare  # type: ignore[attr-defined]
