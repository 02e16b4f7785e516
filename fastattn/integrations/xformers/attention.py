"""xformers.ops.memory_efficient_attention over our attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.flash_attn.passes import dense_passes, packed_passes
from fastattn.flash_attn.varlen import gathered_pages
from fastattn.integrations.xformers.attn_bias import (
    AttentionBias,
    BlockDiagonalBias,
    LowerTriangularMaskWithTensorBias,
    PagedBlockDiagonalPaddedKeysMask,
)
from fastattn.ops.attention import attention_varlen, scaled_dot_product_attention
from fastattn.ops.attention.options import NO_WINDOW, AuxRequest

NAME = "memory_efficient_attention"


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * Q K^T + bias) V of (B, M, H, K) tensors, as xformers' function of this name.

    Args:
        query: (B, Mq, H, K), float32, bfloat16, float16 or float64; (B, Mq, K) is one head; (B, Mq, G, H, K) is H heads
            in each of G groups that share keys, which are expanded along H then: only one of them is read.
        key: (B, Mk, H, K), value: (B, Mk, H, Kv), of the query's number of dimensions. Nothing is broadcast.
        attn_bias: an AttentionBias, or a floating tensor that broadcasts to (B, H, Mq, Mk), for groups to (B, G, H, Mq,
            Mk), for one head to (B, Mq, Mk): added to the scores, differentiable. With a block-diagonal one B is 1.
        p: probability in [0, 1] of dropping an attention weight.
        scale: factor of the scores, 1 / sqrt(K) by default.
        op: without effect: which kernel serves is `backend` or fastattn.use_backend.
        output_dtype: of the result; the query's by default.
        backend: serve with this backend or raise BackendUnsupported.

    Returns: (B, Mq, H, Kv), (B, Mq, Kv) or (B, Mq, G, H, Kv). Queries that see no key get zeros.
    Raises: ValueError for shapes, dtypes, devices or values that do not fit; RuntimeError for pages that do not exist.
    """
    return _attended(query, key, value, attn_bias, p, scale, output_dtype, backend)[0]


def memory_efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """memory_efficient_attention without gradients."""
    with torch.no_grad():
        return _attended(query, key, value, attn_bias, p, scale, output_dtype)[0]


def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The forward alone, for memory_efficient_attention_backward: (output, lse), nothing recorded.

    lse: the log-sum-exp of the scores with the bias, natural log, float32 (float64 for float64), -inf where a query
    sees no key: (B, H, Mq), (B, 1, Mq) of one head, (B, G, H, Mq) of groups; never padded.
    p: 0: the backward would have to know the mask, which has no place in (output, lse).
    Raises ValueError for another p, others as memory_efficient_attention.
    """
    _check_no_dropout("memory_efficient_attention_forward_requires_grad", p)
    with torch.no_grad():
        return _attended(query, key, value, attn_bias, p, scale, output_dtype)


def memory_efficient_attention_backward(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward alone: gradients of query, key and value.

    grad, output, lse: the gradient of the output, and what memory_efficient_attention_forward_requires_grad returned;
    or output and lse over more keys, merged by merge_attentions, of which these keys are a part. A tensor bias gets no
    gradient here. Keys that are expanded along the heads of a group get a gradient for each of them.
    Raises ValueError for a p but 0 and for shapes that do not fit.
    """
    _check_no_dropout("memory_efficient_attention_backward", p)
    _check_results(grad, output, lse, query, value)
    with torch.enable_grad():
        # What lies between these and what kernels take is undone by autograd. Contiguous: heads of their own.
        detached = [t.detach().contiguous() if t.ndim == 5 else t.detach() for t in (query, key, value)]
        q, k, v = (t.requires_grad_() for t in detached)
        parts = _parts(q, k, v, attn_bias)
    batch, queries, heads = query.shape[0], query.shape[1], math.prod(query.shape[2:-1])
    grad, output = (t.to(query.dtype).reshape(batch, queries, heads, t.shape[-1]) for t in (grad, output))
    lse = lse.reshape(batch, heads, queries)
    ends: list[Tensor] = []
    grads: list[Tensor] = []
    with torch.no_grad():
        for part, rows in zip(parts, _rows_of(parts), strict=True):
            ends += (part.query, part.key, part.value)
            grads += part.gradients(grad[:, rows], output[:, rows], lse[:, :, rows], scale)
    d_query, d_key, d_value = torch.autograd.grad(ends, (q, k, v), grads)
    return d_query, d_key, d_value


def memory_efficient_attention_partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to some of the keys, for merge_attentions: (output, lse), both differentiable.

    p: probability of dropping a weight, as in memory_efficient_attention; lse is that of all weights, so that merged
    parts are attention to all keys with dropout. lse: as memory_efficient_attention_forward_requires_grad.
    """
    return _attended(query, key, value, attn_bias, p, scale, output_dtype)


class _Dense(NamedTuple):
    """Attention of whole matrices, (B, heads, M, K)."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    window: tuple[int, int]
    bottom_right: bool

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    def positions(self) -> tuple[bool, tuple[int, int]]:
        """(is_causal, window)"""
        return (True, NO_WINDOW) if self.window == (-1, 0) else (False, self.window)

    def results(self, p: float, scale: float | None, backend: str | None) -> tuple[Tensor, Tensor]:
        """(B, M, heads, Kv) and lse (B, heads, M)."""
        causal, window = self.positions()
        output, lse = scaled_dot_product_attention(
            self.query, self.key, self.value, self.mask, p, causal, scale, self.query.shape[1] != self.key.shape[1],
            causal_alignment="bottom_right" if self.bottom_right else "top_left", return_lse=True, window=window,
            backend=backend,
        )  # fmt: skip
        return output.transpose(1, 2), lse

    def gradients(self, grad: Tensor, output: Tensor, lse: Tensor, scale: float | None) -> Sequence[Tensor]:
        """Of query, key and value."""
        causal, window = self.positions()
        mask = None if self.mask is None else self.mask.detach()[(None,) * (4 - self.mask.ndim)]
        passes = dense_passes(
            self.query, self.key, self.value, mask, scale, 0.0, causal, self.bottom_right, window
        )  # fmt: skip
        return passes.backward(grad.transpose(1, 2), output.transpose(1, 2), lse, None)


class _Packed(NamedTuple):
    """Attention of packed sequences, (T, heads, K), aligned bottom right."""

    query: Tensor
    key: Tensor
    value: Tensor
    bounds_q: Tensor
    bounds_k: Tensor
    used: Tensor | None
    max_q: int
    max_k: int
    window: tuple[int, int]

    @property
    def queries(self) -> int:
        return self.query.shape[0]

    def results(self, p: float, scale: float | None, backend: str | None) -> tuple[Tensor, Tensor]:
        """(1, T, heads, Kv) and lse (1, heads, T)."""
        output, lse = attention_varlen(
            self.query, self.key, self.value, self.bounds_q, self.bounds_k, self.max_q, self.max_k,
            return_aux=AuxRequest(True), scale=scale, window_size=self.window, seqused_k=self.used, dropout_p=p,
            enable_gqa=self.query.shape[1] != self.key.shape[1], backend=backend,
        )  # fmt: skip
        return output.unsqueeze(0), lse.unsqueeze(0)

    def gradients(self, grad: Tensor, output: Tensor, lse: Tensor, scale: float | None) -> Sequence[Tensor]:
        """Of query, key and value."""
        passes = packed_passes(
            self.query, self.key, self.value, self.bounds_q, self.bounds_k, self.used, self.max_q, self.max_k, scale,
            0.0, self.window,
        )  # fmt: skip
        return passes.backward(grad[0], output[0], lse[0], None)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any,
    p: float,
    scale: float | None,
    output_dtype: torch.dtype | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(output, lse) in the shapes of the arguments."""
    results = [part.results(p, scale, backend) for part in _parts(query, key, value, attn_bias)]
    output, lse = results[0]
    if len(results) > 1:
        output, lse = torch.cat([o for o, _ in results], 1), torch.cat([s for _, s in results], -1)
    output = output.reshape(*query.shape[:-1], value.shape[-1])
    if query.ndim == 5:
        lse = lse.unflatten(1, query.shape[2:4])
    return output if output_dtype is None else output.to(output_dtype), lse


def _parts(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any) -> Sequence[_Dense | _Packed]:
    """The calls of our attention that this is: one, or one for each block, whose queries lie one behind the other."""
    q, k, v = _heads(query, key, value)
    if isinstance(attn_bias, (BlockDiagonalBias, PagedBlockDiagonalPaddedKeysMask)):
        return _blocks(q, k, v, attn_bias)
    mask, window, bottom_right = _dense(attn_bias, query.ndim)
    return [_Dense(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, window, bottom_right)]


def _rows_of(parts: Sequence[_Dense | _Packed]) -> list[slice]:
    """Where the queries of each lie."""
    found, start = [], 0
    for part in parts:
        found.append(slice(start, start + part.queries))
        start += part.queries
    return found


def _check_no_dropout(name: str, p: float) -> None:
    if p != 0.0:
        raise ValueError(f"{name}: p must be 0, got {p}: memory_efficient_attention has dropout, and gradients with it")


def _check_results(grad: Tensor, output: Tensor, lse: Tensor, query: Tensor, value: Tensor) -> None:
    shape = (*query.shape[:-1], value.shape[-1])
    for name, tensor in (("grad", grad), ("output", output)):
        if tensor.shape != shape:
            raise ValueError(f"memory_efficient_attention_backward: {name} must be {shape}, got {tuple(tensor.shape)}")
    heads = query.shape[2:-1] if query.ndim > 3 else (1,)
    if lse.shape != (query.shape[0], *heads, query.shape[1]):
        raise ValueError(
            f"memory_efficient_attention_backward: lse must be {(query.shape[0], *heads, query.shape[1])}, got"
            f" {tuple(lse.shape)}"
        )


def _heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, M, heads, K), with fewer heads of keys and values where groups share them."""
    shapes = f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
    if query.ndim not in (3, 4, 5) or not query.ndim == key.ndim == value.ndim:
        raise ValueError(
            f"{NAME}: query, key and value must all be (B, M, H, K), (B, M, K) or (B, M, G, H, K), got {shapes}"
        )
    if (
        not query.shape[0] == key.shape[0] == value.shape[0] or not query.shape[2:-1] == key.shape[2:-1]
        or key.shape[:-1] != value.shape[:-1] or query.shape[-1] != key.shape[-1]
    ):  # fmt: skip
        raise ValueError(
            f"{NAME}: query, key and value do not fit, got {shapes}; nothing is broadcast: expand them if they share"
        )
    if query.ndim == 3:
        return query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2)
    if query.ndim == 4:
        return query, key, value
    if key.stride(3) == value.stride(3) == 0:
        # One of the expanded heads; its gradient is that of all, which expanding has summed.
        return query.flatten(2, 3), key.select(3, 0), value.select(3, 0)
    return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)


def _dense(attn_bias: Any, dims: int) -> tuple[Tensor | None, tuple[int, int], bool]:
    """(mask, window, bottom_right) of what is said of the whole matrix."""
    window, bottom_right, tensor = NO_WINDOW, False, attn_bias
    if isinstance(attn_bias, AttentionBias):
        window, bottom_right = attn_bias.window, attn_bias.bottom_right
        tensor = attn_bias._bias if isinstance(attn_bias, LowerTriangularMaskWithTensorBias) else None
    if tensor is None:
        return None, window, bottom_right
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{NAME}: attn_bias must be an AttentionBias or a floating tensor, which is added, got {kind}")
    if dims == 3 and tensor.ndim == 3:
        tensor = tensor.unsqueeze(1)
    elif dims == 5 and tensor.ndim == 5:
        tensor = tensor.flatten(1, 2)
    return tensor, window, bottom_right


def _blocks(q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Sequence[_Dense | _Packed]:
    """Packed sequences; or blocks one by one where they have more queries than keys and are aligned top left, which
    packed sequences are not."""
    if not q.shape[0] == k.shape[0] == v.shape[0] == 1:
        raise ValueError(f"{NAME}: with {type(bias).__name__} the batch size must be 1, got {q.shape[0]}")
    queries, keys = bias.q_seqinfo, bias.k_seqinfo
    if queries.seqstart_py[-1] != q.shape[1]:
        raise ValueError(f"{NAME}: {type(bias).__name__} is of {queries.seqstart_py[-1]} queries, got {q.shape[1]}")
    rows, bounds, used, room = (k[0], v[0]), keys.seqstart, getattr(keys, "seqlen", None), keys.max_seqlen
    if isinstance(bias, PagedBlockDiagonalPaddedKeysMask):
        k_pool, v_pool = (t[0].unflatten(0, (-1, bias.page_size)) for t in (k, v))
        table = bias.block_tables.to(torch.int32)
        key, value, bounds, used, room = gathered_pages(NAME, k_pool, v_pool, keys.seqlen, keys.padding, table)
        rows = (key, value)
    else:
        if keys.seqstart_py[-1] != k.shape[1]:
            raise ValueError(f"{NAME}: {type(bias).__name__} is of {keys.seqstart_py[-1]} keys, got {k.shape[1]}")
        if used is not None:
            room = keys.room
        elif not bias.bottom_right and bias.window != NO_WINDOW:
            # Top left is bottom right where both are of one length: keys behind the last query are not seen anyway.
            pairs = list(zip(queries.intervals(), keys.intervals(), strict=True))
            if any(q1 - q0 > k1 - k0 for (q0, q1), (k0, k1) in pairs):
                q, k, v = (t.transpose(1, 2) for t in (q, k, v))
                return [
                    _Dense(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], None, bias.window, False)
                    for (q0, q1), (k0, k1) in pairs
                ]
            if queries is not keys:
                used = queries.seqstart.diff()
    return [_Packed(q[0], *rows, queries.seqstart, bounds, used, queries.max_seqlen, room, bias.window)]
