"""The attention function that Transformers calls in every layer, and what becomes of each of its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import autocast_enabled
from fastattn.integrations.transformers.masks import BandMask, Mask, PackedMask, RangeMask, recognised
from fastattn.numerics import accumulation_dtype
from fastattn.ops.attention import attention_varlen, scaled_dot_product_attention
from fastattn.ops.decode import decode_attention


def _listed(indices: Tensor, count: int) -> Tensor:
    """(..., count) bool: the places that are listed in the last dimension of (..., n); -1 is none."""
    seen = torch.zeros((*indices.shape[:-1], count + 1), dtype=torch.bool, device=indices.device)
    return seen.scatter(-1, torch.where(indices < 0, count, indices.long()), True)[..., :count]


def _listed_blocks(indices: Tensor, size: int, heads: int, keys: int) -> Tensor:
    """(B, heads, Sq, keys) bool: the keys of listed blocks of `size`, (B, Hi, Sq, n), for heads in Hi groups."""
    batch, groups, queries, _ = indices.shape
    blocks = -(-keys // size)
    seen = _listed(indices, blocks)[:, :, None, :, :, None].expand(-1, -1, heads // groups, -1, -1, size)
    return seen.reshape(batch, heads, queries, blocks * size)[..., :keys]


def _joined(one: Tensor | None, other: Tensor | None, query: Tensor) -> Tensor | None:
    """One attn_mask of two, each bool or to be added."""
    one, other = (
        part if part is None or part.dtype in (torch.bool, torch.float32, query.dtype)
        else part.to(query.dtype if part.dtype.is_floating_point else torch.bool)
        for part in (one, other)
    )  # fmt: skip
    if one is None or other is None:
        return other if one is None else one
    if one.dtype == other.dtype == torch.bool:
        return one & other
    if one.dtype == torch.bool:
        return torch.where(one, other, float("-inf"))
    return torch.where(other, one, float("-inf")) if other.dtype == torch.bool else one + other


def _with_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """(B, S, H, Dv) with a score besides that has no value; lse and sinks are (B, H, S), or broadcast to it."""
    share = torch.sigmoid(lse - sinks.to(lse.dtype))
    return (output * share.transpose(1, 2)[..., None]).to(output.dtype)


def _is_decode(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel for caches takes it: one query, no gradients, and rows of keys that lie as it reads them."""
    if query.shape[2] != 1 or query.shape[0] != key.shape[0] or key.shape[2] == 0:
        return False
    if not query.dtype == key.dtype == value.dtype or autocast_enabled(query.device.type):
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    return all(tensor.stride(3) == 1 or tensor.shape[3] == 1 for tensor in (query, key, value))


def _decoded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: RangeMask | None,
    scaling: float | None,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """(B, 1, H, Dv): one query over a cache, read once."""
    ends, starts = (None, None) if mask is None else (mask.ends, mask.starts)
    output, lse = decode_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), ends, cache_leftpad=starts, scale=scaling,
        softcap=softcap, return_lse=True,
    )  # fmt: skip
    return output if sinks is None else _with_sinks(output, lse, sinks[:, None])


def _packed(
    mask: Tensor | Mask | None,
    is_causal: bool,
    bounds: Tensor,
    key_bounds: Tensor | None,
    longest: int | None,
    query: Tensor,
    keys: int,
) -> tuple[Tensor | Mask | None, bool]:
    """(mask, is_causal) with the bounds of sequences that are packed in one row, of queries as of keys, unless the mask
    itself tells sequences or padding apart."""
    if not (mask is None or (isinstance(mask, BandMask) and mask.ids is None and mask.offset == 0)):
        return mask, is_causal
    if query.shape[0] != 1 or query.shape[2] != keys:
        raise ValueError(
            "cu_seq_lens_q: fastattn takes sequences packed in one row, as many keys as queries; "
            f"got {query.shape[0]} rows of {query.shape[2]} queries and {keys} keys"
        )
    if key_bounds is not None and key_bounds is not bounds and not torch.equal(key_bounds, bounds):
        raise ValueError(
            "cu_seq_lens_k: fastattn takes sequences that begin where those of queries do; "
            f"got {key_bounds.tolist()} beside {bounds.tolist()}"
        )
    left, right = (mask.left, mask.right) if isinstance(mask, BandMask) else (-1, 0 if is_causal else -1)
    return PackedMask(bounds, keys if longest is None else int(longest), keys, left, right), False


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | Mask | None,
    is_causal: bool,
    bias: Tensor | None,
    sinks: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """(B, Sq, H, Dv), with what kind of mask it is said in the op's own words. sinks: those of each query."""
    queries, keys = query.shape[2], key.shape[2]
    if isinstance(mask, PackedMask) and bias is None and sinks is None and mask.shape[2:] == (queries, keys):
        return attention_varlen(
            query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), mask.bounds, mask.bounds,
            mask.longest, mask.longest, window_size=(mask.left, mask.right), enable_gqa=query.shape[1] != key.shape[1],
            **options,
        )[None]  # fmt: skip
    if isinstance(mask, BandMask) and keys <= mask.shape[3]:
        offset, left, right, ids = mask.offset, mask.left, mask.right, mask.ids
        end = offset + queries + right
        if right >= 0 and 0 < end <= keys:  # a triangle down to the last query's last key, and no key behind it counts
            key, value, is_causal = key[:, :, :end], value[:, :, :end], True
            bias = bias if bias is None or bias.shape[-1] == 1 else bias[..., :end]
            options["causal_alignment"] = "top_left" if end == queries else "bottom_right"
            if left >= 0:
                options["window"] = (left + right, 0)
        elif (left < 0 and right < 0) or offset in (0, keys - queries):
            options["causal_alignment"] = "top_left" if offset == 0 else "bottom_right"
            options["window"] = (left, right)
        else:
            mask, ids = mask.dense()[..., :keys], None
        if ids is not None:
            options["document_ids"] = (ids[0], ids[1][:, : key.shape[2]])
    if isinstance(mask, Mask):
        mask = None if isinstance(mask, BandMask) and keys <= mask.shape[3] else mask.dense()[..., :keys]
    attended = scaled_dot_product_attention(
        query, key, value, _joined(mask, bias, query), is_causal=is_causal,
        enable_gqa=query.shape[1] != key.shape[1], return_lse=sinks is not None, **options,
    )  # fmt: skip
    if sinks is None:
        return attended.transpose(1, 2)
    return _with_sinks(attended[0].transpose(1, 2), attended[1], sinks[..., 0])


def _weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | Mask | None,
    is_causal: bool,
    scaling: float | None,
    softcap: float,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """(B, H, Sq, Sk), the probabilities, by their definition: for output_attentions."""
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    wide = accumulation_dtype(query.dtype)
    scores = scale * (query.to(wide) @ keys.to(wide).transpose(2, 3))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if isinstance(mask, Mask):
        mask = mask.dense()[..., : key.shape[2]]
    elif mask is None and is_causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    joined = _joined(mask, bias, scores)
    if joined is not None:
        scores = torch.where(joined, scores, float("-inf")) if joined.dtype == torch.bool else scores + joined
    if sinks is not None:
        sink = sinks[:, None, None] if sinks.ndim == 1 else sinks
        scores = torch.cat((scores, sink.to(scores.dtype).expand(*scores.shape[:3], 1)), dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return weights.nan_to_num(0.0).to(query.dtype)  # queries that see nothing


def fastattn_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    output_attentions: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of Transformers' AttentionInterface, on fastattn's kernels.

    Args:
        module: the layer; its `is_causal` counts where there is neither a mask nor the argument of that name.
        query: (B, H, Sq, D). key: (B, Hkv, Sk, D), Hkv divides H. value: (B, Hkv, Sk, Dv).
        attention_mask: what fastattn_mask made; or a bool (True takes part) or additive tensor that broadcasts to
            (B, H, Sq, Sk); or None.
        scaling, dropout, softcap: as in scaled_dot_product_attention.
        s_aux: (H,) sinks. sinks: (B, H, Sq, 1), those of each query.
        position_bias: broadcasts to (B, H, Sq, Sk), added to the scores, differentiable.
        head_mask: (H,) or (1, H, 1, 1), factors of the heads' outputs.
        indices: (B, Sq, n), the only keys that each query sees; -1 is none.
        block_indices: (B, Hi, Sq, n), the only blocks of `module.indexer.block_size` keys that each query sees, Hi
            divides H; -1 is none. What the mask hides stays hidden.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q: where packed sequences begin and end, and the longest's length, as
            DataCollatorWithFlattening makes them; they count where the mask does not tell sequences apart.
        output_attentions: also return the weights, computed by their definition, before dropout.

    Returns:
        (B, Sq, H, Dv) contiguous, and the weights (B, H, Sq, Sk) or None.

    Raises:
        ValueError, BackendUnsupported: see scaled_dot_product_attention.
        ValueError: cu_seq_lens_q, where they count, with several rows, other keys than queries or other cu_seq_lens_k.
    """
    mask, keys = attention_mask, key.shape[2]
    if scaling == query.shape[3] ** -0.5:
        scaling = None  # the ops' default, which they take without a detour
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    is_causal = query.shape[2] > 1 and mask is None and is_causal
    if isinstance(mask, Tensor) and mask.shape[-1] > keys:
        mask = mask[..., :keys]
    if isinstance(mask, Tensor):
        mask = recognised(mask)
    bias = position_bias
    if indices is not None:
        bias = _joined(_listed(indices, keys)[:, None], bias, query)
    if block_indices is not None:
        blocks: Any = module.indexer
        bias = _joined(_listed_blocks(block_indices, blocks.block_size, query.shape[1], keys), bias, query)
    cap = softcap or 0.0
    weights = None
    if output_attentions:
        weights = _weights(query, key, mask, is_causal, scaling, cap, s_aux if sinks is None else sinks, bias)
    ranged = (mask is None or isinstance(mask, RangeMask)) and bias is None and sinks is None
    if ranged and dropout == 0.0 and _is_decode(query, key, value):
        output = _decoded(query, key, value, mask, scaling, cap, s_aux)
    else:
        options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "softcap": cap, "sinks": s_aux}
        if cu_seq_lens_q is not None:
            mask, is_causal = _packed(mask, is_causal, cu_seq_lens_q, cu_seq_lens_k, max_length_q, query, keys)
        output = _attended(query, key, value, mask, is_causal, bias, sinks, options)
    if head_mask is not None:
        output = output * head_mask.reshape(-1, 1)
    return output.contiguous(), weights
