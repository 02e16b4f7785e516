"""xformers.ops.memory_efficient_attention over our attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.flash_attn.varlen import gathered_pages
from fastattn.integrations.xformers.attn_bias import (
    AttentionBias,
    BlockDiagonalBias,
    LowerTriangularMaskWithTensorBias,
    PagedBlockDiagonalPaddedKeysMask,
)
from fastattn.ops.attention import attention_varlen, scaled_dot_product_attention

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
    shape = (*query.shape[:-1], value.shape[-1])
    q, k, v = _heads(query, key, value)
    call: dict[str, Any] = {"scale": scale, "dropout_p": p, "enable_gqa": q.shape[2] != k.shape[2], "backend": backend}
    if isinstance(attn_bias, (BlockDiagonalBias, PagedBlockDiagonalPaddedKeysMask)):
        output = _blocks(q, k, v, attn_bias, call)
    else:
        mask, window, alignment = _dense(attn_bias, query.ndim)
        causal = window == (-1, 0)
        output = scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, is_causal=causal,
            window=(-1, -1) if causal else window, causal_alignment=alignment, **call,
        ).transpose(1, 2)  # fmt: skip
    output = output.reshape(shape)
    return output if output_dtype is None else output.to(output_dtype)


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
        return memory_efficient_attention(query, key, value, attn_bias, p, scale, op=op, output_dtype=output_dtype)


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


def _dense(attn_bias: Any, dims: int) -> tuple[Tensor | None, tuple[int, int], str]:
    """(mask, window, alignment) of what is said of the whole matrix."""
    window, alignment, tensor = (-1, -1), "top_left", attn_bias
    if isinstance(attn_bias, AttentionBias):
        window, alignment = attn_bias.window, "bottom_right" if attn_bias.bottom_right else "top_left"
        tensor = attn_bias._bias if isinstance(attn_bias, LowerTriangularMaskWithTensorBias) else None
    if tensor is None:
        return None, window, alignment
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{NAME}: attn_bias must be an AttentionBias or a floating tensor, which is added, got {kind}")
    if dims == 3 and tensor.ndim == 3:
        tensor = tensor.unsqueeze(1)
    elif dims == 5 and tensor.ndim == 5:
        tensor = tensor.flatten(1, 2)
    return tensor, window, alignment


def _blocks(q: Tensor, k: Tensor, v: Tensor, bias: Any, call: dict[str, Any]) -> Tensor:
    """(1, total, H, Kv)"""
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
        elif not bias.bottom_right and bias.window != (-1, -1):
            # Top left is bottom right where both are of one length: keys behind the last query are not seen anyway.
            pairs = list(zip(queries.intervals(), keys.intervals(), strict=True))
            if any(q1 - q0 > k1 - k0 for (q0, q1), (k0, k1) in pairs):
                return _one_by_one(q, k, v, bias, pairs, call)
            if queries is not keys:
                used = queries.seqstart.diff()
    output: Tensor = attention_varlen(
        q[0], *rows, queries.seqstart, bounds, queries.max_seqlen, room, window_size=bias.window, seqused_k=used, **call
    )
    return output.unsqueeze(0)


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, pairs: list[tuple[tuple[int, int], tuple[int, int]]],
    call: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Blocks of more queries than keys, aligned top left, which packed sequences are not."""
    return torch.cat([
        scaled_dot_product_attention(
            q[:, q0:q1].transpose(1, 2), k[:, k0:k1].transpose(1, 2), v[:, k0:k1].transpose(1, 2), window=bias.window,
            **call,
        ).transpose(1, 2)
        for (q0, q1), (k0, k1) in pairs
    ], 1)  # fmt: skip
