"""What the cases of attention are made of: its definition in plain torch, torch's peer, tensors and masks.

Shapes as in op.py: B batch, H query heads, Hkv key heads, Sq queries, Sk keys, D head dim, Dv value dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import philox
from fastattn.cases import Arguments, Case, Sampler
from fastattn.numerics import accumulation_dtype

Draw = Callable[..., Tensor]
Mask = Callable[[Sampler, tuple[int, ...]], Tensor]


def steps_ahead(query: Tensor, key: Tensor, alignment: str) -> Tensor:
    """(Sq, Sk): by how many positions key j is ahead of query i."""
    i = torch.arange(query.shape[-2], device=query.device)[:, None]
    j = torch.arange(key.shape[-2], device=query.device)[None, :]
    return j - (i if alignment == "top_left" else i + key.shape[-2] - query.shape[-2])


def may_see(
    query: Tensor,
    key: Tensor,
    is_causal: bool,
    alignment: str,
    window: tuple[int, int] = (-1, -1),
    document_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    prefix_len: int | Tensor | None = None,
) -> Tensor | None:
    """bool, (Sq, Sk) or with batch dims (..., 1, Sq, Sk): True where query i may see key j; None: everywhere."""
    ahead, (left, right) = steps_ahead(query, key, alignment), window
    seen = None
    if is_causal or left >= 0 or right >= 0:
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if is_causal:
            seen = seen & (ahead <= 0)
        if left >= 0:
            seen = seen & (ahead >= -left)
        if right >= 0:
            seen = seen & (ahead <= right)
        if prefix_len is not None:
            prefix = torch.as_tensor(prefix_len, device=query.device)[..., None, None, None]
            seen = seen | (torch.arange(key.shape[-2], device=query.device) < prefix)
    if document_ids is not None:
        queries, keys = document_ids if isinstance(document_ids, tuple) else (document_ids, document_ids)
        same = (queries[..., :, None] == keys[..., None, :])[..., None, :, :]
        seen = same if seen is None else seen & same
    return seen


def definition(
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
    seed: int | None = None,
    keep: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    document_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    prefix_len: int | Tensor | None = None,
) -> Any:
    """Attention written down, in the dtype of its inputs; queries that see no key give 0 and lse -inf.

    keep: which weights dropout keeps, instead of those that seed keeps.
    """
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query @ key.transpose(-1, -2)) * factor
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(scores.dtype)[..., None, None]
        scores = scores - slopes * steps_ahead(query, key, causal_alignment).abs().to(scores.dtype)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        else:
            scores = scores + attn_mask.to(scores.dtype)
    seen = may_see(query, key, is_causal, causal_alignment, window, document_ids, prefix_len)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores, value = torch.cat((scores, column), -1), F.pad(value, (0, 0, 0, 1))
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    # Dead rows go around softmax, whose gradient would be NaN there.
    live_scores = scores.masked_fill(dead, 0.0)
    weights = torch.softmax(live_scores, -1).masked_fill(dead, 0.0)
    if keep is not None:
        weights = weights * F.pad(keep, (0, weights.shape[-1] - keep.shape[-1])) / (1.0 - dropout_p)
    elif dropout_p > 0.0:
        assert seed is not None
        *batch, heads, queries, keys = weights.shape if weights.ndim > 2 else (1, *weights.shape)
        state = philox.fixed(seed, query.device)
        # A sink's column is one past the keys; it has no value to drop.
        keep = philox.keep_mask(state, dropout_p, math.prod(batch), heads, queries, keys).view(weights.shape)
        weights = weights * keep * (1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)
    output = weights @ value
    if not return_lse:
        return output
    return output, torch.logsumexp(live_scores, -1).masked_fill(dead.squeeze(-1), -torch.inf)


def peer(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **call: Any) -> Any:
    """torch's scaled_dot_product_attention where it can express the call, else the definition."""
    if call.pop("return_lse", False):
        output, lse = definition(query, key, value, attn_mask, return_lse=True, **call)
        return output, lse.to(accumulation_dtype(query.dtype))
    alignment = call.pop("causal_alignment", "top_left")
    causal = call.pop("is_causal", False)
    described = {name: call.pop(name) for name in ("window", "document_ids", "prefix_len") if name in call}
    if described.get("window", (-1, -1)) != (-1, -1) or described.get("document_ids") is not None or (
        described.get("prefix_len") is not None
    ):  # fmt: skip
        seen = may_see(query, key, causal, alignment, **described)
        causal = False
        if attn_mask is None:
            attn_mask = seen
        elif seen is not None:
            attn_mask = attn_mask & seen if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~seen, -torch.inf)
    if call.get("softcap") or call.get("alibi_slopes") is not None or call.get("sinks") is not None:
        return definition(query, key, value, attn_mask, is_causal=causal, causal_alignment=alignment, **call)
    # torch 2.10 divides by zero where a tensor is empty.
    if call.get("dropout_p") or query.numel() == 0 or key.numel() == 0:
        return definition(query, key, value, attn_mask, is_causal=causal, causal_alignment=alignment, **call)
    mask = attn_mask if attn_mask is None or attn_mask.ndim > 1 else attn_mask[None, :]
    if causal and (mask is not None or alignment == "bottom_right"):
        visible = may_see(query, key, True, alignment)
        assert visible is not None
        if mask is None:
            mask = visible
        else:
            mask = mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -torch.inf)
        causal = False
    if mask is not None:
        dead = ~mask if mask.dtype == torch.bool else mask == -torch.inf
        if dead.expand(*dead.shape[:-1], key.shape[-2]).all(-1).any():
            return definition(query, key, value, mask, **call)
        if mask.dtype not in (torch.bool, query.dtype):
            mask = mask.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, **call)


# Memory layouts: how a (..., S, E) tensor is drawn.


def contiguous(s: Sampler, *shape: int) -> Tensor:
    return s.normal(*shape)


def bshd_order(s: Sampler, b: int, h: int, length: int, e: int) -> Tensor:
    """(B, S, H, E) in memory."""
    return s.normal(b, length, h, e).transpose(1, 2)


def columns_first(s: Sampler, b: int, h: int, length: int, e: int) -> Tensor:
    """The last stride is not 1."""
    return s.normal(b, h, e, length).transpose(2, 3)


def every_other(s: Sampler, b: int, h: int, length: int, e: int) -> Tensor:
    """The last stride is 2."""
    return s.normal(b, h, length, 2 * e)[..., ::2]


def expanded_heads(s: Sampler, b: int, h: int, length: int, e: int) -> Tensor:
    """One head seen h times through a stride of 0."""
    return s.normal(b, 1, length, e).expand(b, h, length, e)


def expanded_batch(s: Sampler, b: int, h: int, length: int, e: int) -> Tensor:
    return s.normal(1, h, length, e).expand(b, h, length, e)


def sliced(s: Sampler, b: int, h: int, length: int, e: int) -> Tensor:
    """Starts inside a larger tensor, at an address that is aligned to nothing, with gaps between rows."""
    return s.normal(b, h + 1, length + 3, e + 5)[:, 1:, 1:-2, 3:-2]


def large(s: Sampler, *shape: int) -> Tensor:
    return s.normal(*shape, std=8.0)


def of_shape(
    shape: tuple[int, int, int, int, int],
    kv_heads: int | None = None,
    value_dim: int | None = None,
    draw: Draw = contiguous,
    mask: Mask | None = None,
    **call: Any,
) -> Callable[[Sampler], Arguments]:
    """Arguments of shape (B, H, Sq, Sk, D)."""
    batch, heads, queries, keys, dim = shape
    hkv = heads if kv_heads is None else kv_heads

    def build(s: Sampler) -> Arguments:
        arguments: Arguments = {
            "query": draw(s, batch, heads, queries, dim),
            "key": draw(s, batch, hkv, keys, dim),
            "value": draw(s, batch, hkv, keys, dim if value_dim is None else value_dim),
        }
        if mask is not None:
            arguments["attn_mask"] = mask(s, (batch, heads, queries, keys))
        if hkv != heads:
            arguments["enable_gqa"] = True
        return {**arguments, **call}

    return build


# Masks. A mask keeps the first key alive unless dead rows are its subject.


def bool_mask(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    mask = s.chance(*shape, p=0.7)
    mask[..., :1] = True
    return mask


def additive_mask(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    return s.normal(*shape)


def additive_mask_float(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    return s.normal(*shape, dtype=accumulation_dtype(s.dtype))


def additive_mask_inf(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    """0 and -inf, as most models write it."""
    return infinite(bool_mask)(s, shape)


def smallest(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    """0 and the dtype's smallest number, whole rows of it too: those attend to everything alike."""
    mask = s.chance(*shape, p=0.7)
    mask[..., 3, :] = False
    return torch.zeros(shape, dtype=s.dtype, device=s.device).masked_fill(~mask, torch.finfo(s.dtype).min)


def dead_rows(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    mask = s.chance(*shape, p=0.5)
    mask[..., 1::3, :] = False
    return mask


def dead_rows_inf(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    return s.normal(*shape).masked_fill(~dead_rows(s, shape), -torch.inf)


def padding(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    """(B, 1, 1, Sk): sequences of different lengths."""
    batch, _, _, keys = shape
    lengths = torch.tensor([max(keys * (batch - b) // batch, 1) for b in range(batch)])
    return (torch.arange(keys) < lengths[:, None])[:, None, None, :].to(s.device)


def documents(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    """(1, 1, Sq, Sk): three documents in a row that do not see each other."""
    queries, keys = (torch.arange(n, device=s.device) * 3 // n for n in shape[2:])
    return (queries[:, None] == keys[None, :])[None, None]


def window(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    """(Sq, Sk): query i sees keys i-20 .. i+20."""
    i, j = (torch.arange(n, device=s.device) for n in shape[2:])
    return (i[:, None] - j[None, :]).abs() <= 20


def blocks(rows: int, columns: int, p: float = 0.5) -> Mask:
    """(1, 1, Sq, Sk): blocks of the scores that are seen with probability p (the first column always), whole."""

    def mask(s: Sampler, shape: tuple[int, ...]) -> Tensor:
        queries, keys = shape[2:]
        seen = s.chance(-(-queries // rows), -(-keys // columns), p=p)
        seen[:, 0] = True
        return seen.repeat_interleave(rows, 0)[:queries].repeat_interleave(columns, 1)[:, :keys][None, None]

    return mask


def steps(rows: int, columns: int, sees: int) -> Mask:
    """(Sq, Sk): every `rows` queries see `sees` keys, `columns` further on (back from the end if negative)."""

    def mask(s: Sampler, shape: tuple[int, ...]) -> Tensor:
        queries, keys = (torch.arange(n, device=s.device) for n in shape[2:])
        ahead = keys[None, :] - queries[:, None] // rows * columns - (shape[3] - sees if columns < 0 else 0)
        return ((ahead >= 0) & (ahead < sees)) | (keys < 3)

    return mask


def infinite(kind: Mask) -> Mask:
    """A bool mask written as 0 and -inf."""

    def mask(s: Sampler, shape: tuple[int, ...]) -> Tensor:
        seen = kind(s, shape)
        return torch.zeros(seen.shape, dtype=s.dtype, device=s.device).masked_fill(~seen, -torch.inf)

    return mask


def pattern(kind: Mask, full: tuple[bool, ...]) -> Mask:
    """A mask whose dimensions are full or 1."""
    return lambda s, shape: kind(s, tuple(n if f else 1 for n, f in zip(shape, full, strict=True)))


def last_dims(kind: Mask, dims: int) -> Mask:
    """A mask with only the last dims of (B, H, Sq, Sk)."""
    return lambda s, shape: kind(s, shape[4 - dims :])


def transposed_mask(kind: Mask) -> Mask:
    """The same kind of mask with a last stride that is not 1."""
    return lambda s, shape: kind(s, (*shape[:2], shape[3], shape[2])).transpose(2, 3)


def expanded_mask(kind: Mask) -> Mask:
    """Full size, strides of 0 in batch, heads and queries."""
    return lambda s, shape: kind(s, (1, 1, 1, shape[3])).expand(shape)


def sliced_mask(kind: Mask) -> Mask:
    """The last columns of a wider mask: rows with gaps, starting at an address that is aligned to nothing."""
    return lambda s, shape: kind(s, (*shape[:3], shape[3] + 11))[..., 11:]


WITH_MASK = ("query", "key", "value", "attn_mask")
# Where torch has no fused function its peer is unfused autograd, which keeps the probabilities.
UNFUSED_PEER: dict[str, Any] = {
    "element_factor": 4.0,
    "excepted": tuple(f"gradient of {name}" for name in ("query", "key", "value", "attn_mask")),
    "reason": "probabilities are recomputed from lse, whose rounding is an error of the whole row: half a unit in the "
    "last place of an lse of 4 to 8 is 2.3 roundings (root mean square)",
}
LARGE_LSE: dict[str, Any] = {
    "norm_factor": 5.0,
    "excepted": ("gradient of value",),
    "reason": "half a unit in the last place of an lse of 64 to 256 is 74 roundings (root mean square), an error of "
    "the whole row's probabilities; torch's are off by 18",
}
ONE_VISIBLE_KEY: dict[str, Any] = {
    "roundings": 2.0,
    "reason": "the only probability is 1: exact in torch, recomputed from lse here",
}
OF_SINKS: dict[str, Any] = {
    "norm_factor": 4.0,
    "element_factor": 6.0,
    "excepted": ("gradient of sinks",),
    "reason": "one number for each head, of shares recomputed from lse: half a unit in the last place of an lse of 4 "
    "to 8 is 2.3 roundings (root mean square) beside the 1.2 that both sides have: twice the law",
}
NEAR_KEYS_FIRST: dict[str, Any] = {
    "element_factor": 8.0,
    "excepted": ("gradient of query", "gradient of key", "gradient of attn_mask"),
    "reason": "sums of P * (dP - delta), with delta from an output that is the sum of 128 keys one after "
    "the other; where the heavy keys come first, all later roundings are of their size. Torch sums in 16 lanes: by "
    "the square root of the number of roundings, 128 / 12, it may be 3.3 x nearer",
}
SMALL = (2, 3, 37, 45, 16)
ROUNDING_ONLY = ("value",)  # with one key the gradients of query and key are 0: what is left of them is rounding


def unfused_peer(case: Case) -> Case:
    return case if case.reason else replace(case, **UNFUSED_PEER)
