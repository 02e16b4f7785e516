"""flash_attn_varlen_func and its packed forms: rows of many sequences one behind the other, (T, H, D), or in pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.flash_attn.arguments import cap_of, dropout_state, scale_of, unpacked, window_of
from fastattn.ops.attention import attention_varlen, varlen_reference
from fastattn.ops.attention.options import AuxRequest

NAME = "flash_attn_varlen_func"


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Any:
    """Attention within each of many packed sequences; a sequence's last query stands beside its last key.

    Args:
        q: (Tq, H, D), float32, bfloat16, float16 or float64. k: (Tk, Hkv, D), v: (Tk, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (N + 1,) int32 or int64: where sequences start and end.
        max_seqlen_q, max_seqlen_k: at least the lengths of the longest sequences.
        alibi_slopes: (H,) or (N, H).
        block_table: (N, n) int32: k and v are (pages, page size, Hkv, ...) then, and key j of sequence i is in page
            block_table[i, j // page size]. Pages have any size, and gradients. They are gathered: one copy of the
            keys and values of N sequences of max_seqlen_k. Entries behind the end of a sequence are not looked at.
        Others: as for flash_attn_func.

    Returns:
        (Tq, H, Dv) in the dtype of q; with return_attn_probs a tuple of it, lse (H, Tq), and S_dmask (N, H,
        max_seqlen_q, max_seqlen_k), each as flash_attn_func's; S_dmask is 0 beyond a sequence's queries and keys.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit. RuntimeError: values of cu_seqlens_q,
        cu_seqlens_k or block_table that do not (on a GPU see docs/inference.md). BackendUnsupported: see
        fastattn.dispatch.
    """
    window, cap = window_of(causal, window_size), cap_of(softcap)
    used, room = None, max_seqlen_k
    if block_table is not None:
        _check_bounds(cu_seqlens_k, block_table)
        lengths = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
        k, v, cu_seqlens_k, used, room = gathered_pages(NAME, k, v, lengths, max_seqlen_k, block_table)
    seed = dropout_state(dropout_p, q.device) if return_attn_probs else None
    result = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, room, return_aux=AuxRequest(return_attn_probs),
        scale=softmax_scale, window_size=window, enable_gqa=True, seqused_k=used, softcap=cap,
        alibi_slopes=alibi_slopes, dropout_p=dropout_p, seed=seed, backend=backend,
    )  # fmt: skip
    if not return_attn_probs:
        return result
    output, lse = result
    with torch.no_grad():
        probabilities = varlen_reference.probabilities(
            q, k, cu_seqlens_q, cu_seqlens_k, used, seed, alibi_slopes, scale_of(q, softmax_scale), max_seqlen_q,
            room, *window, cap, dropout_p,
        )  # fmt: skip
    if room < max_seqlen_k:
        probabilities = torch.nn.functional.pad(probabilities, (0, max_seqlen_k - room))
    return output, lse, probabilities.to(output.dtype)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
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
    """flash_attn_varlen_func of keys and values in one tensor.

    Args: q: (Tq, H, D). kv: (Tk, 2, Hkv, D), read where it is. Others, result and errors: flash_attn_varlen_func.
    """
    k, v = unpacked("flash_attn_varlen_kvpacked_func", kv, "kv", 2, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs, backend=backend,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
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
    """flash_attn_varlen_func of queries, keys and values in one tensor.

    Args: qkv: (T, 3, H, D), read where it is. cu_seqlens: (N + 1,). max_seqlen: of queries and keys. Others, result
    and errors: flash_attn_varlen_func.
    """
    q, k, v = unpacked("flash_attn_varlen_qkvpacked_func", qkv, "qkv", 3, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs, backend=backend,
    )  # fmt: skip


def gathered_pages(
    name: str, k: Tensor, v: Tensor, lengths: Tensor, max_seqlen_k: int, block_table: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Keys and values of all sequences, each with room for the longest: (rows, rows, bounds, lengths, room).

    name: whose arguments these are, for errors. lengths: (N,) keys of the sequences. The room and not the lengths is
    what decides sizes: no length has to come back from a GPU.
    """
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or k.shape[1] == 0:
        raise ValueError(
            f"{name}: with a block_table k and v must be (pages, page size, Hkv, D), alike but for D, got"
            f" {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if block_table.dtype != torch.int32 or block_table.ndim != 2 or block_table.device != k.device:
        raise ValueError(
            f"{name}: block_table must be int32 (N, n) on {k.device}, got {block_table.dtype}"
            f" {tuple(block_table.shape)} on {block_table.device}"
        )
    pages, size = k.shape[:2]
    sequences, columns = block_table.shape
    room = min(max_seqlen_k, columns * size)
    slot = torch.arange(room, device=k.device)
    there = slot < lengths[:, None]
    page = torch.where(there, block_table[:, slot // size], 0)
    if page.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_pages(name, page, pages, size)
    rows = (page * size + slot % size).flatten()
    bounds = torch.arange(sequences + 1, device=k.device, dtype=lengths.dtype) * room
    return k.flatten(0, 1)[rows], v.flatten(0, 1)[rows], bounds, lengths, room


def _check_bounds(cu_seqlens_k: Tensor, block_table: Tensor) -> None:
    if cu_seqlens_k.ndim != 1 or (block_table.ndim == 2 and cu_seqlens_k.shape[0] != block_table.shape[0] + 1):
        raise ValueError(
            f"{NAME}: cu_seqlens_k must have shape ({block_table.shape[0] + 1},) with a block_table of"
            f" {block_table.shape[0]} rows, got {tuple(cu_seqlens_k.shape)}"
        )


def _check_pages(name: str, page: Tensor, pages: int, size: int) -> None:
    """RuntimeError for a page that does not exist, of the slots of all sequences."""
    wrong = ((page < 0) | (page >= pages)).nonzero()
    if wrong.shape[0] > 0:
        b, slot = wrong[0].tolist()
        raise RuntimeError(
            f"{name}: block_table[{b}, {slot // size}] = {int(page[b, slot])} is not in [0, {pages}), the pages of k"
        )
