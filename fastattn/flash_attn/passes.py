"""Forward and backward alone, for callers that have their own autograd around them: the functions with underscores of
flash_attn.flash_attn_interface, on which context parallelism is built (each pass is called with lse and output of all
parts of a sequence), and what torch's operators are served with (fastattn.integrations.sdpa).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import philox
from fastattn.dispatch import BackendUnsupported, Bound, Op, Problem
from fastattn.flash_attn.dense import cap_of, limits
from fastattn.flash_attn.varlen import gathered_pages
from fastattn.numerics import accumulation_dtype
from fastattn.ops.attention import (
    OP,
    VARLEN_OP,
    attention_varlen,
    reference,
    scaled_dot_product_attention,
    varlen_reference,
)


class Kernels(NamedTuple):
    """The kernels that serve a call, and what was asked for; `bound.compute` and `bound.backward` run them."""

    bound: Bound
    problem: Callable[[], Problem]


def _chosen(op: Op, key: Any, function: Any, *args: Any, **kwargs: Any) -> Kernels:
    def problem() -> Problem:
        with torch.autocast(args[0].device.type, enabled=False):  # who calls passes has cast already
            described: Problem = function.prepare(*args, **kwargs)[1]
        return described

    return Kernels(op.resolve_cached(("passes", *key), problem, None), problem)


def _described(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else (t.shape, t.dtype, t.device) for t in tensors)


def dense_kernels(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool,
    bottom_right: bool, window: tuple[int, int] = (-1, -1), softcap: float = 0.0, slopes: Tensor | None = None,
) -> Kernels:  # fmt: skip
    """Of (B, H, S, D) tensors; ValueError for what is no attention problem."""
    call = {
        "enable_gqa": True, "causal_alignment": "bottom_right" if bottom_right else "top_left", "window": window,
        "softcap": softcap, "alibi_slopes": slopes,
    }  # fmt: skip
    signature = (
        *_described(query, key, value, mask, slopes), dropout_p > 0.0, is_causal, bottom_right, window, softcap,
    )  # fmt: skip
    return _chosen(
        OP, signature, scaled_dot_product_attention, query, key, value, mask, dropout_p, is_causal, **call
    )  # fmt: skip


def packed_kernels(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, seqused_k: Tensor | None,
    max_q: int, max_k: int, dropout_p: float, window: tuple[int, int], softcap: float, slopes: Tensor | None,
) -> Kernels:  # fmt: skip
    """Of packed (T, H, D) tensors; ValueError for what is no problem of packed sequences."""
    signature = (
        *_described(query, key, value, cu_seq_q, cu_seq_k, seqused_k, slopes), dropout_p > 0.0, window, softcap,
    )  # fmt: skip
    return _chosen(
        VARLEN_OP, signature, attention_varlen, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
        window_size=window, enable_gqa=True, seqused_k=seqused_k, softcap=softcap, alibi_slopes=slopes,
        dropout_p=dropout_p,
    )  # fmt: skip


def unit(tensor: Tensor) -> Tensor:
    """As kernels take it: with a last stride of 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _state(dropout_p: float, device: torch.device) -> Tensor | None:
    return philox.draw(device) if dropout_p > 0.0 else None


def _state_or_zeros(state: Tensor | None, q: Tensor) -> Tensor:
    return torch.zeros(2, dtype=torch.int64, device=q.device) if state is None else state


def _fused(kernels: Kernels, name: str) -> Any:
    """The backward; the definition in plain torch takes no part of its result from out and lse, as callers rely on."""
    bound = kernels.bound
    if bound.backend == "reference":
        reasons = "; ".join(f"{n}: {why}" for n, why in bound.op.reasons(kernels.problem()).items() if why is not None)
        raise BackendUnsupported(f"{name}: needs a fused kernel, which none is here: {reasons}")
    return bound.backward


def _written(grads: Any, places: tuple[Tensor | None, ...]) -> None:
    for grad, place in zip(grads, places, strict=False):
        if place is not None:
            place.copy_(grad)


@torch.no_grad()
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward of flash_attn_func: (out, softmax_lse, S_dmask, rng_state), nothing recorded.

    S_dmask: without elements unless return_softmax. rng_state: int64 (2,), for the backward.
    """
    window, cap = limits(causal, (window_size_left, window_size_right)), cap_of(softcap)
    query, key, value = (unit(t.transpose(1, 2)) for t in (q, k, v))
    kernels = dense_kernels(query, key, value, None, dropout_p, causal, True, window, cap, alibi_slopes)
    state = _state(dropout_p, q.device)
    options = (None, state, softmax_scale, causal, True, dropout_p, *window, cap, None, alibi_slopes, None, None, None)
    output, lse = kernels.bound.compute(query, key, value, *options)
    shown = q.new_empty(0)
    if return_softmax:
        shown = reference.probabilities(0, query, key, *options)
    return output.transpose(1, 2), lse, shown, _state_or_zeros(state, q)


@torch.no_grad()
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """The backward of flash_attn_func for the given out and softmax_lse, **written to** dq, dk and dv.

    Returns softmax_d, (B, H, Sq): the sums of dout * out. Raises BackendUnsupported where only the definition could
    serve (float64).
    """
    window, cap = limits(causal, (window_size_left, window_size_right)), cap_of(softcap)
    query, key, value, output, grad = (unit(t.transpose(1, 2)) for t in (q, k, v, out, dout))
    kernels = dense_kernels(query, key, value, None, dropout_p, causal, True, window, cap, alibi_slopes)
    grads = _fused(kernels, "_flash_attn_backward")(
        grad, None, query, key, value, None, rng_state if dropout_p > 0.0 else None, output, softmax_lse.contiguous(),
        softmax_scale, causal, True, dropout_p, False, *window, cap, None, alibi_slopes, None, None, None,
    )  # fmt: skip
    _written([g.transpose(1, 2) for g in grads[:3]], (dq, dk, dv))
    return (grad.float() * output.float()).sum(-1)


@torch.no_grad()
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward of flash_attn_varlen_func, likewise; ValueError for leftpad_k, which packed sequences do not need.

    zero_tensors: without effect, rows of no sequence are always 0. num_splits: without effect on results.
    """
    if leftpad_k is not None:
        raise ValueError("_flash_attn_varlen_forward: leftpad_k is for caches: see flash_attn_with_kvcache")
    window, cap = limits(causal, (window_size_left, window_size_right)), cap_of(softcap)
    if block_table is not None:
        lengths = cu_seqlens_k.diff() if seqused_k is None else seqused_k
        k, v, cu_seqlens_k, seqused_k, max_seqlen_k = gathered_pages(
            "_flash_attn_varlen_forward", k, v, lengths, max_seqlen_k, block_table
        )
    q, k, v = unit(q), unit(k), unit(v)
    bounds = (cu_seqlens_q, cu_seqlens_k, seqused_k)
    kernels = packed_kernels(q, k, v, *bounds, max_seqlen_q, max_seqlen_k, dropout_p, window, cap, alibi_slopes)
    state = _state(dropout_p, q.device)
    options: Any = (softmax_scale, max_seqlen_q, max_seqlen_k, *window, cap, dropout_p)
    output, lse = kernels.bound.compute(q, k, v, *bounds, state, None, alibi_slopes, *options)
    shown = q.new_empty(0)
    if return_softmax:
        shown = varlen_reference.probabilities(q, k, *bounds, state, alibi_slopes, *options)
    return output, lse, shown, _state_or_zeros(state, q)


@torch.no_grad()
def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """The backward of flash_attn_varlen_func, likewise; returns softmax_d, (H, Tq)."""
    window, cap = limits(causal, (window_size_left, window_size_right)), cap_of(softcap)
    q, k, v, out, dout = (unit(t) for t in (q, k, v, out, dout))
    kernels = packed_kernels(
        q, k, v, cu_seqlens_q, cu_seqlens_k, None, max_seqlen_q, max_seqlen_k, dropout_p, window, cap, alibi_slopes
    )
    grads = _fused(kernels, "_flash_attn_varlen_backward")(
        dout, None, q, k, v, cu_seqlens_q, cu_seqlens_k, None, rng_state if dropout_p > 0.0 else None, None,
        alibi_slopes, out, softmax_lse.to(accumulation_dtype(q.dtype)).contiguous(), softmax_scale, max_seqlen_q,
        max_seqlen_k, *window, cap, dropout_p,
    )  # fmt: skip
    _written(grads[:3], (dq, dk, dv))
    return (dout.float() * out.float()).sum(-1).transpose(0, 1)


_wrapped_flash_attn_forward, _wrapped_flash_attn_backward = _flash_attn_forward, _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward
