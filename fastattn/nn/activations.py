"""GELU, SiLU, and softmax over a dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastattn import ops
from fastattn.nn.served import Served, refusal, widened


class GELUForward(Served):
    """torch.nn.GELU on fastattn.gelu."""

    approximate: str

    def forward(self, input: Tensor) -> Any:
        reason = refusal(input)
        if reason is not None:
            self._left_to_torch(reason)
            return super().forward(input)
        return ops.gelu(input, self.approximate)


class SiLUForward(Served):
    """torch.nn.SiLU on fastattn.silu."""

    inplace: bool

    def forward(self, input: Tensor) -> Any:
        reason = "in place is torch's" if self.inplace else refusal(input)
        if reason is not None:
            self._left_to_torch(reason)
            return super().forward(input)
        return ops.silu(input)


class _OverDim(Served):
    """fastattn_function: of an input and the dimension that it is computed over."""

    fastattn_function: Callable[..., Tensor]
    dim: int | None

    def forward(self, input: Tensor) -> Any:
        reason = refusal(input) if self.dim is not None else "without a dim: torch chooses one"
        if reason is not None:
            self._left_to_torch(reason)
            return super().forward(input)
        return self.fastattn_function(widened(input), self.dim)


class SoftmaxForward(_OverDim):
    """torch.nn.Softmax on fastattn.softmax."""

    fastattn_function = staticmethod(ops.softmax)


class LogSoftmaxForward(_OverDim):
    """torch.nn.LogSoftmax on fastattn.log_softmax."""

    fastattn_function = staticmethod(ops.log_softmax)


class GELU(GELUForward, nn.GELU):
    """torch.nn.GELU: any shape, float32, bfloat16 or float16; approximate: "none" or "tanh". Others are torch's."""


class SiLU(SiLUForward, nn.SiLU):
    """torch.nn.SiLU: any shape, float32, bfloat16 or float16. Others, and in place, are torch's."""


class Softmax(SoftmaxForward, nn.Softmax):
    """torch.nn.Softmax over `dim`: any shape, float32, bfloat16 or float16. Others, and no dim, are torch's."""


class LogSoftmax(LogSoftmaxForward, nn.LogSoftmax):
    """torch.nn.LogSoftmax over `dim`: any shape, float32, bfloat16 or float16. Others, and no dim, are torch's."""
