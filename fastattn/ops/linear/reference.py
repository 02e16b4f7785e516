"""Linear in plain torch, in the input's dtype: torch's own matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

# Bound here: what fastattn.accelerate() puts in their place leads back here.
from torch.nn.functional import gelu as torchs_gelu
from torch.nn.functional import linear as torchs_linear

from fastattn.dispatch import Implementation
from fastattn.ops.linear.op import ACTIVATIONS

_TANH = {"gelu": "none", "gelu_tanh": "tanh"}


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, activation: int, save: bool) -> tuple[Tensor, Tensor]:
    """(output, what it was before the activation if that is to be saved, else nothing)."""
    weight = weight.to(input.dtype)
    output = torchs_linear(input, weight, None if bias is None else bias.to(input.dtype))
    preactivation = output if save else input.new_empty((0,))
    name = ACTIVATIONS[activation]
    if name in _TANH:
        output = torchs_gelu(output, approximate=_TANH[name])
    elif name == "relu":
        output = torch.relu(output)
    return output.contiguous(), preactivation.contiguous()


def backward(
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
    """Gradients of input, weight and bias; without elements where they are not wanted."""
    name = ACTIVATIONS[activation]
    if saved is not None and name in _TANH:
        grad_output = torch.ops.aten.gelu_backward(grad_output, saved, approximate=_TANH[name])
    elif saved is not None and name == "relu":
        grad_output = torch.ops.aten.threshold_backward(grad_output, saved, 0)
    count = input.shape[:-1].numel()
    rows, outer = input.reshape(count, weight.shape[1]), grad_output.reshape(count, weight.shape[0])
    grad_input = input.new_empty((0,))
    if input_grad:
        grad_input = (outer @ weight.to(outer.dtype)).reshape(input.shape).contiguous()
    grad_weight = weight.new_empty((0,))
    if weight_grad:
        grad_weight = (outer.t() @ rows).to(weight.dtype).contiguous()
    grad_bias = (input if bias is None else bias).new_empty((0,))
    if bias_grad and bias is not None:
        grad_bias = outer.sum(0).to(bias.dtype)
    return grad_input, grad_weight, grad_bias


IMPLEMENTATION = Implementation(lambda problem: None, forward, backward, differentiable=True)
