"""Scaled-dot-product attention: the public function, the op's contract, and what is validated before any kernel runs.

    output = dropout(softmax(scale * Q K^T + mask)) V          (Vaswani et al. 2017, equation 1)

docs/attention.md says what every mask and feature means, and how they combine.

Shapes are named B batch, H query heads, Hkv key/value heads, Sq queries, Sk keys, D head dim, Dv value dim.
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
from fastattn.ops.attention.jagged import jagged_attention, prepare_jagged
from fastattn.ops.attention.options import (
    MAX_LENGTH,
    MAX_SCALE,
    NO_WINDOW,
    check_heads,
    check_softcap,
    check_window,
)

ALIGNMENTS = ("top_left", "bottom_right")


@dataclass(frozen=True)
class AttentionProblem(Problem):
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    mask_dtype: torch.dtype | None
    mask_grad: bool
    is_causal: bool
    causal_alignment: str
    dropout: bool
    window: tuple[int, int] = (-1, -1)
    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    documents: bool = False
    prefix: bool = False


@dataclass(frozen=True)
class Features:
    """What a call asks for beyond attn_mask, causality and dropout, as the kernels take it."""

    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    prefix_len: Tensor | None = None


#: What a call without features has; the schema's defaults stand for it.
NO_FEATURES = (*NO_WINDOW, 0.0, None, None, None, None, None)


def filled(features: tuple[Any, ...]) -> tuple[Any, ...]:
    """The end of the schema's arguments: torch leaves those away that end in defaults."""
    return (*features, *NO_FEATURES[len(features) :])


def memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a (B, H, S, E) tensor in the order of `like`: (B, S, H, E) in memory where like is, else contiguous.

    A clone and not contiguous(), which leaves the strides of dimensions of size 1 as they were.
    """
    if like.stride(1) < like.stride(2):
        return tensor.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    return tensor.clone(memory_format=torch.contiguous_format)


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    philox: Tensor | None,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    dropout_p: float,
    *features: Any,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    output = memory_order(query.new_empty((batch, heads, queries, value.shape[-1])), query)
    return output, query.new_empty((batch, heads, queries), dtype=accumulation_dtype(query.dtype))


def _backward_fake(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    philox: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    dropout_p: float,
    mask_grad: bool,
    *features: Any,
) -> tuple[Tensor, ...]:
    sinks = filled(features)[3]
    if mask_grad:
        assert mask is not None
        grad_mask = mask.new_empty(mask.shape)
    else:
        grad_mask = query.new_empty((0,), dtype=torch.float32)
    return (
        memory_order(query.new_empty(query.shape), query),
        memory_order(key.new_empty(key.shape), key),
        memory_order(value.new_empty(value.shape), value),
        grad_mask,
        query.new_empty((0,), dtype=torch.float32) if sinks is None else sinks.new_empty(sinks.shape),
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.count = count = len(inputs)
    features = filled(inputs[FEATURES:]) if count > FEATURES else ()
    ctx.options, ctx.extra = inputs[5:FEATURES], features[:3]
    ctx.save_for_backward(*inputs[:5], *output, *features[3:])
    ctx.set_materialize_grads(False)


def _backward(kernel: Any, ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, mask, philox, output, lse, *features = ctx.saved_tensors
    if grad_output is None:
        if grad_lse is None:
            return (None,) * ctx.count
        grad_output = torch.zeros_like(output)
    elif grad_output.stride(-1) != 1 and grad_output.shape[-1] != 1:
        grad_output = grad_output.contiguous()
    mask_grad = mask is not None and ctx.needs_input_grad[3]
    grads = kernel(
        grad_output, grad_lse, query, key, value, mask, philox, output, lse, *ctx.options, mask_grad,
        *ctx.extra, *features,
    )  # fmt: skip
    if not (mask_grad or features):
        return (*grads[:3], *(None,) * (ctx.count - 3))
    result = [*grads[:3], grads[3] if mask_grad else None] + [None] * (ctx.count - 4)
    if features and features[0] is not None:
        result[FEATURES + 3] = grads[4]
    return tuple(result)


#: Where the features start among the forward's arguments; they may be left away as a whole.
FEATURES = 9
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? philox, {}"
    "float scale, bool is_causal, bool bottom_right, float dropout_p{}"
    ", int window_left=-1, int window_right=-1, float softcap=0.0, Tensor? sinks=None, Tensor? alibi_slopes=None"
    ", Tensor? query_ids=None, Tensor? key_ids=None, Tensor? prefix_len=None"
)


def _forward_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any) -> int:
    """Two products of all queries with all keys; like torch's count of its own attention it knows of no masks."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


def _backward_flops(
    grad_output: Any, grad_lse: Any, query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any
) -> int:
    """Five products: the scores again, and two for each side of the two forward ones."""
    return 2 * math.prod(query[:3]) * key[2] * (3 * query[3] + 2 * value[3])


OP = Op(
    "attention",
    forward_schema=f"({_ARGUMENTS.format('', '')}) -> (Tensor output, Tensor lse)",
    backward_schema=(
        "(Tensor grad_output, Tensor? grad_lse, "
        f"{_ARGUMENTS.format('Tensor output, Tensor lse, ', ', bool mask_grad')})"
        " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, Tensor grad_sinks)"
    ),
    forward_fake=_forward_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
    forward_flops=_forward_flops,
    backward_flops=_backward_flops,
)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool, alignment: str) -> None:
    """ValueError for anything that is not an attention problem. query, key, value and mask are 4-D here."""
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                "attention: query, key and value must have one dtype and device, got "
                f"query {query.dtype} on {query.device}, {name} {tensor.dtype} on {tensor.device}"
            )
    if query.dtype not in FLOATING:
        raise ValueError(f"attention: dtype {query.dtype} is not one of float32, bfloat16, float16, float64")
    heads, kv_heads = query.shape[1], key.shape[1]
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"attention: query and key must have one head dim, got {query.shape[3]} and {key.shape[3]}")
    if key.shape[2] != value.shape[2]:
        raise ValueError(f"attention: key and value must have one length, got {key.shape[2]} and {value.shape[2]}")
    if kv_heads != value.shape[1]:
        raise ValueError(f"attention: key has {kv_heads} heads, value {value.shape[1]}")
    if heads != kv_heads:
        if not enable_gqa:
            raise ValueError(
                f"attention: query has {heads} heads, key and value {kv_heads}: pass enable_gqa=True to share them"
            )
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(
                f"attention: with enable_gqa the query heads ({heads}) must be a multiple of the key heads ({kv_heads})"
            )
    if not torch.compiler.is_compiling() and max(query.shape[2], key.shape[2], query.shape[0] * heads) > MAX_LENGTH:
        raise ValueError(
            f"attention: lengths and batch * heads must not exceed {MAX_LENGTH}, got {query.shape[2]} queries,"
            f" {key.shape[2]} keys, {query.shape[0]} * {heads}"
        )
    check_size("attention", "an output", (query.shape[0], heads, query.shape[2], value.shape[3]))
    if alignment not in ALIGNMENTS:
        raise ValueError(f"attention: causal_alignment must be one of {ALIGNMENTS}, got {alignment!r}")
    if mask is None:
        return
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise ValueError(
            f"attention: attn_mask must be bool, float32 or the query's dtype {query.dtype}, got {mask.dtype}"
        )
    if mask.device != query.device:
        raise ValueError(f"attention: attn_mask is on {mask.device}, query on {query.device}")
    full = (query.shape[0], heads, query.shape[2], key.shape[2])
    if mask.ndim != 4 or any(m not in (1, f) for m, f in zip(mask.shape, full, strict=True)):
        raise ValueError(
            f"attention: attn_mask of shape {tuple(mask.shape)} does not broadcast to (B, H, Sq, Sk) = {full}"
        )


def _check_values(dropout_p: float, scale: float, seed: int | Tensor | None) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"attention: dropout_p must be in [0, 1], got {dropout_p}")
    if not -MAX_SCALE <= scale <= MAX_SCALE:  # also refuses NaN
        raise ValueError(f"attention: scale must be finite (in float32), got {scale}")
    philox_mask.check_seed("attention", seed)


def _four_dims(query: Tensor, key: Tensor, value: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
    """(B, H, S, E) views of inputs with any batch dims; and the batch dims that were flattened into B.

    (S, E) is one head, (H, S, E) one batch element; more batch dims are broadcast and flattened into B.
    """
    if min(query.ndim, key.ndim, value.ndim) < 2:
        raise ValueError(
            "attention: query, key and value are (..., H, S, E), (H, S, E) or (S, E), got "
            f"{query.ndim}, {key.ndim} and {value.ndim} dimensions"
        )
    tensors = [t if t.ndim >= 3 else t.unsqueeze(0) for t in (query, key, value)]
    try:
        batch = torch.broadcast_shapes(*(t.shape[:-3] for t in tensors))
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        raise ValueError(f"attention: the batch dimensions of {shapes} do not broadcast") from error
    expanded = [t.expand(*batch, *t.shape[-3:]) for t in tensors]
    if len(batch) != 1:
        flat = math.prod(batch)
        expanded = [t.reshape(flat, *t.shape[-3:]) for t in expanded]
    return expanded, tuple(batch)


def _four_dim_mask(mask: Tensor, batch: tuple[int, ...]) -> Tensor:
    """The mask as (B|1, H|1, Sq|1, Sk|1); several batch dims are expanded only where they have to be merged."""
    if mask.ndim <= 3:
        return mask[(None,) * (4 - mask.ndim)]
    leading = mask.shape[:-3]
    if len(batch) == 1 and mask.ndim == 4:
        return mask
    if all(size == 1 for size in leading):
        return mask.reshape(1, *mask.shape[-3:])
    try:
        return mask.expand(*batch, *mask.shape[-3:]).reshape(math.prod(batch), *mask.shape[-3:])
    except RuntimeError as error:
        raise ValueError(
            f"attention: attn_mask of shape {tuple(mask.shape)} does not broadcast over the batch dimensions {batch}"
        ) from error


def unit_last_stride(tensor: Tensor) -> Tensor:
    """As kernels take it; a tensor without dimensions is refused later."""
    return tensor if tensor.ndim == 0 or tensor.stride(-1) == 1 else tensor.contiguous()


def _autocast(device: str, *tensors: Tensor | None) -> list[Any]:
    """Under autocast attention runs in the lower precision, as torch's does (float64 is left alone)."""
    dtype = torch.get_autocast_dtype(device)
    lower = (torch.float32, torch.bfloat16, torch.float16)
    return [t.to(dtype) if t is not None and t.dtype in lower else t for t in tensors]


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    alignment: str,
    dropout: bool,
    features: tuple[Any, ...],
) -> AttentionProblem:
    left, right, softcap, sinks, slopes, ids, _, prefix = features or NO_FEATURES
    aligned = is_causal or left >= 0 or right >= 0 or slopes is not None
    return AttentionProblem(
        device=query.device.type,
        dtype=query.dtype,
        batch=query.shape[0],
        heads=query.shape[1],
        kv_heads=key.shape[1],
        queries=query.shape[2],
        keys=key.shape[2],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        mask_dtype=None if mask is None else mask.dtype,
        mask_grad=mask is not None and mask.requires_grad,
        is_causal=is_causal,
        causal_alignment=alignment if aligned else "none",
        dropout=dropout,
        window=(left, right),
        softcap=softcap > 0.0,
        alibi=slopes is not None,
        sinks=sinks is not None,
        documents=ids is not None,
        prefix=prefix is not None,
    )


def _integers(name: str, tensor: Any, query: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.int32, torch.int64):
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"attention: {name} must be a tensor of int32 or int64, got {given}")
    if tensor.device != query.device:
        raise ValueError(f"attention: {name} is on {tensor.device}, query on {query.device}")
    return tensor


def _flat_batch(name: str, tensor: Tensor, trailing: int, query: Tensor, batch: tuple[int, ...] | None) -> Tensor:
    """A tensor (*batch, ...) or without batch dims as (B or 1, ...), `trailing` dims after the batch."""
    leading = tensor.shape[: tensor.ndim - trailing]
    rest = tensor.shape[tensor.ndim - trailing :]
    if all(size == 1 for size in leading):
        return tensor.reshape(1, *rest)
    full = (query.shape[0],) if batch is None else batch
    try:
        return tensor.expand(*full, *rest).reshape(math.prod(full), *rest)
    except RuntimeError as error:
        raise ValueError(
            f"attention: {name} of shape {tuple(tensor.shape)} does not broadcast over the batch dimensions {full}"
        ) from error


def _document_ids(
    document_ids: Any, query: Tensor, key: Tensor, batch: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """Ids of queries (B or 1, Sq) and of keys (B or 1, Sk)."""
    pair = document_ids if isinstance(document_ids, (tuple, list)) else (document_ids, document_ids)
    if len(pair) != 2:
        raise ValueError(f"attention: document_ids must be a tensor or (of queries, of keys), got {len(pair)} of them")
    found = []
    for ids, rows, what in zip(pair, (query, key), ("queries", "keys"), strict=True):
        ids = _integers("document_ids", ids, query)
        if ids.ndim < 1 or ids.shape[-1] != rows.shape[2]:
            raise ValueError(
                f"attention: document_ids of shape {tuple(ids.shape)} must end in the number of {what},"
                f" {rows.shape[2]}; where it differs between queries and keys pass (of queries, of keys)"
            )
        found.append(_flat_batch("document_ids", ids, 1, query, batch))
    return found[0], found[1]


def _prefix_len(prefix_len: Any, query: Tensor, key: Tensor, batch: tuple[int, ...] | None) -> Tensor:
    """(B or 1,); the values of tensors are checked by the kernels."""
    if isinstance(prefix_len, Tensor):
        return _flat_batch("prefix_len", _integers("prefix_len", prefix_len, query), 0, query, batch)
    if isinstance(prefix_len, bool) or not isinstance(prefix_len, int) or not 0 <= prefix_len <= key.shape[2]:
        raise ValueError(f"attention: prefix_len must be in [0, {key.shape[2]}], got {prefix_len}")
    return torch.full((1,), prefix_len, dtype=torch.int64, device=query.device)


def _features(
    query: Tensor,
    key: Tensor,
    batch: tuple[int, ...] | None,
    is_causal: bool,
    window: Any,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    document_ids: Any,
    prefix_len: Any,
) -> tuple[Any, ...]:
    """The end of the schema's arguments; () where the call asks for none."""
    if (
        window == NO_WINDOW and softcap == 0.0 and alibi_slopes is None and sinks is None and document_ids is None
        and prefix_len is None
    ):  # fmt: skip
        return ()
    left, right = check_window("attention", window)
    heads = query.shape[1]
    if sinks is not None:
        check_heads("attention", "sinks", sinks, query, ((heads,),))
    if alibi_slopes is not None:
        check_heads("attention", "alibi_slopes", alibi_slopes, query, ((heads,), (query.shape[0], heads)))
    ids = (None, None) if document_ids is None else _document_ids(document_ids, query, key, batch)
    prefix = None
    if prefix_len is not None:
        if not is_causal and left < 0 and right < 0:
            raise ValueError("attention: prefix_len lifts causality or a window: pass is_causal=True or window=")
        prefix = _prefix_len(prefix_len, query, key, batch)
    return (left, right, check_softcap("attention", softcap), sinks, alibi_slopes, *ids, prefix)


def _canonical(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...] | None]:
    """4-D tensors of autocast's dtype, and the batch dims to restore (None: the inputs were 4-D already)."""
    device = query.device.type
    if autocast_enabled(device):
        query, key, value, mask = _autocast(device, query, key, value, mask)
    batch = None
    if not (query.ndim == key.ndim == value.ndim == 4 and query.shape[0] == key.shape[0] == value.shape[0]):
        (query, key, value), batch = _four_dims(query, key, value)
    if mask is not None and (mask.ndim != 4 or batch is not None):
        mask = _four_dim_mask(mask, (query.shape[0],) if batch is None else batch)
    return query, key, value, mask, batch


def _plain(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, return_lse: bool) -> Any:
    """The result of the commonest call, where overhead counts: 4-D tensors, as many heads; None for others."""
    if not (
        type(query) is type(key) is type(value) is Tensor and query.is_cpu and key.is_cpu and value.is_cpu
        and query.ndim == key.ndim == 4 and not query.is_nested and query.shape[1] == key.shape[1]
        and not torch.is_autocast_enabled("cpu")
    ):  # fmt: skip
        return None
    dim = query.shape[3]
    if dim == 0:
        return None
    scale = 1.0 / math.sqrt(dim)
    return OP.attempt(query, key, value, None, None, scale, is_causal, False, 0.0, visible=not return_lse)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    seed: int | Tensor | None = None,
    window: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    document_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    prefix_len: int | Tensor | None = None,
    backend: str | None = None,
) -> Any:
    """softmax(scale * Q K^T + mask) V with the meaning of torch.nn.functional.scaled_dot_product_attention.

    Args:
        query: (..., H, Sq, D), float32, bfloat16, float16 or float64. Any batch dims and any strides; a last stride
            other than 1 costs one copy. (H, S, E) and (S, E) are taken as one batch element and one head.
            Or all three jagged nested tensors, (B, H, j, D) or (B, j, D), of the same lengths or bottom right; they
            are read where they are, as packed sequences, and do not combine with masks, documents and prefixes.
        key: (..., Hkv, Sk, D). value: (..., Hkv, Sk, Dv). Batch dims broadcast as in torch.
        attn_mask: broadcastable to (..., H, Sq, Sk). bool: True takes part. float32 or the query's dtype: added to
            the scaled scores, differentiable. Never expanded.
        dropout_p: probability in [0, 1] of dropping an attention weight; the kept ones are scaled by 1 / (1 - p).
            The mask is a function of (seed, offset) drawn from torch's generator (fastattn.philox).
        is_causal: key j is visible to query i iff j <= i ("top_left", torch's meaning) or j <= i + Sk - Sq
            ("bottom_right", flash-attention's), as causal_alignment says. Combines with attn_mask.
        scale: factor of the scores, 1 / sqrt(D) by default.
        enable_gqa: allows Hkv to divide H; query head h then uses key head h // (H / Hkv).
        return_lse: also return the log-sum-exp of the masked scores, differentiable.
        seed: fixes the dropout mask: an int in [0, 2**63), or the (seed, offset) of fastattn.philox.draw.
        window: (left, right): query i sees keys p - left .. p + right of its position p, which is i ("top_left") or
            i + Sk - Sq ("bottom_right"); -1: no bound. Combines with is_causal, which is a right of 0.
        softcap: c > 0: scores become c * tanh(scale * q.k / c), before anything is added or excluded.
        alibi_slopes: (H) or (B, H): minus slope * |p - j| is added to the scores (Press et al. 2022).
        sinks: (H), differentiable: a score that every query of the head has besides its keys', without a value. It is
            part of lse; a query that sees no key then has output 0 and lse the sink.
        document_ids: (..., S) int32 or int64, or a pair of those, of queries and of keys: query i sees key j only
            where the ids are equal. In any order; an id is a name and no position.
        prefix_len: an int or a tensor of the batch's shape: keys before it are seen by all queries, whatever is_causal
            and window say (they do not lift documents and attn_mask).
        backend: serve with this backend or raise BackendUnsupported.

    Returns:
        (..., H, Sq, Dv) in the query's dtype; with return_lse a tuple of it and lse (..., H, Sq), natural log,
        float32 (float64 for float64 input). A query that sees no key has output 0, lse -inf and zero gradients.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit. BackendUnsupported: see fastattn.dispatch.

    Scores, softmax and sums are float32 for every 16- and 32-bit dtype. Under autocast inputs are cast to its dtype.
    """
    if (
        attn_mask is None and dropout_p == 0.0 and scale is None and not enable_gqa and backend is None and seed is None
        and causal_alignment == "top_left" and window == NO_WINDOW and softcap == 0.0 and alibi_slopes is None
        and sinks is None and document_ids is None and prefix_len is None and not torch.compiler.is_compiling()
    ):  # fmt: skip
        plain = _plain(query, key, value, is_causal, return_lse)
        if plain is not None:
            return plain
    if query.is_nested or key.is_nested or value.is_nested:
        options = {"scale": scale, "dropout_p": dropout_p, "seed": seed, "softcap": softcap, "sinks": sinks,
                   "alibi_slopes": alibi_slopes, "backend": backend}  # fmt: skip
        unserved = {"attn_mask": attn_mask, "document_ids": document_ids, "prefix_len": prefix_len}
        return jagged_attention(
            query, key, value, is_causal, enable_gqa, causal_alignment, return_lse, window, options, unserved
        )
    q, k, v, mask, batch = _canonical(query, key, value, attn_mask)
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None and q.shape[3] > 0 else float(scale or 0.0)
    _check_values(dropout_p, scale, seed)
    features = _features(
        q, k, batch, is_causal, window, softcap, alibi_slopes, sinks, document_ids, prefix_len
    )  # fmt: skip
    if torch.compiler.is_compiling():
        _check(q, k, v, mask, enable_gqa, causal_alignment)
        described = _problem(q, k, v, mask, is_causal, causal_alignment, dropout_p > 0.0, features)
        compute = OP.resolve(described, backend).public
    else:
        masked = None if mask is None else (mask.shape, mask.dtype, mask.device, mask.requires_grad)
        signature = (
            q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, masked,
            is_causal, causal_alignment, dropout_p > 0.0, enable_gqa,
            features and (*features[:2], features[2] > 0.0, *(f is not None for f in features[3:])),
        )  # fmt: skip

        def problem() -> AttentionProblem:
            _check(q, k, v, mask, enable_gqa, causal_alignment)
            return _problem(q, k, v, mask, is_causal, causal_alignment, dropout_p > 0.0, features)

        compute = OP.resolve_cached(signature, problem, backend).run
    philox = philox_mask.state_of(seed, q.device) if dropout_p > 0.0 else None
    output, lse = compute(
        unit_last_stride(q), unit_last_stride(k), unit_last_stride(v), mask, philox,
        scale, is_causal, causal_alignment == "bottom_right", dropout_p, *features,
    )  # fmt: skip
    if batch is not None:
        leading = (*batch, q.shape[1]) if query.ndim > 2 or key.ndim > 2 or value.ndim > 2 else ()
        output = output.reshape(*leading, *output.shape[-2:])
        lse = lse.reshape(*leading, lse.shape[-1]) if return_lse else lse
    return (output, lse) if return_lse else output


def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "top_left",
    seed: int | Tensor | None = None,
    window: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    document_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    prefix_len: int | Tensor | None = None,
    **_: Any,
) -> tuple[Op, Problem]:
    if query.is_nested or key.is_nested or value.is_nested:
        options = {"scale": scale, "dropout_p": dropout_p, "seed": seed, "softcap": softcap, "sinks": sinks,
                   "alibi_slopes": alibi_slopes}  # fmt: skip
        unserved = {"attn_mask": attn_mask, "document_ids": document_ids, "prefix_len": prefix_len}
        return prepare_jagged(query, key, value, is_causal, enable_gqa, causal_alignment, window, options, unserved)
    q, k, v, mask, batch = _canonical(query, key, value, attn_mask)
    _check_values(dropout_p, 1.0 if scale is None else scale, seed)
    _check(q, k, v, mask, enable_gqa, causal_alignment)
    features = _features(
        q, k, batch, is_causal, window, softcap, alibi_slopes, sinks, document_ids, prefix_len
    )  # fmt: skip
    return OP, _problem(q, k, v, mask, is_causal, causal_alignment, dropout_p > 0.0, features)


scaled_dot_product_attention.prepare = _prepare  # type: ignore[attr-defined]
