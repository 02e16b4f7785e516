"""Packed sequences in plain torch: attention's reference for one sequence after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import Implementation
from fastattn.numerics import accumulation_dtype
from fastattn.ops.attention import reference
from fastattn.ops.attention.varlen import sequences_of


def _sequences(
    query: Tensor,
    key: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    seqused_k: Tensor | None,
    max_q: int,
    max_k: int,
    window: tuple[int, int],
    softcap: float,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> Iterator[tuple[int, slice, slice, tuple[Any, ...]]]:
    """(number, rows of queries, rows of keys, features) of every sequence."""
    found = sequences_of(query, key, cu_seq_q, cu_seq_k, seqused_k, max_q, max_k)
    for i, (q0, q1, k0, k1) in enumerate(found):
        own = slopes[i : i + 1] if slopes is not None and slopes.ndim == 2 else slopes
        yield i, slice(q0, q1), slice(k0, k1), (*window, softcap, sinks, own, None, None, None)


def _headed(rows: Tensor) -> Tensor:
    """(T, H, E) as (1, H, T, E)."""
    return rows.transpose(0, 1).unsqueeze(0)


def _packed(heads: Tensor) -> Tensor:
    return heads.squeeze(0).transpose(0, 1)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    seqused_k: Tensor | None,
    philox: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    max_q: int,
    max_k: int,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """(output, lse); see attention_varlen."""
    output = query.new_zeros((*query.shape[:2], value.shape[2]))
    lse = query.new_full((query.shape[1], query.shape[0]), -torch.inf, dtype=accumulation_dtype(query.dtype))
    for i, q, k, features in _sequences(
        query, key, cu_seq_q, cu_seq_k, seqused_k, max_q, max_k, (left, right), softcap, sinks, slopes
    ):
        rows = (_headed(query[q]), _headed(key[k]), _headed(value[k]))
        one, one_lse = reference.forward_at(i, *rows, None, philox, scale, False, True, dropout_p, *features)
        output[q], lse[:, q] = _packed(one), one_lse.squeeze(0)
    return output, lse


def probabilities(
    query: Tensor,
    key: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    seqused_k: Tensor | None,
    philox: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    max_q: int,
    max_k: int,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> Tensor:
    """(N, H, max_q, max_k): attention's `probabilities` of every sequence, 0 beyond its queries and keys."""
    found = query.new_zeros((cu_seq_q.shape[0] - 1, query.shape[1], max_q, max_k))
    for i, q, k, features in _sequences(
        query, key, cu_seq_q, cu_seq_k, seqused_k, max_q, max_k, (left, right), softcap, None, slopes
    ):
        rows = (_headed(query[q]), _headed(key[k]))
        one = reference.probabilities(i, *rows, None, philox, scale, False, True, dropout_p, *features)
        found[i, :, : q.stop - q.start, : k.stop - k.start] = one[0]
    return found


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    seqused_k: Tensor | None,
    philox: Tensor | None,
    sinks: Tensor | None,
    slopes: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    max_q: int,
    max_k: int,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks ((0,) without)."""
    grads: list[dict[int, Tensor]] = [{}, {}, {}]
    total = None if sinks is None else torch.zeros_like(sinks, dtype=accumulation_dtype(query.dtype))
    for i, q, k, features in _sequences(
        query, key, cu_seq_q, cu_seq_k, seqused_k, max_q, max_k, (left, right), softcap, sinks, slopes
    ):
        grad_query, grad_key, grad_value, _, grad_sinks = reference.backward_at(
            i, _headed(grad_output[q]), None if grad_lse is None else grad_lse[:, q].unsqueeze(0),
            _headed(query[q]), _headed(key[k]), _headed(value[k]), None, philox,
            _headed(output[q]), lse[:, q].unsqueeze(0), scale, False, True, dropout_p, False, *features,
        )  # fmt: skip
        for found, start, grad in zip(
            grads, (q.start, k.start, k.start), (grad_query, grad_key, grad_value), strict=True
        ):
            if grad.shape[2] > 0:
                found[start] = _packed(grad)
        if total is not None:
            total = total + grad_sinks
    none = query.new_empty((0,), dtype=torch.float32)
    return (
        _assembled(query, grads[0]),
        _assembled(key, grads[1]),
        _assembled(value, grads[2]),
        none if sinks is None or total is None else total.to(sinks.dtype),
    )


def _assembled(like: Tensor, parts: dict[int, Tensor]) -> Tensor:
    """Parts at their rows, zeros elsewhere; made of concatenation, so that it can be differentiated."""
    pieces, at = [], 0
    for start, part in sorted(parts.items()):
        pieces += [like.new_zeros((start - at, *like.shape[1:])), part]
        at = start + part.shape[0]
    pieces.append(like.new_zeros((like.shape[0] - at, *like.shape[1:])))
    return torch.cat(pieces)


IMPLEMENTATION = Implementation(lambda problem: None, forward, backward, differentiable=True)
