"""What LayerNorm and RMSNorm have in common: the arguments they take, the form their kernels get them in, dropout, and
their contracts, in which they differ by what parameters and statistics they have."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import philox as philox_mask
from fastattn.dispatch import Op, Problem, check_size
from fastattn.numerics import FLOATING, HALVES, accumulation_dtype

PLAIN = (Tensor, torch.nn.Parameter)


def rows_of(tensor: Tensor, normalized_ndim: int) -> int:
    return math.prod(tensor.shape[: tensor.ndim - normalized_ndim])


def dims_of(normalized_shape: Sequence[int] | int) -> tuple[int, ...]:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


def parameter_fake(like: Tensor, tensor: Tensor | None, wanted: bool) -> Tensor:
    """The gradient of a parameter: (0,) where there is none or nobody asks."""
    if tensor is None:
        return like.new_empty((0,), dtype=torch.float32)
    return tensor.new_empty(tensor.shape if wanted else (0,))


def check(op: str, input: Tensor, normalized_shape: tuple[int, ...], **parameters: Tensor | None) -> None:
    """ValueError unless the input and its parameters fit."""
    if input.dtype not in FLOATING:
        raise ValueError(f"{op}: input must be float32, bfloat16, float16 or float64, got {input.dtype}")
    check_size(op, "an input", input.shape)
    n = len(normalized_shape)
    if n == 0 or n > input.ndim or tuple(input.shape[input.ndim - n :]) != normalized_shape:
        raise ValueError(
            f"{op}: the input's last dimensions must be normalized_shape {normalized_shape}, got an input of"
            f" shape {tuple(input.shape)}"
        )
    for name, tensor in parameters.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != normalized_shape:
            raise ValueError(f"{op}: {name} must have shape {normalized_shape}, got {tuple(tensor.shape)}")
        if tensor.dtype not in FLOATING or tensor.device != input.device:
            raise ValueError(
                f"{op}: {name} must be floating and on {input.device}, got {tensor.dtype} on {tensor.device}"
            )


def check_residual(op: str, input: Tensor, residual: Tensor) -> None:
    """ValueError unless the two can be added."""
    if residual.shape != input.shape or residual.device != input.device:
        raise ValueError(
            f"{op}: residual must have the input's shape {tuple(input.shape)} and device {input.device}, got"
            f" {tuple(residual.shape)} on {residual.device}"
        )
    if residual.dtype not in FLOATING:
        raise ValueError(f"{op}: residual must be floating, got {residual.dtype}")


def check_values(op: str, weight_offset: float, dropout_p: float = 0.0, seed: int | None = None) -> None:
    """ValueError for numbers that mean nothing."""
    if not -math.inf < weight_offset < math.inf:  # also refuses NaN
        raise ValueError(f"{op}: weight_offset must be finite, got {weight_offset}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1], got {dropout_p}")
    philox_mask.check_seed(op, seed)


def parameters_for(dtype: torch.dtype, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """Parameters as kernels take them: contiguous and of one dtype, `dtype` or float32 (float64 for float64)."""
    if any(tensor is not None and tensor.dtype != dtype for tensor in parameters):
        dtype = accumulation_dtype(dtype)
    return tuple(tensor if tensor is None or _fits(tensor, dtype) else tensor.to(dtype).contiguous()
                 for tensor in parameters)  # fmt: skip


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Asked before `to` and `contiguous`, which take their time to find that there is nothing to do."""
    return tensor.dtype == dtype and tensor.is_contiguous()


def plain_cpu(input: Tensor, shape: tuple[int, ...], *parameters: Tensor | None) -> bool:
    """Whether a call is of the commonest kind, which goes straight to the native kernel: tensors on the CPU that are
    normalised over `shape`.

    The kernel compares what a row and each parameter have of elements: one shape, of one dimension, decides them all.
    (A tensor's shape is a new tuple every time that it is asked for, and takes as long as three other questions.)
    """
    if type(input) is not Tensor or not input.is_cpu or not shape:
        return False
    single = len(shape) == 1
    compared = False
    for parameter in parameters:
        if parameter is None:
            continue
        if type(parameter) not in PLAIN or not parameter.is_cpu:
            return False
        if not (parameter.ndim == 1 if compared and single else parameter.shape == shape):
            return False
        compared = True
    return (compared and single) or input.shape[-len(shape) :] == shape


def sides(input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """input and residual as kernels take them: residual of their common dtype, input of that or of fewer bits than
    float32."""
    common = torch.promote_types(input.dtype, residual.dtype)
    if input.dtype != common and not (common == torch.float32 and input.dtype in HALVES):
        input = input.to(common)
    return input, residual.to(common)


def dropout_state(device: torch.device, dropout_p: float, seed: int | None) -> Tensor | None:
    """(seed, offset) of the mask, from torch's generator unless fixed; None without dropout."""
    return None if dropout_p == 0.0 else philox_mask.state_of(seed, device)


# ---- the contract ----


@dataclass(frozen=True)
class NormProblem(Problem):
    """dtype is the input's; parameter_dtypes: as kernels get them, None for those that are not there."""

    shape: tuple[int, ...]
    normalized_ndim: int
    parameter_dtypes: tuple[torch.dtype | None, ...]


@dataclass(frozen=True)
class AddNormProblem(NormProblem):
    """dtype is that of the sum, of residual and of the output."""

    input_dtype: torch.dtype
    dropout: bool


class NormContract:
    """A norm's two ops and how they are called: <name> of an input, add_<name> of residual + dropout(input).

    parameters: names of the tensors, or None, that stand in the schemas behind the inputs. statistics: how many (rows,)
    tensors stand behind the outputs, for the backward.
    """

    def __init__(
        self,
        name: str,
        parameters: tuple[str, ...],
        statistics: int,
        *,
        forward_schema: str,
        backward_schema: str,
        add_forward_schema: str,
        add_backward_schema: str,
    ) -> None:
        self.name, self.parameters, self.statistics = name, parameters, statistics
        self.op = Op(
            name,
            forward_schema=forward_schema,
            backward_schema=backward_schema,
            forward_fake=self._forward_fake,
            backward_fake=self._backward_fake,
            setup_context=self._setup_context,
            backward=self._backward,
            hidden=statistics,
        )
        self.add_op = Op(
            f"add_{name}",
            forward_schema=add_forward_schema,
            backward_schema=add_backward_schema,
            forward_fake=self._add_forward_fake,
            backward_fake=self._add_backward_fake,
            setup_context=self._add_setup_context,
            backward=self._add_backward,
            hidden=statistics,
            visible=2,
        )

    # ---- of an input ----

    def _forward_fake(self, input: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *_, normalized_ndim, _eps, _weight_offset = args
        rows, dtype = rows_of(input, normalized_ndim), accumulation_dtype(input.dtype)
        return input.new_empty(input.shape), *(input.new_empty((rows,), dtype=dtype) for _ in range(self.statistics))

    def _backward_fake(self, grad_output: Tensor, input: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return input.new_empty(input.shape), *self._gradients_fake(input, args)

    def _gradients_fake(self, like: Tensor, args: tuple[Any, ...]) -> list[Tensor]:
        """Of the parameters, which come first; whether they are asked for comes last."""
        n = len(self.parameters)
        return [parameter_fake(like, *one) for one in zip(args[:n], args[-n:], strict=True)]

    def _setup_context(self, ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.normalized_ndim, _, ctx.weight_offset = inputs
        statistics = output[1:]
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *statistics)

    def _backward(self, kernel: Any, ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[1:-3]
        if grad_output is None:
            return None, *(None for _ in wanted), None, None, None
        grad_input, *gradients = kernel(
            grad_output, *ctx.saved_tensors, ctx.normalized_ndim, ctx.weight_offset, *wanted
        )
        return grad_input, *_asked_for(wanted, gradients), None, None, None

    # ---- of a sum ----

    def _add_forward_fake(self, input: Tensor, residual: Tensor, *args: Any) -> tuple[Tensor, ...]:
        *tensors, normalized_ndim, eps, weight_offset, _dropout_p = args
        output, *statistics = self._forward_fake(residual, *tensors, normalized_ndim, eps, weight_offset)
        return output, residual.new_empty(residual.shape), *statistics

    def _add_backward_fake(
        self, grad_output: Tensor, grad_sum: Tensor | None, sum: Tensor, *args: Any
    ) -> tuple[Tensor, ...]:
        dropout_p, input_dtype = args[-2 - len(self.parameters) :][:2]
        apart = dropout_p > 0.0 or input_dtype != sum.dtype
        grad_input = sum.new_empty(sum.shape if apart else (0,), dtype=input_dtype)
        return grad_input, sum.new_empty(sum.shape), *self._gradients_fake(sum, args)

    def _add_setup_context(self, ctx: Any, inputs: Any, output: Any) -> None:
        input, _, *parameters, philox, ctx.normalized_ndim, _, ctx.weight_offset, ctx.dropout_p = inputs
        _, total, *statistics = output
        ctx.input_dtype = input.dtype
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, *parameters, *statistics, philox)

    def _add_backward(
        self, kernel: Any, ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None, *_: Any
    ) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[2:-5]
        total, *saved = ctx.saved_tensors
        apart = ctx.dropout_p > 0.0 or ctx.input_dtype != total.dtype
        if grad_output is None:
            if grad_sum is None or not apart:
                return grad_sum, grad_sum, *(None for _ in wanted), *(None,) * 5
            grad_output = torch.zeros_like(total)
        grad_input, grad_residual, *gradients = kernel(
            grad_output, grad_sum, total, *saved, ctx.normalized_ndim, ctx.weight_offset, ctx.dropout_p,
            ctx.input_dtype, *wanted,
        )  # fmt: skip
        return grad_input if apart else grad_residual, grad_residual, *_asked_for(wanted, gradients), *(None,) * 5

    # ---- what dispatch is asked ----

    def prepared(
        self,
        name: str,
        input: Tensor,
        residual: Tensor | None,
        shape: tuple[int, ...],
        parameters: tuple[Tensor | None, ...],
        dropout_p: float,
        weight_offset: float,
        seed: int | None,
    ) -> tuple[Op, NormProblem]:
        """What dispatch would do with a call of the public function `name`."""
        check_values(name, weight_offset, dropout_p, seed)
        if residual is None:
            return self.op, self.problem(input, shape, parameters)
        return self.add_op, self.add_problem(name, input, residual, shape, parameters, dropout_p > 0.0)

    def _check(self, name: str, input: Tensor, shape: tuple[int, ...], parameters: tuple[Tensor | None, ...]) -> None:
        check(name, input, shape, **dict(zip(self.parameters, parameters, strict=True)))

    def problem(self, input: Tensor, shape: tuple[int, ...], parameters: tuple[Tensor | None, ...]) -> NormProblem:
        self._check(self.name, input, shape, parameters)
        dtypes = _dtypes(parameters_for(input.dtype, *parameters))
        return NormProblem(input.device.type, input.dtype, tuple(input.shape), len(shape), dtypes)

    def add_problem(
        self,
        name: str,
        input: Tensor,
        residual: Tensor,
        shape: tuple[int, ...],
        parameters: tuple[Tensor | None, ...],
        dropout: bool,
    ) -> AddNormProblem:
        self._check(name, input, shape, parameters)
        check_residual(name, input, residual)
        x, r = sides(input, residual)
        dtypes = _dtypes(parameters_for(r.dtype, *parameters))
        return AddNormProblem(
            input.device.type, r.dtype, tuple(input.shape), len(shape), dtypes, input_dtype=x.dtype, dropout=dropout
        )


def _asked_for(wanted: tuple[bool, ...], gradients: list[Any]) -> list[Any]:
    """Kernels return (0,) for the others."""
    if not all(wanted):
        gradients = [gradient if one else None for one, gradient in zip(wanted, gradients, strict=True)]
    return gradients


def _dtypes(parameters: tuple[Tensor | None, ...]) -> tuple[torch.dtype | None, ...]:
    return tuple(None if tensor is None else tensor.dtype for tensor in parameters)


# ---- in plain torch ----


def matrix_of(tensor: Tensor, normalized_ndim: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns) of what is normalised together."""
    rows = tensor.shape[: tensor.ndim - normalized_ndim].numel()
    return tensor.reshape(rows, tensor.shape[tensor.ndim - normalized_ndim :].numel()).to(dtype)


def scale_of(weight: Tensor | None, weight_offset: float, dtype: torch.dtype) -> Tensor | float:
    return 1.0 if weight is None else weight.reshape(-1).to(dtype) + weight_offset


def dropped(x: Tensor, philox: Tensor | None, p: float) -> Tensor:
    """x, (rows, columns), with its elements dropped or scaled."""
    if p == 0.0:
        return x
    assert philox is not None
    keep = philox_mask.row_mask(philox, p, *x.shape)
    return x * keep * (1.0 / (1.0 - p) if p < 1.0 else 0.0)


def of_sum(norm: Callable[..., Any]) -> Callable[..., Any]:
    """The norm of residual + dropout(input), and the sum, by a function that takes a residual and is asked for both.

    Without a seed dropout is torch's own, which is another mask of the same kind.
    """

    def added(
        input: Tensor,
        residual: Tensor,
        normalized_shape: Sequence[int],
        *args: Any,
        dropout_p: float = 0.0,
        seed: int | None = None,
        **options: Any,
    ) -> Any:
        if dropout_p == 0.0:
            branch = input
        elif seed is None:
            branch = torch.nn.functional.dropout(input, dropout_p)
        else:
            columns = math.prod(normalized_shape)
            rows = input.reshape(input.numel() // max(columns, 1), columns)
            branch = dropped(rows, philox_mask.fixed(seed, input.device), dropout_p).reshape(input.shape)
        return norm(branch, normalized_shape, *args, residual=residual, prenorm=True, **options)

    return added
