"""What attention of padded, packed and nested tensors asks of its options."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Row, column and head indices are 32-bit words of the dropout counter, and products of them must fit 63 bits.
MAX_LENGTH = 2**31 - 1
MAX_SCALE = torch.finfo(torch.float32).max
MIN_SOFTCAP = 1e-30
NO_WINDOW = (-1, -1)


class AuxRequest(NamedTuple):
    """attention_varlen's return_aux, as torch.nn.attention.varlen.AuxRequest, which older torches do not have."""

    lse: bool


def check_window(op: str, window: Any) -> tuple[int, int]:
    """ValueError unless it is two whole numbers, each -1 (no bound) or more."""
    if (
        not isinstance(window, (tuple, list)) or len(window) != 2
        or isinstance(window[0], float) or isinstance(window[1], float)
    ):  # fmt: skip
        raise ValueError(f"{op}: window must be (left, right), two whole numbers, got {window!r}")
    left, right = window
    if left < -1 or right < -1:
        raise ValueError(f"{op}: window must hold numbers of at least 0, or -1 for no bound, got {(left, right)}")
    return left, right


def check_softcap(op: str, softcap: float) -> float:
    """ValueError unless it is 0 (none) or a factor that float32 can divide by."""
    if softcap != 0.0 and not MIN_SOFTCAP <= softcap <= MAX_SCALE:
        raise ValueError(f"{op}: softcap must be 0 or in [{MIN_SOFTCAP}, {MAX_SCALE:.6g}], got {softcap}")
    return float(softcap)


def check_heads(op: str, name: str, tensor: Tensor, query: Tensor, shapes: tuple[tuple[int, ...], ...]) -> Tensor:
    """ValueError unless it has one of the shapes, lies where the query lies, and is floating."""
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{op}: {name} must have shape {' or '.join(map(str, shapes))}, got {tuple(tensor.shape)}")
    allowed = (torch.float32, torch.bfloat16, torch.float16, query.dtype)
    if tensor.dtype not in allowed or tensor.device != query.device:
        raise ValueError(
            f"{op}: {name} must be float32, bfloat16, float16 or of the query's dtype, on {query.device}, got"
            f" {tensor.dtype} on {tensor.device}"
        )
    return tensor
