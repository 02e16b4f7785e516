"""LayerNorm and RMSNorm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastattn import ops
from fastattn.nn.served import Served, refusal, widened


class LayerNormForward(Served):
    """torch.nn.LayerNorm on fastattn.layer_norm."""

    normalized_shape: tuple[int, ...]
    weight: Any
    bias: Any
    eps: float

    def forward(self, input: Tensor) -> Any:
        weight, bias = self.weight, self.bias
        reason = refusal(input, weight, bias)
        if reason is not None:
            self._left_to_torch(reason)
            return super().forward(input)
        return ops.layer_norm(widened(input), self.normalized_shape, weight, bias, self.eps)


class RMSNormForward(Served):
    """torch.nn.RMSNorm on fastattn.rms_norm."""

    normalized_shape: tuple[int, ...]
    weight: Any
    eps: float | None

    def forward(self, x: Tensor) -> Any:
        weight = self.weight
        reason = refusal(x, weight)
        if reason is None and weight is not None and weight.dtype != x.dtype:
            reason = f"the result of {x.dtype} with a weight of {weight.dtype} is torch's to choose"
        if reason is not None:
            self._left_to_torch(reason)
            return super().forward(x)
        return ops.rms_norm(widened(x), self.normalized_shape, weight, self.eps)


class LayerNorm(LayerNormForward, nn.LayerNorm):
    """torch.nn.LayerNorm: input (*, *normalized_shape) of float32, bfloat16 or float16, and a result like it.

    Statistics and the gradients of weight and bias are accumulated in float32. Other tensors are torch's.
    """


class RMSNorm(RMSNormForward, nn.RMSNorm):
    """torch.nn.RMSNorm: input (*, *normalized_shape) of float32, bfloat16 or float16, and a result like it.

    Statistics and the gradient of weight are accumulated in float32. Other tensors, and weights of another dtype than
    the input, are torch's.
    """


def plain_layer_norm(module: Any) -> bool:
    """Whether a module computes what nn.LayerNorm computes and nothing more, so that it may be part of a larger
    kernel."""
    return type(module).forward in (nn.LayerNorm.forward, LayerNormForward.forward)


def add_layer_norm(branch: Tensor, residual: Tensor, norm: Any, dropout_p: float) -> tuple[Tensor, Tensor]:
    """norm(s) and s = residual + dropout(branch), in one pass."""
    return ops.add_layer_norm(
        branch, widened(residual), norm.normalized_shape, norm.weight, norm.bias, norm.eps, dropout_p=dropout_p
    )
