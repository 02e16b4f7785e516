"""Apex's normalization over our norms, on CPUs too; and `import apex.normalization` where there is no Apex:

    import fastattn.integrations.apex
    fastattn.integrations.apex.install()         # before transformers, ... are imported
    from apex.normalization import FusedLayerNorm

FusedLayerNorm and FusedRMSNorm give results of the input's dtype, the Mixed ones of the parameters'. memory_efficient
saves the result, which the next layer keeps anyway, instead of the input, and computes the input's deviations from it
again: (y - bias) / weight. A column whose weight is 0 then has no gradient of its weight, as in Apex. An apex that is
installed is left alone; parts of Apex that are not here raise ImportError as if it were not installed.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastattn import ops
from fastattn.dispatch import Bound, Op, autocast_enabled, key_of
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
        found: Tensor = _OfOutput.apply(LAYER_NORM, ops.layer_norm, input, dims_of(shape), eps, weight, bias)
    else:
        found = ops.layer_norm(input, dims_of(shape), weight, bias, eps)
    return found


def _rms_norm(input: Tensor, weight: Tensor | None, shape: Shape, eps: float, memory_efficient: bool) -> Tensor:
    if _saves_output(memory_efficient):
        found: Tensor = _OfOutput.apply(RMS_NORM, ops.rms_norm, input, dims_of(shape), eps, weight)
    else:
        found = ops.rms_norm(input, dims_of(shape), weight, eps)
    return found


def _kernels(op: Op, function: Any, input: Tensor, shape: tuple[int, ...], *parameters: Tensor | None) -> Bound:
    described = tuple(map(key_of, (input, *parameters)))
    return op.resolve_cached(("apex", described, shape), lambda: function.prepare(input, shape, *parameters)[1], None)


def _deviations(
    output: Tensor, rstd: Tensor, shape: tuple[int, ...], eps: float, weight: Tensor | None, bias: Tensor | None = None
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


class _OfOutput(torch.autograd.Function):
    """A norm that keeps its result for the backward, and not its input. parameters: weight, and bias where it has one.

    The backward is that of the input's deviations, whose mean is 0.
    """

    @staticmethod
    def forward(
        ctx: Any, op: Op, function: Any, input: Tensor, shape: tuple[int, ...], eps: float, *parameters: Tensor | None
    ) -> Tensor:
        bound = _kernels(op, function, input, shape, *parameters)
        output, *_, rstd = bound.compute(input, *parameters_for(input.dtype, *parameters), len(shape), eps, 0.0)
        ctx.save_for_backward(output, rstd, *parameters)
        ctx.norm, ctx.shape, ctx.eps = (op, function), shape, eps
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        output, rstd, *parameters = ctx.saved_tensors
        deviations = _deviations(output, rstd, ctx.shape, ctx.eps, *parameters)
        dtype = deviations.dtype
        wide = [None if t is None else t.to(dtype) for t in parameters]
        bound = _kernels(*ctx.norm, deviations, ctx.shape, *wide)
        assert bound.backward is not None
        mean = [torch.zeros_like(rstd)] if bound.op is LAYER_NORM else []
        grads = bound.backward(
            grad_output.to(dtype), deviations, *parameters_for(dtype, *wide), *mean, rstd, len(ctx.shape), 0.0,
            *(t is not None for t in wide),
        )  # fmt: skip
        found = [
            None if leaf is None else grad.to(leaf.dtype)
            for grad, leaf in zip(grads, (output, *parameters), strict=True)
        ]
        return None, None, found[0], None, None, *found[1:]


class _Norm(nn.Module):
    """What the modules have in common."""

    #: The parameters, and what they start with.
    starts: ClassVar[dict[str, float]] = {"weight": 1.0}
    weight: Tensor | None

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        self.normalized_shape = torch.Size(dims_of(normalized_shape))
        self.eps, self.elementwise_affine, self.memory_efficient = eps, elementwise_affine, memory_efficient
        for name in self.starts:
            parameter = nn.Parameter(torch.empty(self.normalized_shape)) if elementwise_affine else None
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            nn.init.constant_(parameter, self.starts[name])

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class FusedLayerNorm(_Norm):
    """LayerNorm over the last dimensions, normalized_shape, in the input's dtype.

    memory_efficient: keep the result and not the input for the backward. state_dict: weight and bias.
    """

    starts: ClassVar[dict[str, float]] = {"weight": 1.0, "bias": 0.0}
    bias: Tensor | None

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

    def forward(self, input: Tensor) -> Tensor:
        if self.weight is None:
            return fused_rms_norm(input, self.normalized_shape, self.eps, self.memory_efficient)
        return fused_rms_norm_affine(input, self.weight, self.normalized_shape, self.eps, self.memory_efficient)


class _Mixed(_Norm):
    """Those whose result has the parameters' dtype: they always have parameters."""

    def __init__(
        self, normalized_shape: Shape, eps: float = 1e-5, *, memory_efficient: bool = False, **options: Any
    ) -> None:
        name = type(self).__name__
        if not options.pop("elementwise_affine", True):
            raise ValueError(f"{name}: the result has the parameters' dtype: there is no elementwise_affine=False")
        if options:
            raise TypeError(f"{name} got unexpected arguments: {', '.join(options)}")
        super().__init__(normalized_shape, eps, True, memory_efficient)


class MixedFusedLayerNorm(_Mixed, FusedLayerNorm):
    """FusedLayerNorm whose result has the parameters' dtype."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.weight is not None and self.bias is not None
        return mixed_dtype_fused_layer_norm_affine(
            input, self.weight, self.bias, self.normalized_shape, self.eps, self.memory_efficient
        )


class MixedFusedRMSNorm(_Mixed, FusedRMSNorm):
    """FusedRMSNorm whose result has the weight's dtype."""

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
install, uninstall = _STAND_IN.install, _STAND_IN.uninstall
