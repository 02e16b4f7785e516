"""SwiGLU in plain torch, float32 (float64 for float64) inside."""

from __future__ import annotations

from torch import Tensor

# Bound here: what fastattn.accelerate() puts in its place leads back here.
from torch.nn.functional import silu as torchs_silu

from fastattn.dispatch import Implementation
from fastattn.numerics import accumulation_dtype


def forward(gate: Tensor, up: Tensor) -> Tensor:
    acc = accumulation_dtype(gate.dtype)
    return (torchs_silu(gate.to(acc)) * up.to(acc)).to(gate.dtype).contiguous()


def backward(grad_output: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """d(gate) = g up s (1 + gate (1 - s)), d(up) = g gate s, with s = sigmoid(gate)."""
    acc = accumulation_dtype(gate.dtype)
    g, x = grad_output.to(acc), gate.to(acc)
    s = x.sigmoid()
    grad_gate = g * up.to(acc) * (s + x * s * (-x).sigmoid())
    return grad_gate.to(gate.dtype).contiguous(), (g * x * s).to(gate.dtype).contiguous()


IMPLEMENTATION = Implementation(lambda problem: None, forward, backward, differentiable=True)
