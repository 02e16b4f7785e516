"""flash-attention's arguments, as our ops take them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn import philox


def unpacked(name: str, packed: Tensor, what: str, parts: int, dims: int) -> tuple[Tensor, ...]:
    """The tensors that were packed along the third dimension from the end; ValueError where there are not `parts`."""
    if packed.ndim != dims or packed.shape[-3] != parts:
        shape = ", ".join(("B", "S", str(parts), "H", "D") if dims == 5 else ("T", str(parts), "H", "D"))
        raise ValueError(f"{name}: {what} must be ({shape}), got {tuple(packed.shape)}")
    return packed.unbind(-3)


def window_of(causal: bool, window_size: tuple[int, int]) -> tuple[int, int]:
    """The window of a call: causal is a right of 0."""
    left, right = window_size
    return left, 0 if causal else right


def scale_of(q: Tensor, softmax_scale: float | None) -> float:
    return 1.0 / math.sqrt(max(q.shape[-1], 1)) if softmax_scale is None else float(softmax_scale)


def cap_of(softcap: float) -> float:
    """flash-attention's "nothing" is every number that is not above 0; NaN stays, and is refused."""
    return 0.0 if softcap <= 0.0 else softcap


def dropout_state(dropout_p: float, device: torch.device) -> Tensor | None:
    """The state of a call's dropout; None without."""
    return philox.draw(device) if dropout_p > 0.0 else None
