"""Attention of a few queries over a cache: the public function, the op's contract, and what is validated first.

    output = softmax(softcap(scale * Q K^T) + bias) V       over the slots of the cache that hold the sequence

Split over the keys as in flash-decoding (Dao, Haziza, Massa, Sizov 2023), combined in a fixed order. Shapes are named
B batch, H query heads, Hkv heads of the cache, Sq queries, D head dim, Dv value dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import Op, Problem, check_size, key_of
from fastattn.numerics import FLOATING, accumulation_dtype

MAX_LENGTH = 2**31 - 1
MAX_SCALE = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class DecodeProblem(Problem):
    batch: int
    heads: int
    kv_heads: int
    queries: int
    slots: int
    head_dim: int
    value_dim: int
    paged: bool


def _forward_fake(query: Tensor, key_cache: Tensor, value_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _dim = query.shape
    output = query.new_empty((batch, queries, heads, value_cache.shape[3]))
    return output, query.new_empty((batch, heads, queries), dtype=accumulation_dtype(query.dtype))


def _flops(query: Any, key_cache: Any, value_cache: Any, seqlens: Any, leftpad: Any, batch_idx: Any, table: Any,
           *_: Any) -> int:  # fmt: skip
    """Of a full cache: how much of it is filled stands in a tensor."""
    batch, queries, heads, dim = query
    slots = key_cache[1] * (table[1] if table is not None else 1)
    return 2 * batch * queries * heads * slots * (dim + value_cache[3])


OP = Op(
    "decode",
    forward_schema=(
        "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor? cache_seqlens, Tensor? cache_leftpad,"
        " Tensor? cache_batch_idx, Tensor? block_table, Tensor? alibi_slopes, int appended, float scale,"
        " int window_left, int window_right, float softcap, int num_splits) -> (Tensor output, Tensor lse)"
    ),
    forward_fake=_forward_fake,
    forward_flops=_flops,
    instead="it is for inference; use scaled_dot_product_attention",
)


def check_dtypes(query: Tensor, **others: Tensor | None) -> None:
    """ValueError unless all tensors have the query's dtype and device."""
    if query.dtype not in FLOATING:
        raise ValueError(f"decode: dtype {query.dtype} is not one of float32, bfloat16, float16, float64")
    for name, tensor in others.items():
        if tensor is not None and (tensor.dtype != query.dtype or tensor.device != query.device):
            raise ValueError(
                f"decode: {name} must have the query's dtype and device, got query {query.dtype} on {query.device},"
                f" {name} {tensor.dtype} on {tensor.device}"
            )


def _check_index(name: str, tensor: Tensor | None, query: Tensor) -> None:
    """One integer for each sequence; which integers, the kernels look."""
    if tensor is None:
        return
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.shape != query.shape[:1]:
        raise ValueError(
            f"decode: {name} must be int32 or int64 of shape ({query.shape[0]},), got {tensor.dtype}"
            f" {tuple(tensor.shape)}"
        )
    if tensor.device != query.device:
        raise ValueError(f"decode: {name} is on {tensor.device}, query on {query.device}")


def _check(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    indices: dict[str, Tensor | None],
) -> None:
    check_dtypes(query, key_cache=key_cache, value_cache=value_cache)
    if query.ndim != 4 or key_cache.ndim != 4 or value_cache.ndim != 4:
        raise ValueError(
            "decode: query is (B, Sq, H, D), the caches are (rows or pages, slots, Hkv, D), got"
            f" {query.ndim}, {key_cache.ndim} and {value_cache.ndim} dimensions"
        )
    batch, queries, heads, dim = query.shape
    rows, slots, kv_heads, _ = key_cache.shape
    if value_cache.shape[:3] != key_cache.shape[:3]:
        raise ValueError(
            "decode: key_cache and value_cache must have the same rows, slots and heads, got"
            f" {tuple(key_cache.shape)} and {tuple(value_cache.shape)}"
        )
    if key_cache.shape[3] != dim:
        raise ValueError(f"decode: query and key_cache must have one head dim, got {dim} and {key_cache.shape[3]}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"decode: the query heads ({heads}) must be a multiple of the cache's heads ({kv_heads})")
    for name, tensor in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        if tensor.stride(3) != 1 and tensor.shape[3] > 1:
            raise ValueError(f"decode: {name} must have a last stride of 1, got strides {tensor.stride()}")
    if not torch.compiler.is_compiling() and max(queries, slots, batch * heads) > MAX_LENGTH:
        raise ValueError(
            f"decode: queries, slots and batch * heads must not exceed {MAX_LENGTH}, got {queries}, {slots},"
            f" {batch} * {heads}"
        )
    check_size("decode", "an output", (batch, queries, heads, value_cache.shape[3]))
    for name, index in indices.items():
        _check_index(name, index, query)
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ValueError("decode: a paged cache has a block_table and no cache_batch_idx")
        if block_table.dtype != torch.int32 or block_table.ndim != 2 or block_table.shape[0] != batch:
            raise ValueError(
                f"decode: block_table must be int32 of shape ({batch}, pages), got {block_table.dtype}"
                f" {tuple(block_table.shape)}"
            )
        if block_table.device != query.device:
            raise ValueError(f"decode: block_table is on {block_table.device}, query on {query.device}")
        if slots == 0:
            raise ValueError("decode: a page must have at least one slot, got 0")
    elif cache_batch_idx is None and rows != batch:
        raise ValueError(
            f"decode: a cache of {rows} rows for a batch of {batch} needs cache_batch_idx or a block_table"
        )
    if alibi_slopes is not None and (
        alibi_slopes.dtype != torch.float32
        or tuple(alibi_slopes.shape) not in ((heads,), (batch, heads))
        or alibi_slopes.device != query.device
    ):
        raise ValueError(
            f"decode: alibi_slopes must be float32 of shape ({heads},) or ({batch}, {heads}) on {query.device}, got"
            f" {alibi_slopes.dtype} {tuple(alibi_slopes.shape)} on {alibi_slopes.device}"
        )


def _check_values(scale: float, window: tuple[int, int], softcap: float, num_splits: int) -> None:
    if not -MAX_SCALE <= scale <= MAX_SCALE:  # also refuses NaN
        raise ValueError(f"decode: scale must be finite (in float32), got {scale}")
    if not 0.0 <= softcap <= MAX_SCALE:
        raise ValueError(f"decode: softcap must be 0 (none) or more and finite, got {softcap}")
    if len(window) != 2 or min(window) < -1:
        raise ValueError(f"decode: window must be two lengths, -1 for unbounded, got {window}")
    if num_splits < 0:
        raise ValueError(f"decode: num_splits must be 0 (automatic) or more, got {num_splits}")


def _strided(tensor: Tensor) -> Any:
    """What is checked of a tensor whose columns are adjacent."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.shape[-1:] == (1,) or tensor.stride()[-1:]


class Call:
    """A validated call, bound to its backend; `run` may be given keys that were appended meanwhile."""

    def __init__(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cache_seqlens: Tensor | None,
        cache_leftpad: Tensor | None,
        cache_batch_idx: Tensor | None,
        block_table: Tensor | None,
        scale: float | None,
        causal: bool,
        window: tuple[int, int],
        softcap: float,
        alibi_slopes: Tensor | None,
        num_splits: int,
        backend: str | None,
    ) -> None:
        default = 1.0 / math.sqrt(query.shape[-1]) if query.ndim > 0 and query.shape[-1] > 0 else 0.0
        scale = default if scale is None else float(scale)
        _check_values(scale, window, softcap, num_splits)
        self.caches = (key_cache, value_cache)
        self.indices = (cache_seqlens, cache_leftpad, cache_batch_idx, block_table)
        self.slopes = alibi_slopes
        self.options = (scale, window[0], 0 if causal else window[1], softcap, num_splits)

        def problem() -> DecodeProblem:
            indices = {
                "cache_seqlens": cache_seqlens, "cache_leftpad": cache_leftpad, "cache_batch_idx": cache_batch_idx,
            }  # fmt: skip
            _check(query, key_cache, value_cache, cache_batch_idx, block_table, alibi_slopes, indices)
            return DecodeProblem(
                device=query.device.type,
                dtype=query.dtype,
                batch=query.shape[0],
                heads=query.shape[2],
                kv_heads=key_cache.shape[2],
                queries=query.shape[1],
                slots=key_cache.shape[1],
                head_dim=query.shape[3],
                value_dim=value_cache.shape[3],
                paged=block_table is not None,
            )

        self.problem = problem
        if torch.compiler.is_compiling():
            self.bound = OP.resolve(problem(), backend)
            self._compute = self.bound.public
        else:
            signature = (
                _strided(query), _strided(key_cache), _strided(value_cache),
                *map(key_of, (cache_seqlens, cache_leftpad, cache_batch_idx, block_table, alibi_slopes)),
            )  # fmt: skip
            self.bound = OP.resolve_cached(signature, problem, backend)
            self._compute = self.bound.run

    def run(self, query: Tensor, appended: int = 0) -> tuple[Tensor, Tensor]:
        """(output, lse)"""
        return self._compute(query, *self.caches, *self.indices, self.slopes, appended, *self.options)


def _plain(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    indices: tuple[Tensor | None, ...],
    causal: bool,
    return_lse: bool,
) -> Any:
    """The result of the commonest call, where overhead counts; None for others."""
    if not (
        type(query) is type(key_cache) is type(value_cache) is Tensor and query.is_cpu and key_cache.is_cpu
        and value_cache.is_cpu and query.ndim == key_cache.ndim == 4
    ):  # fmt: skip
        return None
    for index in indices:
        if index is not None and not (type(index) is Tensor and index.is_cpu):
            return None
    dim = query.shape[3]
    if dim == 0 or key_cache.shape[2] == 0:
        return None
    scale = 1.0 / math.sqrt(dim)
    return OP.attempt(
        query, key_cache, value_cache, *indices, None, 0, scale, -1, 0 if causal else -1, 0.0, 0,
        visible=not return_lse,
    )  # fmt: skip


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    *,
    cache_leftpad: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention of the last queries of every sequence over the keys and values in a cache, which is only read.

    The keys of sequence b are slots cache_leftpad[b] to cache_seqlens[b] - 1 of its row of the cache or of its pages;
    the last query stands beside the last key (bottom-right alignment).

    Args:
        query: (B, Sq, H, D), float32, bfloat16, float16 or float64; the last stride is 1.
        key_cache: (rows, slots, Hkv, D), or (pages, page size, Hkv, D) with a block_table; any strides but the last.
            Hkv divides H: query head h reads head h // (H / Hkv).
        value_cache: (rows, slots, Hkv, Dv).
        cache_seqlens: (B,) int32 or int64, where every sequence ends; all slots by default.
        cache_leftpad: (B,) slots at the beginning that are padding.
        cache_batch_idx: (B,) the cache row of every sequence; b by default.
        block_table: (B, n) int32, the pages of every sequence, of any size; those behind its end are not looked at.
        scale: factor of the scores, 1 / sqrt(D) by default.
        causal: keys behind a query's own position are not visible.
        window: keys more than window[0] before or window[1] behind a query's position are not visible; -1: no limit.
        softcap: scores become softcap * tanh(scores / softcap); 0: they stay.
        alibi_slopes: (H,) or (B, H) float32: score - slope * |query position - key position| (Press et al. 2022).
        num_splits: into how many parts the keys of the longest sequence are cut; 0: by a fixed length, so that a
            sequence's result does not depend on its neighbours in the batch.
        return_lse: also return the log-sum-exp of the scores.
        backend: serve with this backend or raise BackendUnsupported.

    Returns:
        (B, Sq, H, Dv) in the query's dtype; with return_lse a tuple of it and lse (B, H, Sq), natural log, float32
        (float64 for float64). A query that sees no key has output 0 and lse -inf. There are no gradients.

    Raises:
        ValueError: shapes, dtypes, strides or options that do not fit. RuntimeError: an index or a length that reaches
        outside of the cache, by name and value; not on a GPU (docs/inference.md). BackendUnsupported: see
        fastattn.dispatch.
    """
    if (
        scale is None and window == (-1, -1) and softcap == 0.0 and alibi_slopes is None and num_splits == 0
        and backend is None and not torch.compiler.is_compiling()
    ):  # fmt: skip
        indices = (cache_seqlens, cache_leftpad, cache_batch_idx, block_table)
        plain = _plain(query, key_cache, value_cache, indices, causal, return_lse)
        if plain is not None:
            return plain
    call = Call(
        query, key_cache, value_cache, cache_seqlens, cache_leftpad, cache_batch_idx, block_table, scale, causal,
        window, softcap, alibi_slopes, num_splits, backend,
    )  # fmt: skip
    output, lse = call.run(query)
    return (output, lse) if return_lse else output


def _prepare(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    *,
    cache_leftpad: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    **_: Any,
) -> tuple[Op, DecodeProblem]:
    call = Call(
        query, key_cache, value_cache, cache_seqlens, cache_leftpad, cache_batch_idx, block_table, scale, causal,
        window, softcap, alibi_slopes, num_splits, "reference",
    )  # fmt: skip
    return OP, call.problem()


decode_attention.prepare = _prepare  # type: ignore[attr-defined]
