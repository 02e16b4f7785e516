"""Attention of jagged nested tensors: their rows are packed sequences, and are taken where they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.dispatch import Op
from fastattn.ops.attention.options import AuxRequest, check_window
from fastattn.ops.attention.varlen import VarlenProblem, attention_varlen


class Rows(NamedTuple):
    """A nested tensor as attention_varlen takes it: (T, H, D), its bounds, and at least its longest sequence's length.

    lengths: of sequences with room behind them, else None. single: the tensor had no dimension of heads.
    """

    rows: Tensor
    offsets: Tensor
    lengths: Tensor | None
    longest: int
    nested: Any
    single: bool


def rows_of(name: str, tensor: Tensor) -> Rows:
    """ValueError unless it is jagged: (B, H, j, D) as transposed from (B, j, H, D), or (B, j, D)."""
    if not tensor.is_nested or tensor.layout != torch.jagged:
        kind = "a nested tensor of another layout" if tensor.is_nested else "no nested tensor"
        raise ValueError(f"attention: {name} is {kind}; query, key and value must all be jagged, or none of them")
    nested: Any = tensor
    single = nested.dim() == 3
    if nested.dim() not in (3, 4) or nested._ragged_idx != nested.dim() - 2:
        raise ValueError(
            f"attention: a jagged {name} must be (B, H, j, D) or (B, j, D) with j the ragged dimension, got"
            f" {nested.dim()} dimensions of which number {nested._ragged_idx} is ragged"
        )
    if not single:
        nested = nested.transpose(1, 2)
    rows, lengths = nested.values(), nested.lengths()
    longest = nested._get_max_seqlen() if lengths is None else rows.shape[0]
    return Rows(rows.unsqueeze(1) if single else rows, nested.offsets(), lengths, longest, nested, single)


def _call(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, alignment: str, window: tuple[int, int],
    unserved: dict[str, Any],
) -> tuple[Rows, Rows, Rows, tuple[int, int]]:  # fmt: skip
    """The three sides and the window, bottom right; ValueError for what nested tensors do not combine with."""
    for name, given in unserved.items():
        if given is not None:
            raise ValueError(f"attention: {name} cannot be combined with nested tensors")
    q, k, v = rows_of("query", query), rows_of("key", key), rows_of("value", value)
    if q.lengths is not None:
        raise ValueError("attention: a jagged query must not have room behind its sequences (lengths); the key may")
    if v.rows.shape[0] != k.rows.shape[0] or not _same_bounds(k, v):
        raise ValueError("attention: a jagged key and value must have the same offsets")
    left, right = check_window("attention", window)
    right = 0 if is_causal else right
    if alignment == "top_left" and (left >= 0 or right >= 0) and not _same_bounds(q, k):
        raise ValueError(
            "attention: of jagged tensors whose queries and keys differ in length only the bottom-right alignment is"
            ' there: pass causal_alignment="bottom_right"'
        )
    return q, k, v, (left, right)


def _same_bounds(a: Rows, b: Rows) -> bool:
    """Whether both sides have one ragged dimension, which is how nested tensors are known to be of the same lengths."""
    return a.offsets is b.offsets and a.lengths is b.lengths


def jagged_attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool, alignment: str, return_lse: bool,
    window: tuple[int, int], options: dict[str, Any], unserved: dict[str, Any],
) -> Any:  # fmt: skip
    """scaled_dot_product_attention of nested tensors; the results are nested like the query."""
    q, k, v, window = _call(query, key, value, is_causal, alignment, window, unserved)
    result = attention_varlen(
        q.rows, k.rows, v.rows, q.offsets, k.offsets, q.longest, k.longest, return_aux=AuxRequest(return_lse),
        window_size=window, enable_gqa=enable_gqa, seqused_k=k.lengths, **options,
    )  # fmt: skip
    output, lse = result if return_lse else (result, None)
    output = _nested(output.squeeze(1) if q.single else output, q)
    if lse is None:
        return output
    return output, _nested(lse[0] if q.single else lse.transpose(0, 1), q)


def _nested(rows: Tensor, like: Rows) -> Tensor:
    nested = torch.nested.nested_tensor_from_jagged(
        rows, like.offsets, min_seqlen=like.nested._get_min_seqlen(), max_seqlen=like.longest
    )
    return nested if like.single else nested.transpose(1, 2)


def prepare_jagged(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, enable_gqa: bool, alignment: str,
    window: tuple[int, int], options: dict[str, Any], unserved: dict[str, Any],
) -> tuple[Op, VarlenProblem]:  # fmt: skip
    q, k, v, window = _call(query, key, value, is_causal, alignment, window, unserved)
    prepared: tuple[Op, VarlenProblem] = attention_varlen.prepare(  # type: ignore[attr-defined]
        q.rows, k.rows, v.rows, q.offsets, k.offsets, q.longest, k.longest, window_size=window, enable_gqa=enable_gqa,
        seqused_k=k.lengths, **options,
    )  # fmt: skip
    return prepared
