"""Forward and backward alone, for callers that have their own autograd around them: the functions with underscores of
flash_attn.flash_attn_interface, on which context parallelism is built (each pass is called with lse and output of all
parts of a sequence), and what torch's operators are served with (fastattn.integrations.sdpa).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.dispatch import Bound, Op, Problem, key_of
from fastattn.flash_attn.arguments import cap_of, dropout_state, scale_of, window_of
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
from fastattn.ops.attention.op import unit_last_stride
from fastattn.ops.attention.options import NO_WINDOW


class Passes(NamedTuple):
    """The two passes of one call: the kernels that serve it, and its arguments as the kernels take them.

    before, after: the tensors on either side of dropout's state, query, key and value first. options: what follows them
    in the forward; backward_options: in the backward.
    """

    bound: Bound
    problem: Callable[[], Problem]
    before: tuple[Tensor | None, ...]
    after: tuple[Tensor | None, ...]
    options: tuple[Any, ...]
    backward_options: tuple[Any, ...]

    def forward(self, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """(output, lse); state: of dropout, None without."""
        output, lse = self.bound.compute(*self.before, state, *self.after, *self.options)
        return output, lse

    def backward(self, grad: Tensor, output: Tensor, lse: Tensor, state: Tensor | None) -> Sequence[Tensor]:
        """Gradients of query, key and value for this output and lse: the forward's, or those of a softmax over more
        keys, of which these are a part."""
        assert self.bound.backward is not None
        grad, output, lse, grad_lse = unit_last_stride(grad), unit_last_stride(output), lse.contiguous(), None
        if self.bound.backend == "reference":
            grad, grad_lse, output, lse = self._of_the_part(grad, output, lse, state)
        else:
            lse = lse.to(accumulation_dtype(output.dtype))
        grads: Sequence[Tensor] = self.bound.backward(
            grad, grad_lse, *self.before, state, *self.after, output, lse, *self.backward_options
        )
        return grads[:3]

    def _of_the_part(
        self, grad: Tensor, output: Tensor, lse: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(grad, grad_lse, output, lse) of these keys alone, which have the gradients that are looked for.

        The definition in plain torch takes probabilities from the scores, and not from lse. With lse' and O' of these
        keys alone and P' their probabilities, those in the whole are c P', c = exp(lse' - lse), and
        dS = c P' * (dO V^T - rowsum(dO * O)) = P' * (c dO V^T - rowsum(c dO * O') + c rowsum(dO * (O' - O))).
        """
        own_output, own_lse = self.forward(state)
        # What is equal as far as it was written is equal: nothing is lost to lse of fewer bits, nor to -inf.
        same = own_lse.to(lse.dtype) == lse
        share = torch.where(same, 0.0, own_lse - lse).exp()
        grad_lse = share * self._statistics(rowsum(grad, own_output) - rowsum(grad, output))
        return grad * self._statistics(share).unsqueeze(-1), grad_lse, own_output, own_lse

    def _statistics(self, rows: Tensor) -> Tensor:
        """Numbers of all rows as lse has them, from their order in the output; and the other way round."""
        return rows.transpose(0, 1) if self.bound.op is VARLEN_OP else rows


def rowsum(grad: Tensor, output: Tensor) -> Tensor:
    """The sums of their products over the last dimension, in the dtype that attention accumulates in."""
    dtype = accumulation_dtype(output.dtype)
    return (grad.to(dtype) * output.to(dtype)).sum(-1)


def _chosen(op: Op, key: Any, function: Any, *args: Any, **kwargs: Any) -> tuple[Bound, Callable[[], Problem]]:
    def problem() -> Problem:
        with torch.autocast(args[0].device.type, enabled=False):  # who calls passes has cast already
            described: Problem = function.prepare(*args, **kwargs)[1]
        return described

    return op.resolve_cached(("passes", *key), problem, None), problem


def dense_passes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, dropout_p: float,
    is_causal: bool, bottom_right: bool, window: tuple[int, int] = NO_WINDOW, softcap: float = 0.0,
    slopes: Tensor | None = None,
) -> Passes:  # fmt: skip
    """Of (B, H, S, D) tensors; ValueError for what is no attention problem."""
    call = {
        "enable_gqa": True, "causal_alignment": "bottom_right" if bottom_right else "top_left", "window": window,
        "softcap": softcap, "alibi_slopes": slopes,
    }  # fmt: skip
    signature = (
        *map(key_of, (query, key, value, mask, slopes)), dropout_p > 0.0, is_causal, bottom_right, window, softcap,
    )  # fmt: skip
    chosen = _chosen(OP, signature, scaled_dot_product_attention, query, key, value, mask, dropout_p, is_causal, **call)
    options = (scale_of(query, scale), is_causal, bottom_right, dropout_p)
    features: tuple[Any, ...] = ()
    if window != NO_WINDOW or softcap > 0.0 or slopes is not None:
        features = (*window, softcap, None, slopes, None, None, None)
    before = (unit_last_stride(query), unit_last_stride(key), unit_last_stride(value), mask)
    return Passes(*chosen, before, (), (*options, *features), (*options, False, *features))


def packed_passes(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, seqused_k: Tensor | None,
    max_q: int, max_k: int, scale: float | None, dropout_p: float, window: tuple[int, int], softcap: float = 0.0,
    slopes: Tensor | None = None,
) -> Passes:  # fmt: skip
    """Of packed (T, H, D) tensors; ValueError for what is no problem of packed sequences."""
    signature = (
        *map(key_of, (query, key, value, cu_seq_q, cu_seq_k, seqused_k, slopes)), dropout_p > 0.0, window, softcap,
    )  # fmt: skip
    chosen = _chosen(
        VARLEN_OP, signature, attention_varlen, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
        window_size=window, enable_gqa=True, seqused_k=seqused_k, softcap=softcap, alibi_slopes=slopes,
        dropout_p=dropout_p,
    )  # fmt: skip
    options = (scale_of(query, scale), max_q, max_k, *window, softcap, dropout_p)
    before = (unit_last_stride(query), unit_last_stride(key), unit_last_stride(value), cu_seq_q, cu_seq_k, seqused_k)
    return Passes(*chosen, before, (None, slopes), options, options)


def _state_or_zeros(state: Tensor | None, q: Tensor) -> Tensor:
    return torch.zeros(2, dtype=torch.int64, device=q.device) if state is None else state


def _written(grads: Sequence[Tensor], places: tuple[Tensor | None, ...]) -> None:
    for grad, place in zip(grads, places, strict=True):
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
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))
    window = window_of(causal, (window_size_left, window_size_right))
    passes = dense_passes(
        query, key, value, None, softmax_scale, dropout_p, causal, True, window, cap_of(softcap), alibi_slopes
    )
    state = dropout_state(dropout_p, q.device)
    output, lse = passes.forward(state)
    shown = q.new_empty(0)
    if return_softmax:
        shown = reference.probabilities(0, query, key, None, state, *passes.options)
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

    Returns softmax_d, (B, H, Sq): the sums of dout * out.
    """
    query, key, value, output, grad = (t.transpose(1, 2) for t in (q, k, v, out, dout))
    window = window_of(causal, (window_size_left, window_size_right))
    passes = dense_passes(
        query, key, value, None, softmax_scale, dropout_p, causal, True, window, cap_of(softcap), alibi_slopes
    )
    grads = passes.backward(grad, output, softmax_lse, rng_state if dropout_p > 0.0 else None)
    _written([g.transpose(1, 2) for g in grads], (dq, dk, dv))
    return rowsum(grad, output)


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
    if block_table is not None:
        lengths = cu_seqlens_k.diff() if seqused_k is None else seqused_k
        k, v, cu_seqlens_k, seqused_k, max_seqlen_k = gathered_pages(
            "_flash_attn_varlen_forward", k, v, lengths, max_seqlen_k, block_table
        )
    bounds = (cu_seqlens_q, cu_seqlens_k, seqused_k)
    window = window_of(causal, (window_size_left, window_size_right))
    passes = packed_passes(
        q, k, v, *bounds, max_seqlen_q, max_seqlen_k, softmax_scale, dropout_p, window, cap_of(softcap), alibi_slopes
    )
    state = dropout_state(dropout_p, q.device)
    output, lse = passes.forward(state)
    shown = q.new_empty(0)
    if return_softmax:
        shown = varlen_reference.probabilities(q, k, *bounds, state, alibi_slopes, *passes.options)
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
    window = window_of(causal, (window_size_left, window_size_right))
    passes = packed_passes(
        q, k, v, cu_seqlens_q, cu_seqlens_k, None, max_seqlen_q, max_seqlen_k, softmax_scale, dropout_p, window,
        cap_of(softcap), alibi_slopes,
    )  # fmt: skip
    _written(passes.backward(dout, out, softmax_lse, rng_state if dropout_p > 0.0 else None), (dq, dk, dv))
    return rowsum(dout, out).transpose(0, 1)


_wrapped_flash_attn_forward, _wrapped_flash_attn_backward = _flash_attn_forward, _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward
