"""Attention of packed sequences: the op of attention where the rows of many sequences lie one behind the other.

T rows of all sequences together, H heads, D head dim; N sequences, of which i has the query rows
cu_seq_q[i] .. cu_seq_q[i + 1] and the key rows cu_seq_k[i] .. cu_seq_k[i + 1]. Nothing is padded or copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import philox as philox_mask
from fastattn.dispatch import Op, Problem, autocast_enabled, check_size
from fastattn.numerics import FLOATING, accumulation_dtype
from fastattn.ops.attention.options import (
    MAX_LENGTH,
    MAX_SCALE,
    NO_WINDOW,
    check_heads,
    check_softcap,
    check_window,
)

NAME = "attention_varlen"


@dataclass(frozen=True)
class VarlenProblem(Problem):
    sequences: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    window: tuple[int, int]
    softcap: bool
    alibi: bool
    sinks: bool
    dropout: bool


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, heads, _dim = query.shape
    return (
        query.new_empty((rows, heads, value.shape[2])),
        query.new_empty((heads, rows), dtype=accumulation_dtype(query.dtype)),
    )


def _backward_fake(
    grad_output: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    sinks = rest[4]
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        query.new_empty((0,), dtype=torch.float32) if sinks is None else sinks.new_empty(sinks.shape),
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.options = inputs[TENSORS:]
    ctx.save_for_backward(*inputs[:TENSORS], *output)
    ctx.set_materialize_grads(False)


def _backward(kernel: Any, ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *tensors, output, lse = ctx.saved_tensors
    nothing = (None,) * (TENSORS + len(ctx.options))
    if grad_output is None:
        if grad_lse is None:
            return nothing
        grad_output = torch.zeros_like(output)
    elif grad_output.stride(-1) != 1 and grad_output.shape[-1] != 1:
        grad_output = grad_output.contiguous()
    grads = kernel(grad_output, grad_lse, *tensors, output, lse, *ctx.options)
    grad_sinks = None if tensors[SINKS] is None else grads[3]
    return (*grads[:3], *nothing[3:SINKS], grad_sinks, *nothing[SINKS + 1 :])


#: How many tensors the schema starts with, and which of them are the sinks.
TENSORS, SINKS = 9, 7
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor cu_seq_k, Tensor? seqused_k, Tensor? philox,"
    " Tensor? sinks, Tensor? alibi_slopes, {}float scale, SymInt max_q, SymInt max_k, int window_left,"
    " int window_right, float softcap, float dropout_p"
)


def _most_pairs(query: tuple[int, ...], max_k: int) -> int:
    return query[0] * query[1] * max_k


def _forward_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *rest: Any) -> int:
    """Two products of every query with max_k keys: a formula sees shapes, and no cu_seqlens."""
    return 2 * _most_pairs(query, rest[8]) * (query[2] + value[2])


def _backward_flops(
    grad_output: Any, grad_lse: Any, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *rest: Any
) -> int:
    return 2 * _most_pairs(query, rest[10]) * (3 * query[2] + 2 * value[2])


OP = Op(
    NAME,
    forward_schema=f"({_ARGUMENTS.format('')}) -> (Tensor output, Tensor lse)",
    backward_schema=(
        f"(Tensor grad_output, Tensor? grad_lse, {_ARGUMENTS.format('Tensor output, Tensor lse, ')})"
        " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_sinks)"
    ),
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    forward_flops=_forward_flops,
    backward_flops=_backward_flops,
)


def sequences_of(
    query: Tensor, key: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, seqused_k: Tensor | None, max_q: int, max_k: int
) -> list[tuple[int, int, int, int]]:
    """(first query, end of queries, first key, end of keys) of every sequence; RuntimeError, in the words of the native
    kernels, for bounds that decrease, lie outside of the rows or exceed max_q and max_k."""
    bounds = []
    for name, tensor, rows in (("cu_seq_q", cu_seq_q, query.shape[0]), ("cu_seq_k", cu_seq_k, key.shape[0])):
        numbers = tensor.tolist()
        for i, number in enumerate(numbers):
            if not 0 <= number <= rows:
                raise RuntimeError(f"{NAME}: {name} must be in [0, {rows}], got {number} at {i}")
            if i > 0 and number < numbers[i - 1]:
                raise RuntimeError(f"{NAME}: {name} must not decrease, got {number} at {i} after {numbers[i - 1]}")
        bounds.append(numbers)
    used = None if seqused_k is None else seqused_k.tolist()
    found = []
    for i, (q0, q1, k0, k1) in enumerate(zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:], strict=False)):
        room, end = k1 - k0, k1
        if used is not None:
            if not 0 <= used[i] <= room:
                raise RuntimeError(f"{NAME}: seqused_k must be in [0, {room}], got {used[i]} at {i}")
            end = k0 + used[i]
        if q1 - q0 > max_q:
            raise RuntimeError(f"{NAME}: sequence {i} has {q1 - q0} queries, more than max_q, {max_q}")
        if room > max_k:
            raise RuntimeError(f"{NAME}: sequence {i} has {room} keys, more than max_k, {max_k}")
        found.append((q0, q1, k0, end))
    return found


def _check(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, seqused_k: Tensor | None,
    enable_gqa: bool,
) -> None:  # fmt: skip
    """ValueError for anything that is not a problem of packed sequences."""
    if not query.ndim == key.ndim == value.ndim == 3:
        raise ValueError(
            f"{NAME}: query, key and value are (T, H, D), got {query.ndim}, {key.ndim} and {value.ndim} dimensions"
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{NAME}: query, key and value must have one dtype and device, got query {query.dtype} on"
                f" {query.device}, {name} {tensor.dtype} on {tensor.device}"
            )
    if query.dtype not in FLOATING:
        raise ValueError(f"{NAME}: dtype {query.dtype} is not one of float32, bfloat16, float16, float64")
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"{NAME}: query and key must have one head dim, got {query.shape[2]} and {key.shape[2]}")
    if key.shape[:2] != value.shape[:2]:
        raise ValueError(
            f"{NAME}: key and value must have one length and as many heads, got {tuple(key.shape)} and"
            f" {tuple(value.shape)}"
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads != kv_heads and not enable_gqa:
        raise ValueError(
            f"{NAME}: query has {heads} heads, key and value {kv_heads}: pass enable_gqa=True to share them"
        )
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(
            f"{NAME}: with enable_gqa the query heads ({heads}) must be a multiple of the key heads ({kv_heads})"
        )
    bounds: dict[str, Any] = {"cu_seq_q": cu_seq_q, "cu_seq_k": cu_seq_k}
    if seqused_k is not None:
        bounds["seqused_k"] = seqused_k
    for name, tensor in bounds.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64) or tensor.ndim != 1:
            given = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{NAME}: {name} must be a 1-D tensor of int32 or int64, got {given}")
        if tensor.device != query.device:
            raise ValueError(f"{NAME}: {name} is on {tensor.device}, query on {query.device}")
    if cu_seq_q.shape[0] < 1 or cu_seq_q.shape != cu_seq_k.shape:
        raise ValueError(
            f"{NAME}: cu_seq_q and cu_seq_k must both have shape (N + 1,), got {tuple(cu_seq_q.shape)} and"
            f" {tuple(cu_seq_k.shape)}"
        )
    if seqused_k is not None and seqused_k.shape[0] != cu_seq_k.shape[0] - 1:
        raise ValueError(f"{NAME}: seqused_k must have shape ({cu_seq_k.shape[0] - 1},), got {tuple(seqused_k.shape)}")
    if not torch.compiler.is_compiling() and max(query.shape[0], key.shape[0]) > MAX_LENGTH:
        raise ValueError(f"{NAME}: lengths must not exceed {MAX_LENGTH}, got {query.shape[0]} and {key.shape[0]}")
    check_size(NAME, "an output", (query.shape[0], heads, value.shape[2]))


def _check_options(
    query: Tensor, sequences: int, scale: float, window: tuple[int, int], softcap: float, slopes: Tensor | None,
    sinks: Tensor | None, dropout_p: float, block_table: Any, num_splits: Any,
) -> None:  # fmt: skip
    if block_table is not None:
        raise ValueError(f"{NAME}: block_table is for caches: see fastattn.flash_attn.flash_attn_with_kvcache")
    if num_splits is not None and num_splits < 0:
        raise ValueError(
            f"{NAME}: num_splits must be None or at least 0 (results do not depend on it), got {num_splits}"
        )
    if not -MAX_SCALE <= scale <= MAX_SCALE:
        raise ValueError(f"{NAME}: scale must be finite (in float32), got {scale}")
    check_window(NAME, window)
    check_softcap(NAME, softcap)
    heads = query.shape[1]
    if slopes is not None:
        check_heads(NAME, "alibi_slopes", slopes, query, ((heads,), (sequences, heads)))
    if sinks is not None:
        check_heads(NAME, "sinks", sinks, query, ((heads,),))
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{NAME}: dropout_p must be in [0, 1], got {dropout_p}")


def _problem(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, window: tuple[int, int], softcap: float,
    slopes: Tensor | None, sinks: Tensor | None, dropout_p: float,
) -> VarlenProblem:  # fmt: skip
    return VarlenProblem(
        device=query.device.type,
        dtype=query.dtype,
        sequences=cu_seq_q.shape[0] - 1,
        heads=query.shape[1],
        kv_heads=key.shape[1],
        queries=query.shape[0],
        keys=key.shape[0],
        head_dim=query.shape[2],
        value_dim=value.shape[2],
        window=window,
        softcap=softcap > 0.0,
        alibi=slopes is not None,
        sinks=sinks is not None,
        dropout=dropout_p > 0.0,
    )


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = NO_WINDOW,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """Attention within each of many packed sequences, with the arguments of torch.nn.attention.varlen.varlen_attn.

    Args:
        query: (Tq, H, D), float32, bfloat16, float16 or float64: the rows of all sequences, one behind the other.
            key: (Tk, Hkv, D). value: (Tk, Hkv, Dv). Any strides; a last stride other than 1 costs one copy.
        cu_seq_q, cu_seq_k: (N + 1,) int32 or int64, on the query's device, not decreasing: where sequences start and
            end. Rows of no sequence have output 0, lse -inf and zero gradients; sequences may be empty.
        max_q, max_k: at least the lengths of the longest sequences.
        return_aux: with a true attribute `lse` (torch's AuxRequest), lse is returned, too; it is differentiable.
        scale: factor of the scores, 1 / sqrt(D) by default.
        window_size: (left, right) as in scaled_dot_product_attention, aligned bottom right: the last query of a
            sequence is level with its last key. (-1, 0) is causal.
        enable_gqa: allows Hkv to divide H.
        seqused_k: (N,) int32 or int64: only so many of a sequence's keys take part. Unlike torch's, it has gradients.
        block_table: not here: paged caches are fastattn.flash_attn's. num_splits: accepted, without an effect: results
            never depend on how work is split.
        softcap, alibi_slopes ((H) or (N, H)), sinks, dropout_p, seed: as in scaled_dot_product_attention; the dropout
            counter of sequence b counts batch element b, queries and keys from the sequence's start.

    Returns:
        (Tq, H, Dv) in the query's dtype; with return_aux a tuple of it and lse (H, Tq), natural logarithm.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit. RuntimeError: values of cu_seq_q, cu_seq_k or
        seqused_k that do not, before anything is computed. BackendUnsupported: see fastattn.dispatch.
    """
    if autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value))
    scale = 1.0 / math.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale)
    call = (window_size, softcap, alibi_slopes, sinks, dropout_p)

    def problem() -> VarlenProblem:
        _check(query, key, value, cu_seq_q, cu_seq_k, seqused_k, enable_gqa)
        _check_options(query, cu_seq_q.shape[0] - 1, scale, *call, block_table, num_splits)
        return _problem(query, key, value, cu_seq_q, *call)

    if seed is not None:
        philox_mask.check_seed(NAME, seed)
    if torch.compiler.is_compiling():
        compute = OP.resolve(problem(), backend).public
    else:
        others = (cu_seq_q, cu_seq_k, seqused_k, sinks, alibi_slopes)
        described = [(t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t for t in others]
        signature = (
            query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype, query.device, key.device,
            value.device, *described, enable_gqa, window_size if type(window_size) is tuple else repr(window_size),
            scale, softcap, dropout_p, block_table, num_splits,
        )  # fmt: skip
        compute = OP.resolve_cached(signature, problem, backend).run
    philox = philox_mask.state_of(seed, query.device) if dropout_p > 0.0 else None
    left, right = window_size
    query, key, value = [t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value)]
    output, lse = compute(
        query, key, value, cu_seq_q, cu_seq_k, seqused_k, philox, sinks, alibi_slopes, scale, max_q, max_k, left, right,
        float(softcap), float(dropout_p),
    )  # fmt: skip
    return (output, lse) if return_aux is not None and return_aux.lse else output


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = NO_WINDOW,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    **_: Any,
) -> tuple[Op, VarlenProblem]:
    if autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value))
    _check(query, key, value, cu_seq_q, cu_seq_k, seqused_k, enable_gqa)
    philox_mask.check_seed(NAME, seed)
    call = (window_size, softcap, alibi_slopes, sinks, dropout_p)
    _check_options(query, cu_seq_q.shape[0] - 1, 1.0 if scale is None else scale, *call, block_table, num_splits)
    return OP, _problem(query, key, value, cu_seq_q, *call)


attention_varlen.prepare = _prepare  # type: ignore[attr-defined]
