"""GELU in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.activations import reference
from fastattn.ops.gelu.op import APPROXIMATIONS


def _exponent(x: Tensor) -> Tensor:
    """Phi(x) taken as (1 + tanh(u)) / 2 is sigmoid(2 u), which falls to 0 where 1 + tanh is lost in rounding: 2 u."""
    return math.sqrt(8.0 / math.pi) * x * (1.0 + 0.044715 * x.square())


def gate(x: Tensor, approximate: int) -> Tensor:
    """Phi(x)."""
    form = APPROXIMATIONS[approximate]
    if form == "none":
        return torch.special.ndtr(x)
    return (_exponent(x) if form == "tanh" else 1.702 * x).sigmoid()


def density(x: Tensor, approximate: int) -> Tensor:
    """Its derivative."""
    form = APPROXIMATIONS[approximate]
    if form == "none":
        return (-0.5 * x.square()).exp() / math.sqrt(2.0 * math.pi)
    if form == "sigmoid":
        return 1.702 * (1.702 * x).sigmoid() * (-1.702 * x).sigmoid()
    exponent = _exponent(x)
    # Where the square would overflow, the sigmoids' product is 0.
    slope = math.sqrt(8.0 / math.pi) * (1.0 + 3.0 * 0.044715 * x.square().clamp_max(1e30))
    return exponent.sigmoid() * (-exponent).sigmoid() * slope


IMPLEMENTATION = reference(gate, density)
