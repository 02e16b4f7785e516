"""flash_attn.bert_padding: from padded batches, (B, S, ...), to packed rows, (T, ...), and back."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices], whose gradient is zero in other rows. input: (N, ...). indices: (T,) int64, each once."""
    return torch.index_select(input, 0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...) zeros with values, (T, ...), in the rows of indices, (T,) int64, each once."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The rows that a mask names, one behind the other.

    Args:
        hidden_states: (B, S, ...) of any dtype; differentiable.
        attention_mask: (B, S), bool or integers, 1 for tokens.
        unused_mask: (B, S), 1 for places that are kept as well but not used.

    Returns:
        hidden_states (T, ...); indices (T,), int64, of the rows among B * S; cu_seqlens (B + 1,) int32, where the
        sequences start and end; the longest one's length; seqused (B,) int32, the tokens of attention_mask alone.

    Raises ValueError for masks whose shape is not that of the first two dimensions. Waits for a GPU, as every function
    does whose result has as many rows as a mask has ones.
    """
    _check_mask("unpad_input", "attention_mask", attention_mask, hidden_states)
    kept = attention_mask
    if unused_mask is not None:
        _check_mask("unpad_input", "unused_mask", unused_mask, hidden_states)
        kept = attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    longest = int(lengths.max()) if lengths.numel() > 0 else 0
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, _bounds(lengths), longest, attention_mask.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """`unpad_input` of batch elements that hold several sequences one behind the other.

    Args:
        hidden_states: (B, S, ...).
        attention_mask_in_length: (B, S) integers: the lengths of a batch element's sequences, then zeros:
            [2, 3, 0, 0, 0, 0] is a sequence of 2, one of 3, and one place of padding.

    Returns: as unpad_input, without seqused; cu_seqlens has one bound for each sequence. Raises ValueError likewise.
    """
    _check_mask(
        "unpad_input_for_concatenated_sequences", "attention_mask_in_length", attention_mask_in_length, hidden_states
    )
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths != 0]
    filled = attention_mask_in_length.sum(-1, keepdim=True)
    there = torch.arange(attention_mask_in_length.shape[1], device=filled.device) < filled
    indices = there.flatten().nonzero().flatten()
    longest = int(lengths.max()) if lengths.numel() > 0 else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, _bounds(lengths), longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """What unpad_input took apart: (batch, seqlen, ...), zeros where no row belongs; differentiable.

    Args: hidden_states: (T, ...). indices: (T,), as unpad_input returned them.
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _bounds(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _check_mask(function: str, name: str, mask: Tensor, hidden_states: Tensor) -> None:
    if mask.ndim != 2 or mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{function}: {name} must be (B, S) = {tuple(hidden_states.shape[:2])}, got {tuple(mask.shape)}"
        )
