"""Linear layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import ops
from fastattn.nn.served import Served, refusal
from fastattn.ops.linear.op import prefers_torch

_ACTIVATIONS = {"relu": torch.relu, "gelu": ops.gelu, "gelu_tanh": lambda x: ops.gelu(x, "tanh")}


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """ops.linear, but torch's own product where that is the faster one and no backend is forced."""
    if not prefers_torch(input, weight, activation):
        return ops.linear(input, weight, bias, activation)
    product = F.linear(input, weight, bias)
    return product if activation is None else _ACTIVATIONS[activation](product)


class LinearForward(Served):
    """torch.nn.Linear on fastattn.linear."""

    weight: Any
    bias: Any

    def forward(self, input: Tensor) -> Any:
        weight, bias = self.weight, self.bias
        reason = refusal(input, weight, bias)
        if reason is not None:
            self._left_to_torch(reason)
        elif not prefers_torch(input, weight):
            return ops.linear(input, weight, bias)
        return super().forward(input)


class Linear(LinearForward, nn.Linear):
    """torch.nn.Linear: input (..., in_features) of float32, bfloat16 or float16 to (..., out_features).

    Where torch's matrix product is the faster one (short products in float32, one row of it, most of bfloat16 without
    AVX512_BF16, GPUs), it is used: fastattn.preference. Other tensors (float64, tensor subclasses, devices without
    kernels) are torch's, too.
    """
