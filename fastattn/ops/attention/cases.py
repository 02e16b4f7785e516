"""Sample problems and workloads of attention, its definition in plain torch, and torch's peer.

Shapes as in op.py: B batch, H query heads, Hkv key heads, Sq queries, Sk keys, D head dim, Dv value dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import philox
from fastattn.cases import Arguments, Case, Sampler, Suite, Workload
from fastattn.numerics import accumulation_dtype
from fastattn.ops.attention.op import scaled_dot_product_attention

Draw = Callable[..., Tensor]
Mask = Callable[[Sampler, tuple[int, ...]], Tensor]


def _visible(query: Tensor, key: Tensor, alignment: str) -> Tensor:
    """bool (Sq, Sk), True where causality lets query i see key j."""
    i = torch.arange(query.shape[-2], device=query.device)[:, None]
    j = torch.arange(key.shape[-2], device=query.device)[None, :]
    return j <= (i if alignment == "top_left" else i + key.shape[-2] - query.shape[-2])


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
) -> Any:
    """Attention written down, in the dtype of its inputs; queries that see no key give 0 and lse -inf."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query @ key.transpose(-1, -2)) * factor
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        else:
            scores = scores + attn_mask.to(scores.dtype)
    if is_causal:
        scores = scores.masked_fill(~_visible(query, key, causal_alignment), -torch.inf)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    # Dead rows go around softmax, whose gradient would be NaN there.
    live_scores = scores.masked_fill(dead, 0.0)
    weights = torch.softmax(live_scores, -1).masked_fill(dead, 0.0)
    if dropout_p > 0.0:
        assert seed is not None
        *batch, heads, queries, keys = weights.shape if weights.ndim > 2 else (1, *weights.shape)
        state = philox.fixed(seed, query.device)
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
    # torch 2.10 divides by zero where a tensor is empty.
    if call.get("dropout_p") or query.numel() == 0 or key.numel() == 0:
        return definition(query, key, value, attn_mask, is_causal=causal, causal_alignment=alignment, **call)
    mask = attn_mask if attn_mask is None or attn_mask.ndim > 1 else attn_mask[None, :]
    if causal and (mask is not None or alignment == "bottom_right"):
        visible = _visible(query, key, alignment)
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


def _contiguous(s: Sampler, *shape: int) -> Tensor:
    return s.normal(*shape)


def _bshd(s: Sampler, b: int, h: int, length: int, e: int) -> Tensor:
    """(B, S, H, E) in memory."""
    return s.normal(b, length, h, e).transpose(1, 2)


def _columns_first(s: Sampler, b: int, h: int, length: int, e: int) -> Tensor:
    """The last stride is not 1."""
    return s.normal(b, h, e, length).transpose(2, 3)


def _every_other(s: Sampler, b: int, h: int, length: int, e: int) -> Tensor:
    """The last stride is 2."""
    return s.normal(b, h, length, 2 * e)[..., ::2]


def _expanded_heads(s: Sampler, b: int, h: int, length: int, e: int) -> Tensor:
    """One head seen h times through a stride of 0."""
    return s.normal(b, 1, length, e).expand(b, h, length, e)


def _expanded_batch(s: Sampler, b: int, h: int, length: int, e: int) -> Tensor:
    return s.normal(1, h, length, e).expand(b, h, length, e)


def _sliced(s: Sampler, b: int, h: int, length: int, e: int) -> Tensor:
    """Starts inside a larger tensor, at an address that is aligned to nothing, with gaps between rows."""
    return s.normal(b, h + 1, length + 3, e + 5)[:, 1:, 1:-2, 3:-2]


def _large(s: Sampler, *shape: int) -> Tensor:
    return s.normal(*shape, std=8.0)


def _build(
    shape: tuple[int, int, int, int, int],
    kv_heads: int | None = None,
    value_dim: int | None = None,
    draw: Draw = _contiguous,
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


def _bool_mask(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    mask = s.chance(*shape, p=0.7)
    mask[..., :1] = True
    return mask


def _additive(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    return s.normal(*shape)


def _additive_float(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    return s.normal(*shape, dtype=accumulation_dtype(s.dtype))


def _additive_inf(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    """0 and -inf, as most models write it."""
    return torch.zeros(shape, dtype=s.dtype, device=s.device).masked_fill(~_bool_mask(s, shape), -torch.inf)


def _smallest(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    """0 and the dtype's smallest number, whole rows of it too: those attend to everything alike."""
    mask = s.chance(*shape, p=0.7)
    mask[..., 3, :] = False
    return torch.zeros(shape, dtype=s.dtype, device=s.device).masked_fill(~mask, torch.finfo(s.dtype).min)


def _dead_rows(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    mask = s.chance(*shape, p=0.5)
    mask[..., 1::3, :] = False
    return mask


def _dead_rows_inf(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    return s.normal(*shape).masked_fill(~_dead_rows(s, shape), -torch.inf)


def _padding(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    """(B, 1, 1, Sk): sequences of different lengths."""
    batch, _, _, keys = shape
    lengths = torch.tensor([max(keys * (batch - b) // batch, 1) for b in range(batch)])
    return (torch.arange(keys) < lengths[:, None])[:, None, None, :].to(s.device)


def _documents(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    """(1, 1, Sq, Sk): three documents in a row that do not see each other."""
    queries, keys = (torch.arange(n, device=s.device) * 3 // n for n in shape[2:])
    return (queries[:, None] == keys[None, :])[None, None]


def _window(s: Sampler, shape: tuple[int, ...]) -> Tensor:
    """(Sq, Sk): query i sees keys i-20 .. i+20."""
    i, j = (torch.arange(n, device=s.device) for n in shape[2:])
    return (i[:, None] - j[None, :]).abs() <= 20


def _pattern(kind: Mask, full: tuple[bool, ...]) -> Mask:
    """A mask whose dimensions are full or 1."""
    return lambda s, shape: kind(s, tuple(n if f else 1 for n, f in zip(shape, full, strict=True)))


def _last_dims(kind: Mask, dims: int) -> Mask:
    """A mask with only the last dims of (B, H, Sq, Sk)."""
    return lambda s, shape: kind(s, shape[4 - dims :])


def _transposed_mask(kind: Mask) -> Mask:
    """The same kind of mask with a last stride that is not 1."""
    return lambda s, shape: kind(s, (*shape[:2], shape[3], shape[2])).transpose(2, 3)


def _expanded_mask(kind: Mask) -> Mask:
    """Full size, strides of 0 in batch, heads and queries."""
    return lambda s, shape: kind(s, (1, 1, 1, shape[3])).expand(shape)


def _sliced_mask(kind: Mask) -> Mask:
    """The last columns of a wider mask: rows with gaps, starting at an address that is aligned to nothing."""
    return lambda s, shape: kind(s, (*shape[:3], shape[3] + 11))[..., 11:]


WITH_MASK = ("query", "key", "value", "attn_mask")
# Where torch has no fused function its peer is unfused autograd, which keeps the probabilities.
UNFUSED_PEER: dict[str, Any] = {
    "element_factor": 5.0,
    "reason": "probabilities are recomputed from lse, whose rounding is an error of the whole row",
}
LARGE_LSE: dict[str, Any] = {
    "norm_factor": 8.0,
    "element_factor": 8.0,
    "reason": "half a unit in the last place of an lse of 300 is 1.5e-5, an error of the whole row's probabilities",
}
LONG_SUMS: dict[str, Any] = {
    "norm_factor": 2.5,
    "element_factor": 4.0,
    "reason": "a score is one chain of additions along the head dim, where torch's matrix product has several",
}
ONE_VISIBLE_KEY: dict[str, Any] = {
    "roundings": 4.0,
    "reason": "the only probability is 1: exact in torch, recomputed from lse here",
}
SMALL = (2, 3, 37, 45, 16)
ROUNDING_ONLY = ("value",)  # with one key the gradients of query and key are 0: what is left of them is rounding


def _sizes() -> Iterator[Case]:
    for dim in (1, 2, 3, 7, 8, 15, 16, 31, 33, 64, 65, 80, 100, 127, 128, 256, 512):
        yield Case(
            f"head dim {dim}",
            _build((2, 2, 35, 50, dim)),
            draws=16 if dim < 4 else 4,
            core=dim in (1, 31, 64, 80, 512),
            **(LONG_SUMS if dim >= 256 else {}),
        )
    for dim, value_dim in ((16, 24), (64, 128), (128, 64), (40, 1), (1, 17), (33, 5), (24, 512)):
        yield Case(f"value dim {value_dim} of {dim}", _build((2, 2, 33, 41, dim), value_dim=value_dim), draws=16)
    lengths = (
        (1, 40), (1, 300), (2, 2), (3, 130), (15, 17), (16, 16), (17, 15), (63, 65), (64, 64), (65, 63),
        (128, 128), (129, 257), (200, 70), (40, 513), (300, 300),
    )  # fmt: skip
    for queries, keys in lengths:
        yield Case(f"{queries} queries {keys} keys", _build((1, 2, queries, keys, 32)), core=keys in (65, 257, 513))
    yield Case("1 key", _build((2, 2, 40, 1, 16)), differentiable=ROUNDING_ONLY)
    yield Case("1 query 1 key", _build((2, 2, 1, 1, 16)), differentiable=ROUNDING_ONLY)
    yield Case("many heads of one query", _build((3, 16, 1, 128, 64)))
    yield Case("one head of many queries", _build((1, 1, 520, 130, 24)))
    yield Case("no queries", _build((2, 3, 0, 5, 8), return_lse=True))
    yield Case("no keys", _build((2, 3, 4, 0, 8), return_lse=True), core=True)
    yield Case("no batch", _build((0, 3, 4, 5, 8)))
    yield Case("no heads", _build((2, 0, 4, 5, 8)))
    for heads, kv_heads in ((4, 2), (6, 1), (9, 3), (8, 1)):
        yield Case(
            f"gqa {heads} heads on {kv_heads}", _build((2, heads, 33, 50, 24), kv_heads=kv_heads), core=heads == 6
        )
    yield Case("gqa causal mask", _build((2, 6, 70, 70, 16), kv_heads=2, is_causal=True, mask=_bool_mask))
    yield Case(
        "gqa additive mask of each head",
        _build((2, 6, 30, 40, 16), kv_heads=2, mask=_pattern(_additive, (False, True, True, True))),
        differentiable=WITH_MASK,
        core=True,
        **UNFUSED_PEER,
    )


def _masks() -> Iterator[Case]:
    for full in itertools.product((True, False), repeat=4):
        name = "x".join(letter if f else "1" for letter, f in zip(("B", "H", "Sq", "Sk"), full, strict=True))
        core = full in ((True,) * 4, (True, False, False, True), (False, False, True, False))
        yield Case(f"bool mask {name}", _build(SMALL, mask=_pattern(_bool_mask, full)), core=core)
        # What is added to a whole row does not change its softmax: only lse gives such a mask a gradient.
        lse = not full[3]
        additive: dict[str, Mask] = {"additive": _additive, "float": _additive_float}
        for kind, mask in additive.items():
            build = _build(SMALL, mask=_pattern(mask, full), return_lse=lse)
            yield Case(
                f"{kind} mask {name}",
                build,
                differentiable=WITH_MASK,
                draws=16 if lse else 4,
                core=core and not lse,
                **UNFUSED_PEER,
            )
    for dims in (1, 2, 3):
        yield Case(f"bool mask of {dims} dims", _build(SMALL, mask=_last_dims(_bool_mask, dims)))
        build = _build(SMALL, mask=_last_dims(_additive, dims))
        yield Case(f"additive mask of {dims} dims", build, differentiable=WITH_MASK, **UNFUSED_PEER)
    kinds: dict[str, Mask] = {
        "bool": _bool_mask, "additive": _additive, "float": _additive_float, "inf": _additive_inf,
        "padding": _padding, "documents": _documents, "window": _window, "smallest": _smallest,
        "dead rows": _dead_rows, "dead rows inf": _dead_rows_inf,
    }  # fmt: skip
    for name, mask in kinds.items():
        lenience = UNFUSED_PEER if "dead" in name else {}
        build = _build((2, 2, 150, 170, 32), mask=mask)
        yield Case(f"{name} 150x170", build, core=name in ("window", "dead rows inf"), **lenience)
        build = _build((2, 2, 70, 70, 24), mask=mask, is_causal=True)
        yield Case(f"{name} causal", build, core=name == "dead rows", **lenience)
        build = _build((2, 2, 50, 90, 24), mask=mask, is_causal=True, causal_alignment="bottom_right")
        yield Case(f"{name} causal bottom right", build, **lenience)
    for name in ("bool", "additive", "float"):
        mask = kinds[name]
        yield Case(f"{name} mask transposed", _build((2, 2, 37, 50, 16), mask=_transposed_mask(mask)))
        yield Case(f"{name} mask expanded", _build((2, 2, 37, 50, 16), mask=_expanded_mask(mask)))
        yield Case(f"{name} mask sliced", _build((2, 2, 37, 50, 16), mask=_sliced_mask(mask)))
    yield Case("mask of dead rows only", _build(SMALL, mask=lambda s, n: torch.zeros(n, dtype=torch.bool)))
    build = _build(SMALL, mask=_dead_rows_inf)
    yield Case("mask with gradient over dead rows", build, differentiable=WITH_MASK, **UNFUSED_PEER)


def _causal() -> Iterator[Case]:
    lengths = ((50, 50), (64, 64), (130, 130), (300, 300), (30, 100), (100, 30), (1, 30), (30, 1), (200, 199))
    for queries, keys in lengths:
        for alignment in ("top_left", "bottom_right"):
            yield Case(
                f"causal {alignment} {queries}x{keys}",
                _build((1, 2, queries, keys, 32), is_causal=True, causal_alignment=alignment),
                differentiable=ROUNDING_ONLY if 1 in (queries, keys) else None,
                core=queries in (100, 300),
                **(ONE_VISIBLE_KEY if 1 in (queries, keys) else UNFUSED_PEER if queries == 100 else {}),
            )
    yield Case("causal of large scores", _build((1, 2, 90, 90, 32), is_causal=True, draw=_large))


def _values() -> Iterator[Case]:
    for scale in (1.0, 0.02, -0.3, 0.0):
        yield Case(
            f"scale {scale}",
            _build((2, 2, 33, 50, 16), scale=scale),
            differentiable=ROUNDING_ONLY if scale == 0.0 else None,
            core=scale == -0.3,
        )
    yield Case("large values", _build((1, 2, 50, 70, 32), draw=_large))
    build = _build((1, 2, 50, 70, 32), draw=lambda s, *n: s.normal(*n, std=4.0), scale=2.0)
    yield Case("scores of hundreds", build, core=True, **LARGE_LSE)
    yield Case("tiny values", _build((1, 2, 50, 70, 32), draw=lambda s, *n: s.normal(*n, std=1e-3)))

    def nan_query(s: Sampler) -> Arguments:
        arguments = _build((1, 2, 40, 50, 16))(s)
        arguments["query"][0, 1, 7, 3] = torch.nan
        return arguments

    yield Case("NaN in a query", nan_query, core=True)


def _dropout() -> Iterator[Case]:
    for p in (0.1, 0.5, 0.9, 1.0):
        yield Case(f"dropout {p}", _build((2, 3, 40, 50, 16), dropout_p=p, seed=1234), core=p in (0.1, 1.0))
    yield Case("dropout causal", _build((2, 2, 130, 130, 32), dropout_p=0.2, seed=7, is_causal=True), core=True)
    yield Case("dropout mask", _build((2, 2, 66, 70, 32), dropout_p=0.2, seed=2**62 + 5, mask=_bool_mask))
    yield Case(
        "dropout additive mask",
        _build((2, 2, 66, 71, 32), dropout_p=0.3, seed=2**63 - 1, mask=_pattern(_additive, (False, True, True, True))),
        differentiable=WITH_MASK,
    )
    yield Case("dropout gqa", _build((2, 6, 33, 34, 16), kv_heads=2, dropout_p=0.2, seed=0))
    yield Case("dropout bshd", _build((2, 3, 65, 129, 16), draw=_bshd, dropout_p=0.2, seed=11))
    yield Case("dropout lse", _build((1, 2, 40, 45, 16), dropout_p=0.5, seed=3, return_lse=True))
    yield Case("dropout of dead rows", _build((2, 2, 40, 45, 16), dropout_p=0.5, seed=3, mask=_dead_rows))


def _layouts() -> Iterator[Case]:
    draws: dict[str, Draw] = {
        "bshd": _bshd, "columns first": _columns_first, "every other": _every_other,
        "expanded heads": _expanded_heads, "expanded batch": _expanded_batch, "sliced": _sliced,
    }  # fmt: skip
    for name, draw in draws.items():
        yield Case(f"{name}", _build((2, 3, 50, 70, 20), draw=draw), core=name in ("bshd", "sliced"))
        build = _build((2, 2, 70, 70, 64), draw=draw, is_causal=True)
        yield Case(f"{name} causal", build, **(UNFUSED_PEER if name == "every other" else {}))
    yield Case("bshd gqa", _build((2, 4, 50, 70, 20), kv_heads=2, draw=_bshd))
    yield Case("bshd one query", _build((2, 4, 1, 70, 20), draw=_bshd))

    def dims(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...] | None = None, **call: Any):
        def build(s: Sampler) -> Arguments:
            return {"query": s.normal(*query), "key": s.normal(*key), "value": s.normal(*(value or key)), **call}

        return build

    yield Case("2 dims", dims((20, 16), (30, 16)))
    yield Case("2 dims causal lse", dims((20, 16), (30, 16), is_causal=True, return_lse=True), **UNFUSED_PEER)
    yield Case("3 dims", dims((3, 20, 16), (3, 30, 16)), core=True)
    yield Case("3 dims dropout", dims((3, 20, 16), (3, 30, 16), dropout_p=0.3, seed=5))
    yield Case("5 dims", dims((2, 2, 3, 20, 16), (2, 2, 3, 30, 16), return_lse=True))
    yield Case("6 dims", dims((1, 2, 2, 2, 20, 8), (1, 2, 2, 2, 30, 8)))
    yield Case("batch dims broadcast", dims((4, 3, 20, 16), (1, 3, 30, 16)), core=True)
    yield Case("batch dims of two ranks", dims((2, 4, 3, 20, 16), (4, 3, 30, 16)))
    yield Case("value's batch broadcasts", dims((4, 3, 20, 16), (4, 3, 30, 16), (1, 3, 30, 24)))

    def five_dim_mask(*mask: int) -> Callable[[Sampler], Arguments]:
        return lambda s: {**dims((2, 2, 3, 20, 16), (2, 2, 3, 30, 16))(s), "attn_mask": s.normal(*mask)}

    for mask in ((20, 30), (3, 20, 30), (2, 2, 1, 20, 30), (2, 1, 3, 1, 30), (1, 1, 1, 20, 30)):
        yield Case(
            f"5 dims mask {'x'.join(map(str, mask))}", five_dim_mask(*mask), differentiable=WITH_MASK, **UNFUSED_PEER
        )

    def same_tensor(s: Sampler) -> Arguments:
        x = s.normal(2, 3, 40, 16)
        return {"query": x, "key": x, "value": x}

    yield Case("query is key is value", same_tensor)


def _lse() -> Iterator[Case]:
    yield Case("lse", _build((2, 3, 40, 50, 16), return_lse=True), core=True)
    yield Case("lse causal", _build((2, 2, 130, 130, 32), return_lse=True, is_causal=True))
    yield Case(
        "lse bottom right with dead rows",
        _build((1, 2, 90, 40, 32), return_lse=True, is_causal=True, causal_alignment="bottom_right"),
        core=True,
    )
    yield Case("lse bool mask", _build((2, 2, 40, 50, 16), return_lse=True, mask=_bool_mask))
    yield Case("lse mask", _build((2, 2, 40, 50, 16), return_lse=True, mask=_additive), differentiable=WITH_MASK)
    yield Case("lse dead rows", _build((2, 2, 40, 50, 16), return_lse=True, mask=_dead_rows_inf), core=True)
    yield Case("lse gqa", _build((2, 6, 33, 50, 16), kv_heads=3, return_lse=True))
    yield Case("lse bshd", _build((2, 4, 33, 50, 16), draw=_bshd, return_lse=True))
    yield Case("lse large", _build((1, 2, 50, 70, 32), draw=_large, return_lse=True), **LARGE_LSE)
    yield Case("lse of 1 key", _build((2, 2, 20, 1, 16), return_lse=True), differentiable=ROUNDING_ONLY)


def _unfused_peer(case: Case) -> Case:
    return case if case.reason else replace(case, **UNFUSED_PEER)


def workload(
    batch: int, heads: int, length: int, dim: int, *, causal: bool = False, quick: bool = False, bshd: bool = False
) -> Workload:
    live = length * (length + 1) // 2 if causal else length * length
    size = batch * heads * length * dim
    name = f"{batch}x{heads}x{length}x{dim}" + (" causal" if causal else "") + (" bshd" if bshd else "")
    return Workload(
        name,
        _build((batch, heads, length, length, dim), is_causal=causal, draw=_bshd if bshd else _contiguous),
        forward_flops=2 * batch * heads * live * 2 * dim,
        backward_flops=2 * batch * heads * live * 5 * dim,
        forward_elements=4 * size,
        backward_elements=8 * size,
        quick=quick,
    )


def _padded_bench(batch: int, heads: int, length: int, dim: int) -> Workload:
    live = length * sum(length * (batch - b) // batch for b in range(batch))
    size = batch * heads * length * dim
    return Workload(
        f"{batch}x{heads}x{length}x{dim} padded",
        _build((batch, heads, length, length, dim), mask=_padding),
        forward_flops=2 * heads * live * 2 * dim,
        backward_flops=2 * heads * live * 5 * dim,
        forward_elements=4 * size,
        backward_elements=8 * size,
    )


def _decode_bench(batch: int, heads: int, kv_heads: int, keys: int, dim: int) -> Workload:
    cache, rest = batch * kv_heads * keys * dim, batch * heads * dim
    return Workload(
        f"decode {batch}x{heads}/{kv_heads}x{keys}x{dim}",
        _build((batch, heads, 1, keys, dim), kv_heads=kv_heads),
        forward_flops=2 * batch * heads * keys * 2 * dim,
        backward_flops=2 * batch * heads * keys * 5 * dim,
        forward_elements=2 * cache + 2 * rest,
        backward_elements=4 * cache + 4 * rest,
    )


WORKLOADS = (
    *(
        workload(*shape, causal=causal, quick=True)
        for shape in ((8, 12, 128, 64), (1, 12, 1024, 64), (1, 8, 4096, 64), (1, 8, 4096, 128))
        for causal in (True, False)
    ),
    workload(4, 12, 1024, 64, causal=True),
    workload(8, 12, 512, 64),
    workload(1, 12, 1024, 64, causal=True, bshd=True),
    _padded_bench(8, 12, 512, 64),
    _decode_bench(1, 12, 12, 1024, 64),
    _decode_bench(1, 12, 4, 8192, 64),
    _decode_bench(8, 32, 8, 4096, 128),
)

SUITES = (
    Suite(
        name="attention",
        function=scaled_dot_product_attention,
        truth=definition,
        peer=peer,
        differentiable=("query", "key", "value"),
        results=("output", "lse"),
        # Largest errors of a few thousand elements are a matter of luck, torch's as well as ours.
        cases=tuple(
            replace(case, draws=max(case.draws, 4))
            for case in (
                *_sizes(),
                *_masks(),
                *_causal(),
                *_values(),
                *_layouts(),
                *map(_unfused_peer, (*_dropout(), *_lse())),
            )
        ),
        workloads=WORKLOADS,
        reads=True,  # in decoding only
    ),
)
