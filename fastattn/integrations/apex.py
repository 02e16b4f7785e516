"""Apex's normalization over our norms, on CPUs too; and `import apex.normalization` where there is no Apex:

    import fastattn.integrations.apex
    fastattn.integrations.apex.install()         # before transformers, ... are imported
    from apex.normalization import FusedLayerNorm

FusedLayerNorm and FusedRMSNorm give results of the input's dtype, the Mixed ones of the parameters'. memory_efficient
saves the result, which the next layer keeps anyway, instead of the input, and computes the input's deviations from it
again: (y - bias) / weight. A column whose weight is 0 then has no gradient of its weight, as in Apex. An apex that is
installed is left alone.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastattn import ops
from fastattn.dispatch import Bound, autocast_enabled
from fastattn.integrations.stand_in import StandIn, public
from fastattn.norms import dims_of, parameters_for
from fastattn.numerics import accumulation_dtype
from fastattn.ops.layer_norm import OP as LAYER_NORM
from fastattn.ops.rms_norm import OP as RMS_NORM

_transforms_active = torch._C._are_functorch_transforms_active
Shape = Sequence[int] | int


def fused_layer_norm_affine(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized_shape: Shape,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """LayerNorm with weight and bias, (*normalized_shape), of input (..., *normalized_shape); in the input's dtype."""
    input, weight, bias = _cast(input, weight, bias)
    return _layer_norm(input, weight, bias, normalized_shape, eps, memory_efficient)


def fused_layer_norm(
    input: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """LayerNorm without parameters."""
    (input,) = _cast(input)
    return _layer_norm(input, None, None, normalized_shape, eps, memory_efficient)


def mixed_dtype_fused_layer_norm_affine(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized_shape: Shape,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """fused_layer_norm_affine whose result has the weight's dtype."""
    input, weight, bias = _cast(input, weight, bias)
    wide = input.to(torch.promote_types(input.dtype, weight.dtype))
    return _layer_norm(wide, weight, bias, normalized_shape, eps, memory_efficient).to(weight.dtype)


def fused_rms_norm_affine(
    input: Tensor, weight: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """RMSNorm with a weight, (*normalized_shape), of input (..., *normalized_shape); in the input's dtype."""
    input, weight = _cast(input, weight)
    return _rms_norm(input, weight, normalized_shape, eps, memory_efficient)


def fused_rms_norm(input: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False) -> Tensor:
    """RMSNorm without a weight."""
    (input,) = _cast(input)
    return _rms_norm(input, None, normalized_shape, eps, memory_efficient)


def mixed_dtype_fused_rms_norm_affine(
    input: Tensor, weight: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """fused_rms_norm_affine whose result has the weight's dtype."""
    input, weight = _cast(input, weight)
    wide = input.to(torch.promote_types(input.dtype, weight.dtype))
    return _rms_norm(wide, weight, normalized_shape, eps, memory_efficient).to(weight.dtype)


def _cast(*tensors: Tensor) -> Any:
    """As Apex does under CUDA's autocast; on the CPU autocast leaves norms alone."""
    if not (tensors[0].is_cuda and autocast_enabled("cuda")):
        return tensors
    dtype = torch.get_autocast_dtype("cuda")
    return tuple(t.to(dtype) if t.dtype != torch.float64 else t for t in tensors)


def _saves_output(memory_efficient: bool) -> bool:
    """Compiled code decides by itself what it saves; torch.func does not see into what follows here."""
    return memory_efficient and not torch.compiler.is_compiling() and not _transforms_active()


def _layer_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Shape, eps: float, memory_efficient: bool
) -> Tensor:
    if _saves_output(memory_efficient):
        found: Tensor = _LayerNormOfOutput.apply(input, weight, bias, dims_of(shape), eps)
    else:
        found = ops.layer_norm(input, dims_of(shape), weight, bias, eps)
    return found


def _rms_norm(input: Tensor, weight: Tensor | None, shape: Shape, eps: float, memory_efficient: bool) -> Tensor:
    if _saves_output(memory_efficient):
        found: Tensor = _RMSNormOfOutput.apply(input, weight, dims_of(shape), eps)
    else:
        found = ops.rms_norm(input, dims_of(shape), weight, eps)
    return found


def _kernels(op: Any, function: Any, input: Tensor, shape: tuple[int, ...], *parameters: Tensor | None) -> Bound:
    described = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in (input, *parameters))
    bound: Bound = op.resolve_cached(
        ("apex", described, shape), lambda: function.prepare(input, shape, *parameters)[1], None
    )
    return bound


def _deviations(
    output: Tensor, weight: Tensor | None, bias: Tensor | None, rstd: Tensor, shape: tuple[int, ...], eps: float
) -> Tensor:
    """The input minus its mean, from the output, in the dtype that norms accumulate in."""
    found = output.to(accumulation_dtype(output.dtype))
    if bias is not None:
        found = found - bias.to(found.dtype)
    if weight is not None:
        # What divides is kept away from 0.
        small = torch.full((), eps, dtype=found.dtype, device=found.device)
        found = found / torch.where(weight.abs() < eps, torch.copysign(small, weight), weight.to(found.dtype))
    return (found.reshape(rstd.shape[0], math.prod(shape)) / rstd[:, None]).reshape(output.shape)


class _LayerNormOfOutput(torch.autograd.Function):
    """LayerNorm that keeps its result for the backward, and not its input."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...], eps: float
    ) -> Tensor:
        bound = _kernels(LAYER_NORM, ops.layer_norm, input, shape, weight, bias)
        output, mean, rstd = bound.compute(input, *parameters_for(input.dtype, weight, bias), len(shape), eps, 0.0)
        ctx.save_for_backward(output, weight, bias, torch.zeros_like(mean), rstd)
        ctx.shape, ctx.eps = shape, eps
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        output, weight, bias, mean, rstd = ctx.saved_tensors
        deviations = _deviations(output, weight, bias, rstd, ctx.shape, ctx.eps)
        dtype = deviations.dtype
        w, b = (None if t is None else t.to(dtype) for t in (weight, bias))
        bound = _kernels(LAYER_NORM, ops.layer_norm, deviations, ctx.shape, w, b)
        assert bound.backward is not None
        grads = bound.backward(
            grad_output.to(dtype), deviations, *parameters_for(dtype, w, b), mean, rstd, len(ctx.shape), 0.0,
            w is not None, b is not None,
        )  # fmt: skip
        return *_as(grads, (output, weight, bias)), None, None


class _RMSNormOfOutput(torch.autograd.Function):
    """RMSNorm that keeps its result for the backward, and not its input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, shape: tuple[int, ...], eps: float) -> Tensor:
        bound = _kernels(RMS_NORM, ops.rms_norm, input, shape, weight)
        output, rstd = bound.compute(input, *parameters_for(input.dtype, weight), len(shape), eps, 0.0)
        ctx.save_for_backward(output, weight, rstd)
        ctx.shape, ctx.eps = shape, eps
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        output, weight, rstd = ctx.saved_tensors
        input = _deviations(output, weight, None, rstd, ctx.shape, ctx.eps)
        w = None if weight is None else weight.to(input.dtype)
        bound = _kernels(RMS_NORM, ops.rms_norm, input, ctx.shape, w)
        assert bound.backward is not None
        grads = bound.backward(
            grad_output.to(input.dtype), input, *parameters_for(input.dtype, w), rstd, len(ctx.shape), 0.0,
            w is not None,
        )  # fmt: skip
        return *_as(grads, (output, weight)), None, None


def _as(grads: Sequence[Tensor], leaves: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if leaf is None else grad.to(leaf.dtype) for grad, leaf in zip(grads, leaves, strict=True))


class _Norm(nn.Module):
    weight: Tensor | None

    def __init__(
        self, normalized_shape: Shape, eps: float, elementwise_affine: bool, memory_efficient: bool
    ) -> None:  # fmt: skip
        super().__init__()
        self.normalized_shape = torch.Size(dims_of(normalized_shape))
        self.eps, self.elementwise_affine, self.memory_efficient = eps, elementwise_affine, memory_efficient
        for name in self._parameters_of_its_own():
            parameter = nn.Parameter(torch.empty(self.normalized_shape)) if elementwise_affine else None
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def _parameters_of_its_own(self) -> tuple[str, ...]:
        return ("weight",)

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class FusedLayerNorm(_Norm):
    """LayerNorm over the last dimensions, normalized_shape, in the input's dtype.

    memory_efficient: keep the result and not the input for the backward. state_dict: weight and bias.
    """

    bias: Tensor | None

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, memory_efficient)

    def _parameters_of_its_own(self) -> tuple[str, ...]:
        return ("weight", "bias")

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        if self.weight is None or self.bias is None:
            return fused_layer_norm(input, self.normalized_shape, self.eps, self.memory_efficient)
        return fused_layer_norm_affine(
            input, self.weight, self.bias, self.normalized_shape, self.eps, self.memory_efficient
        )


class FusedRMSNorm(_Norm):
    """RMSNorm over the last dimensions, normalized_shape, in the input's dtype.

    memory_efficient: keep the result and not the input for the backward. state_dict: weight.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, memory_efficient)

    def forward(self, input: Tensor) -> Tensor:
        if self.weight is None:
            return fused_rms_norm(input, self.normalized_shape, self.eps, self.memory_efficient)
        return fused_rms_norm_affine(input, self.weight, self.normalized_shape, self.eps, self.memory_efficient)


def _affine(name: str, options: dict[str, Any]) -> None:
    """What Mixed* take besides; ValueError for what they do not."""
    if not options.pop("elementwise_affine", True):
        raise ValueError(f"{name}: the result has the parameters' dtype: there is no elementwise_affine=False")
    if options:
        raise TypeError(f"{name} got unexpected arguments: {', '.join(options)}")


class MixedFusedLayerNorm(FusedLayerNorm):
    """FusedLayerNorm whose result has the parameters' dtype."""

    def __init__(
        self, normalized_shape: Shape, eps: float = 1e-5, *, memory_efficient: bool = False, **options: Any
    ) -> None:
        _affine("MixedFusedLayerNorm", options)
        super().__init__(normalized_shape, eps, True, memory_efficient)

    def forward(self, input: Tensor) -> Tensor:
        assert self.weight is not None and self.bias is not None
        return mixed_dtype_fused_layer_norm_affine(
            input, self.weight, self.bias, self.normalized_shape, self.eps, self.memory_efficient
        )


class MixedFusedRMSNorm(FusedRMSNorm):
    """FusedRMSNorm whose result has the weight's dtype."""

    def __init__(
        self, normalized_shape: Shape, eps: float = 1e-5, *, memory_efficient: bool = False, **options: Any
    ) -> None:
        _affine("MixedFusedRMSNorm", options)
        super().__init__(normalized_shape, eps, True, memory_efficient)

    def forward(self, input: Tensor) -> Tensor:
        assert self.weight is not None
        return mixed_dtype_fused_rms_norm_affine(
            input, self.weight, self.normalized_shape, self.eps, self.memory_efficient
        )


_MODULES = ("FusedLayerNorm", "FusedRMSNorm", "MixedFusedLayerNorm", "MixedFusedRMSNorm")
_FUNCTIONS = (
    "fused_layer_norm",
    "fused_layer_norm_affine",
    "fused_rms_norm",
    "fused_rms_norm_affine",
    "mixed_dtype_fused_layer_norm_affine",
    "mixed_dtype_fused_rms_norm_affine",
)


def _contents(*names: str) -> dict[str, Any]:
    return public(importlib.import_module(__name__), *names)


_STAND_IN = StandIn(
    "apex",
    "apex",
    "0.1",
    {
        "normalization": lambda: _contents(*_MODULES),
        "normalization.fused_layer_norm": lambda: _contents(*_MODULES, *_FUNCTIONS),
    },
)


def install() -> bool:
    """Makes `import apex.normalization` find these modules, process-wide.

    True when it does from now on; False when apex is installed, which is left alone. Calling it again is without
    effect. Libraries ask once whether apex is there, most when they are imported (Transformers 4's T5 takes its norm
    from it): install before. Other parts of Apex raise ImportError as if they were not there.
    """
    return _STAND_IN.install()


def uninstall() -> None:
    """Takes `install` back; without effect where nothing is installed."""
    _STAND_IN.uninstall()
