"""flash_attn_func and its packed forms: sequences of one length, (B, S, H, D)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.flash_attn.arguments import cap_of, dropout_state, scale_of, unpacked, window_of
from fastattn.ops.attention import reference, scaled_dot_product_attention


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str | None = None,
) -> Any:
    """Attention of (B, S, H, D) tensors; the last query stands beside the last key (Dao 2023, FlashAttention-2).

    Args:
        q: (B, Sq, H, D), float32, bfloat16, float16 or float64; any strides, a last stride other than 1 costs a copy.
        k: (B, Sk, Hkv, D), v: (B, Sk, Hkv, Dv). Hkv divides H: query head h uses head h // (H / Hkv).
        dropout_p: probability in [0, 1] of dropping an attention weight.
        softmax_scale: factor of the scores, 1 / sqrt(D) by default.
        causal: query i sees keys up to i + Sk - Sq.
        window_size: (left, right): query i sees keys i + Sk - Sq - left to i + Sk - Sq + right; -1: no bound. causal
            sets right to 0.
        softcap: scores become softcap * tanh(scores / softcap); 0 or less: they stay. Combines with dropout.
        alibi_slopes: (H,) or (B, H): -slope * |i + Sk - Sq - j| is added to the scores.
        deterministic: without effect: gradients always are.
        return_attn_probs: also return lse and the probabilities, a matrix of Sq x Sk for each head.
        backend: serve with this backend or raise BackendUnsupported.

    Returns:
        (B, Sq, H, Dv) in the dtype of q; with return_attn_probs a tuple of it, lse (B, H, Sq), float32, natural log,
        -inf where a query sees no key (flash-attention: +inf), differentiable, and S_dmask (B, H, Sq, Sk) in the dtype
        of the output: the normalised probabilities before dropout, negative where dropped; it has no gradient.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit. BackendUnsupported: see fastattn.dispatch.
    """
    if not q.ndim == k.ndim == v.ndim == 4 or not q.shape[0] == k.shape[0] == v.shape[0]:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        raise ValueError(f"flash_attn_func: q, k and v must be (B, S, H, D) with one B, got {shapes}")
    # Where both alignments are one, the plain one has the shorter way.
    square = not torch.compiler.is_compiling() and q.shape[1] == k.shape[1]
    query, key, value = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    seed = dropout_state(dropout_p, q.device) if return_attn_probs else None
    result = scaled_dot_product_attention(
        query, key, value, None, dropout_p, causal, softmax_scale, q.shape[2] != k.shape[2],
        causal_alignment="top_left" if square else "bottom_right", return_lse=return_attn_probs, seed=seed,
        window=window_size, softcap=cap_of(softcap), alibi_slopes=alibi_slopes, backend=backend,
    )  # fmt: skip
    if not return_attn_probs:
        return result.transpose(1, 2)
    output, lse = result
    with torch.no_grad():
        features = (*window_of(causal, window_size), cap_of(softcap), None, alibi_slopes, None, None, None)
        probabilities = reference.probabilities(
            0, query, key, None, seed, scale_of(q, softmax_scale), causal, True, dropout_p, *features
        )
    return output.transpose(1, 2), lse, probabilities.to(output.dtype)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str | None = None,
) -> Any:
    """flash_attn_func of keys and values in one tensor.

    Args: q: (B, Sq, H, D). kv: (B, Sk, 2, Hkv, D), read where it is. Others, result and errors: flash_attn_func.
    """
    k, v = unpacked("flash_attn_kvpacked_func", kv, "kv", 2, 5)
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                           return_attn_probs, backend=backend)  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str | None = None,
) -> Any:
    """flash_attn_func of queries, keys and values in one tensor.

    Args: qkv: (B, S, 3, H, D), read where it is. Others, result and errors: flash_attn_func.
    """
    q, k, v = unpacked("flash_attn_qkvpacked_func", qkv, "qkv", 3, 5)
    return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                           return_attn_probs, backend=backend)  # fmt: skip
