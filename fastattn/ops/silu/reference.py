"""SiLU in plain torch."""

from __future__ import annotations

from torch import Tensor

from fastattn.activations import reference


def gate(x: Tensor) -> Tensor:
    return x.sigmoid()


def density(x: Tensor) -> Tensor:
    """The derivative of the gate, without cancellation."""
    return x.sigmoid() * (-x).sigmoid()


IMPLEMENTATION = reference(gate, density)
