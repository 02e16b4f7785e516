"""Linear layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import dispatch, ops
from fastattn.nn.served import Served, refusal
from fastattn.ops.linear.op import prefers_torch

#: Products of fewer multiplications are torch's: there a call of ours costs more than its kernel saves.
FEW = 2**21
_ACTIVATIONS = {"relu": torch.relu, "gelu": ops.gelu, "gelu_tanh": lambda x: ops.gelu(x, "tanh")}


def short(input: Tensor, weight: Tensor) -> bool:
    """Whether the product is so short that the call decides what it takes. Compiled code has no calls, and exported
    code must not ask for sizes."""
    if torch.compiler.is_compiling() or weight.ndim != 2 or dispatch.forced_backend() is not None:
        return False
    return input.numel() * weight.shape[0] < FEW


def torchs(input: Tensor, weight: Tensor) -> bool:
    """Whether torch's product is the faster one: it is short, or the committed table (preference.py) says so; never
    where a backend is forced."""
    return short(input, weight) or prefers_torch(input, weight)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """ops.linear, but torch's own product where that is the faster one and no backend is forced."""
    if not torchs(input, weight):
        return ops.linear(input, weight, bias, activation)
    product = F.linear(input, weight, bias)
    return product if activation is None else _ACTIVATIONS[activation](product)


class LinearForward(Served):
    """torch.nn.Linear on fastattn.linear."""

    weight: Any
    bias: Any

    def forward(self, input: Tensor) -> Any:
        weight, bias = self.weight, self.bias
        if short(input, weight):  # asked first: it is as good as any reason
            return super().forward(input)
        reason = refusal(input, weight, bias)
        if reason is not None:
            self._left_to_torch(reason)
            return super().forward(input)
        return linear(input, weight, bias)


class Linear(LinearForward, nn.Linear):
    """torch.nn.Linear: input (..., in_features) of float32, bfloat16 or float16 to (..., out_features).

    Where torch's matrix product is the faster one (a few rows, most of bfloat16 without AVX512_BF16, GPUs), it is
    used: fastattn.preference. Other tensors (float64, tensor subclasses, devices without kernels) are torch's, too.
    """
