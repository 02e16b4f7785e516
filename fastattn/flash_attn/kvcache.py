"""flash_attn_with_kvcache: attention over a KV cache that the call itself may extend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.flash_attn.arguments import cap_of
from fastattn.ops.attention.op import unit_last_stride
from fastattn.ops.decode.append import append_to_cache
from fastattn.ops.decode.op import Call, check_dtypes
from fastattn.ops.decode.places import check_length
from fastattn.ops.rotary import apply_rotary_emb


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    backend: str | None = None,
) -> Any:
    """Attention over a KV cache which, given k and v, is first extended **in place** by them.

    In one call: rotate q and k, write k and v to the cache behind the keys that each sequence has, attend. The last
    query stands beside the last key (also with causal=False, for windows and ALiBi).

    Args:
        q: (B, Sq, H, D), float32, bfloat16, float16 or float64.
        k_cache: (B_cache, slots, Hkv, D), or (pages, page size, Hkv, D) with a block_table; the last stride is 1.
        v_cache: the same shape but for the last dimension, which may differ.
        k, v: (B, new, Hkv, D) to append at cache_seqlens, both or neither. The caller adds `new` to cache_seqlens.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), the dtype of q or float32. k is rotated from position
            cache_seqlens on; so is q if causal or with a window, else all of q is rotated by cache_seqlens. Needs k.
        cache_seqlens: keys in the cache before the call, int or (B,) int32; all slots when None. Needed with k.
        cache_batch_idx: (B,) the cache row of every sequence. None: b.
        cache_leftpad: (B,) where the keys of every sequence begin. None: 0.
        block_table: (B, n) int32: the pages of every sequence. Pages may have any size.
        softmax_scale: 1 / sqrt(D) by default.
        causal, window_size: the window is (left, right), -1 for unbounded; causal sets right to 0.
        softcap: scores become softcap * tanh(scores / softcap); 0 or less: they stay.
        rotary_interleaved: turn columns 2i and 2i + 1 (GPT-J), or i and i + rotary_dim / 2 (GPT-NeoX).
        alibi_slopes: (H,) or (B, H) float32.
        num_splits: into how many parts the keys are cut; 0: by a fixed length. Results are deterministic either way.
        return_softmax_lse: also return the log-sum-exp of the scores.
        backend: serve with this backend or raise BackendUnsupported.

    Returns:
        (B, Sq, H, D) in q's dtype; with return_softmax_lse a tuple of it and lse (B, H, Sq), float32, natural log.

    Raises:
        ValueError: shapes, dtypes, strides or options that do not fit. RuntimeError: an index outside of the cache,
        keys that do not fit, a page or row that two sequences would write. The caches are unchanged then. Tensors on
        a GPU are not looked at for that: docs/inference.md.

    Unlike flash-attention: a query that sees no key has lse -inf (there +inf); k and v must not write to one place
    twice; cache_leftpad works with pages.
    """
    if (k is None) != (v is None):
        raise ValueError("flash_attn_with_kvcache: k and v are given together or not at all")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("flash_attn_with_kvcache: rotary_cos and rotary_sin are given together or not at all")
    if rotary_cos is not None and k is None:
        raise ValueError("flash_attn_with_kvcache: rotary_cos and rotary_sin need k and v to append")
    if k is not None and cache_seqlens is None:
        raise ValueError("flash_attn_with_kvcache: k and v need cache_seqlens, where they are to be written")
    length = cache_seqlens if isinstance(cache_seqlens, int) else None
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full(q.shape[:1], cache_seqlens, dtype=torch.int64, device=q.device)
    q = unit_last_stride(q)
    call = Call(
        q, k_cache, v_cache, cache_seqlens, cache_leftpad, cache_batch_idx, block_table, softmax_scale, causal,
        window_size, cap_of(softcap), alibi_slopes, num_splits, backend,
    )  # fmt: skip
    new = 0
    if k is not None:
        assert v is not None
        k, v, new = unit_last_stride(k), unit_last_stride(v), k.shape[1]
        _check_new(q, k_cache, v_cache, k, v)
    if length is not None and q.shape[0] > 0 and not torch.compiler.is_compiling():
        # What is no tensor can be looked at on every device.
        check_length(0, length, new, k_cache.shape[1] * (1 if block_table is None else block_table.shape[1]))
    if k is not None:
        assert v is not None and cache_seqlens is not None
        if rotary_cos is not None:
            assert rotary_sin is not None
            forward = causal or tuple(window_size) != (-1, -1)
            q, k = _rotated(q, k, rotary_cos, rotary_sin, rotary_interleaved, cache_seqlens, forward, backend)
        append_to_cache(
            k_cache, v_cache, k, v, cache_seqlens, cache_leftpad, cache_batch_idx, block_table,
            backend=call.bound.backend,
        )  # fmt: skip
    output, lse = call.run(q, new)
    return (output, lse) if return_softmax_lse else output


def _check_new(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError unless k and v are what the caches hold."""
    check_dtypes(q, k=k, v=v)
    for name, tensor, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if tensor.ndim != 4 or tensor.shape != (q.shape[0], k.shape[1], *cache.shape[2:]):
            raise ValueError(
                f"flash_attn_with_kvcache: {name} must be (B, new, Hkv, D) = ({q.shape[0]}, {k.shape[1]},"
                f" {cache.shape[2]}, {cache.shape[3]}), got {tuple(tensor.shape)}"
            )
        if torch.is_grad_enabled() and cache.requires_grad:
            raise ValueError(f"flash_attn_with_kvcache: {name}_cache is written and must not need a gradient")


def _rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, offsets: Tensor, forward: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q and k turned by their positions: those of the keys, or, unless `forward`, one position for all of q."""
    k = apply_rotary_emb(k, cos, sin, interleaved, seqlen_offsets=offsets, backend=backend)
    if forward:
        return apply_rotary_emb(q, cos, sin, interleaved, seqlen_offsets=offsets, backend=backend), k
    batch, queries, heads, dim = q.shape
    as_one = q.reshape(batch, 1, queries * heads, dim)
    as_one = apply_rotary_emb(as_one, cos, sin, interleaved, seqlen_offsets=offsets, backend=backend)
    return as_one.view(batch, queries, heads, dim), k
