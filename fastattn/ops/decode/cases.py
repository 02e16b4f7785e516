"""Sample problems and workloads of decoding, its definition in plain torch, and torch's peer.

Shapes as in op.py: B batch, H query heads, Hkv heads of the cache, Sq queries, S slots, D head dim, Dv value dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.cases import Arguments, Case, Sampler, Suite, Workload
from fastattn.numerics import accumulation_dtype
from fastattn.ops.decode.op import decode_attention


def _keys_of(b: int, key_cache: Tensor, value_cache: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The keys and values of a sequence, (S, Hkv, D) and (S, Hkv, Dv)."""
    table, rows = call.get("block_table"), call.get("cache_batch_idx")
    lengths, leftpad = call.get("cache_seqlens"), call.get("cache_leftpad")
    found = []
    for cache in (key_cache, value_cache):
        if table is None:
            row = cache[b if rows is None else int(rows[b])]
        else:  # pages behind the end may not exist
            row = cache[table[b].long().clamp(0, cache.shape[0] - 1)].flatten(0, 1)
        end = row.shape[0] if lengths is None else int(lengths[b])
        found.append(row[0 if leftpad is None else int(leftpad[b]) : end])
    return found[0], found[1]


def _places(queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions among the keys: of queries (Sq, 1), of keys (1, S)."""
    i, j = torch.arange(queries, device=device), torch.arange(keys, device=device)
    return i[:, None] + keys - queries, j[None, :]


def _mask(queries: int, keys: int, call: dict[str, Any], device: torch.device) -> Tensor:
    """bool (Sq, S), True where a key is visible; the last query stands beside the last key."""
    left, right = call.get("window", (-1, -1))
    right = 0 if call.get("causal") else right
    i, j = _places(queries, keys, device)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if left >= 0:
        seen &= j >= i - left
    if right >= 0:
        seen &= j <= i + right
    return seen


def _bias(b: int, keys: int, query: Tensor, call: dict[str, Any]) -> Tensor:
    """What is added to the scores, (H, Sq, S): minus slope times distance."""
    slopes = call.get("alibi_slopes")
    heads, queries, _ = query.shape
    if slopes is None:
        return query.new_zeros(heads, queries, keys)
    i, j = _places(queries, keys, query.device)
    return -(slopes if slopes.ndim == 1 else slopes[b]).to(query.dtype)[:, None, None] * (i - j).abs()


def _each(attend: Callable[..., tuple[Tensor, Tensor]], query: Tensor, key_cache: Tensor, value_cache: Tensor,
          cache_seqlens: Tensor | None, call: dict[str, Any]) -> Any:  # fmt: skip
    """attend(b, query (H, Sq, D), keys (H, S, D), values) of every sequence, put together."""
    call = {**call, "cache_seqlens": cache_seqlens}
    batch, queries, heads, _ = query.shape
    output = query.new_zeros((batch, queries, heads, value_cache.shape[3]))
    lse = query.new_full((batch, heads, queries), -torch.inf, dtype=accumulation_dtype(query.dtype))
    for b in range(batch):
        key, value = _keys_of(b, key_cache, value_cache, call)
        if key.shape[0] > 0 and queries > 0:
            repeats = heads // key.shape[1]
            k, v = (t.transpose(0, 1).repeat_interleave(repeats, 0) for t in (key, value))
            out, sums = attend(b, query[b].transpose(0, 1), k, v, call)
            output[b], lse[b] = out.transpose(0, 1), sums
    return (output, lse) if call.get("return_lse") else output


def _written_out(b: int, q: Tensor, k: Tensor, v: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    scale = call.get("scale")
    scores = (q @ k.transpose(-1, -2)) * (1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)
    softcap = call.get("softcap", 0.0)
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + _bias(b, k.shape[1], q, call)
    seen = _mask(q.shape[1], k.shape[1], call, q.device)
    dead = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(dead, 0.0)
    output = torch.softmax(scores, -1).masked_fill(dead, 0.0) @ v
    return output, torch.logsumexp(scores, -1).masked_fill(dead.squeeze(-1), -torch.inf)


def definition(query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_seqlens: Tensor | None = None,
               **call: Any) -> Any:  # fmt: skip
    """Decoding written down, in the dtype of its inputs."""
    return _each(_written_out, query, key_cache, value_cache, cache_seqlens, call)


def _by_sdpa(b: int, q: Tensor, k: Tensor, v: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    seen = _mask(q.shape[1], k.shape[1], call, q.device)
    output, lse = _written_out(b, q, k, v, call)
    if call.get("softcap", 0.0) > 0.0 or not seen.any(-1).all():
        return output, lse
    mask = _bias(b, k.shape[1], q, call).masked_fill(~seen, -torch.inf)
    fused = F.scaled_dot_product_attention(q[None], k[None], v[None], mask[None], scale=call.get("scale"))
    return fused[0], lse


def peer(query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_seqlens: Tensor | None = None,
         **call: Any) -> Any:  # fmt: skip
    """torch's scaled_dot_product_attention: of the caches as they are where all of them is seen, else sequence by
    sequence; the definition where it cannot express the call."""
    if not call:
        q, k, v = (t.transpose(1, 2) for t in (query, key_cache, value_cache))
        if cache_seqlens is None or bool((cache_seqlens == k.shape[2]).all()):
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2)
    return _each(_by_sdpa, query, key_cache, value_cache, cache_seqlens, call)


def eager(query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_seqlens: Tensor | None = None) -> Tensor:
    """Two matrix products and a softmax over full caches, the heads that share keys folded into one product."""
    q, k, v = (t.transpose(1, 2) for t in (query, key_cache, value_cache))
    grouped = (q * q.shape[3] ** -0.5).reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    output = torch.softmax(grouped @ k.transpose(-1, -2), -1) @ v
    return output.reshape(*q.shape[:3], v.shape[3]).transpose(1, 2)


def _cache(s: Sampler, rows: int, slots: int, heads: int, dim: int, order: str) -> Tensor:
    if order == "heads first":
        return s.normal(rows, heads, slots, dim).transpose(1, 2)
    if order == "gaps":
        return s.normal(rows, slots + 1, heads + 1, dim + 3)[:, 1:, :-1, 1:-2]
    return s.normal(rows, slots, heads, dim)


def _build(
    b: int, h: int, hkv: int, sq: int, slots: int, d: int, dv: int | None = None, *, order: str = "slots first",
    lengths: tuple[int, ...] | None = None, leftpad: tuple[int, ...] | None = None,
    rows: tuple[int, ...] | None = None, page: int = 0, slopes: int = 0, std: float = 1.0, garbage: bool = False,
    **call: Any,
) -> Callable[[Sampler], Arguments]:  # fmt: skip
    """slopes: 1 for (H,), 2 for (B, H). page: the size of pages. rows: of a cache with two rows too many. garbage: NaN
    wherever no sequence is."""

    def build(s: Sampler) -> Arguments:
        arguments: Arguments = {"query": s.normal(b, sq, h, d, std=std)}
        pages = -(-slots // page) if page else 0
        count = b * pages + 2 if page else b + 2 if rows else b
        arguments["key_cache"] = _cache(s, count, page or slots, hkv, d, order)
        arguments["value_cache"] = _cache(s, count, page or slots, hkv, dv or d, order)
        ends = lengths or (slots,) * b
        if lengths:
            arguments["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32, device=s.device)
        if leftpad:
            arguments["cache_leftpad"] = torch.tensor(leftpad, dtype=torch.int64, device=s.device)
        if rows:
            arguments["cache_batch_idx"] = torch.tensor(rows, dtype=torch.int32, device=s.device)
        if page:
            table = torch.randperm(count, generator=s.generator)[: b * pages].view(b, pages).to(torch.int32)
            for i, end in enumerate(ends):  # nobody looks behind the end
                table[i, -(-end // page) :] = 2**31 - 1
            arguments["block_table"] = table.to(s.device)
        if slopes:
            shape = (h,) if slopes == 1 else (b, h)
            arguments["alibi_slopes"] = s.uniform(*shape, dtype=torch.float32)
        if garbage:
            for cache in (arguments["key_cache"], arguments["value_cache"]):
                for i, end in enumerate(ends):
                    cache[i, end:] = torch.nan
                    cache[i, : leftpad[i] if leftpad else 0] = torch.nan
        return {**arguments, **call}

    return build


def _cases() -> Iterator[Case]:
    for d in (1, 7, 16, 31, 33, 64, 80, 128, 256):
        yield Case(f"head dim {d}", _build(2, 4, 2, 1, 70, d), core=d in (7, 64, 128), draws=2)
    yield Case("value dim 24 of 40", _build(2, 4, 2, 1, 70, 40, 24), core=True, draws=2)
    for keys in (1, 2, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1100, 3000):
        yield Case(f"{keys} keys", _build(2, 2, 2, 1, keys, 64), core=keys in (17, 513), draws=2)
    for group in (2, 3, 4, 5, 8, 16):
        yield Case(f"{group} heads share", _build(2, 2 * group, 2, 1, 200, 64), core=group in (3, 16))
    for queries in (2, 3, 4, 7, 16, 17, 50, 300):
        for causal in (False, True):
            yield Case(
                f"{queries} queries{' causal' if causal else ''}",
                _build(2, 4, 2, queries, 530, 64, causal=causal, return_lse=True),
                core=queries in (4, 17) and causal,
            )
    yield Case("more queries than keys, causal", _build(2, 4, 2, 9, 5, 32, causal=True, return_lse=True), core=True)
    for order in ("heads first", "gaps"):
        yield Case(f"cache with {order}", _build(2, 6, 3, 2, 150, 64, order=order), core=True)
        yield Case(f"long cache with {order}", _build(2, 12, 12, 1, 1400, 64, order=order, return_lse=True))
    ragged: dict[str, Any] = {"lengths": (130, 0, 1, 77), "return_lse": True}
    yield Case("lengths", _build(4, 4, 2, 2, 130, 64, garbage=True, **ragged), core=True)
    yield Case("lengths, left padding", _build(4, 4, 2, 2, 130, 64, garbage=True, leftpad=(50, 0, 1, 76), **ragged))
    yield Case("lengths, rows of the cache", _build(4, 4, 2, 1, 130, 48, rows=(5, 0, 3, 2), **ragged), core=True)
    yield Case("a row twice", _build(2, 4, 2, 1, 30, 48, rows=(3, 3), lengths=(30, 20)))
    for page in (1, 3, 16, 128, 1000):
        yield Case(f"pages of {page}", _build(4, 4, 2, 2, 130, 64, page=page, **ragged), core=page in (1, 16))
    yield Case("pages, left padding, long", _build(2, 8, 2, 1, 2000, 64, page=48, lengths=(2000, 1333),
                                                   leftpad=(700, 20), return_lse=True), core=True)  # fmt: skip
    for window in ((0, 0), (5, 0), (40, 10), (-1, 3), (600, -1)):
        yield Case(f"window {window[0]},{window[1]}", _build(2, 4, 2, 20, 700, 64, window=window, return_lse=True),
                   core=window == (40, 10))  # fmt: skip
    yield Case("window, pages, lengths", _build(4, 4, 2, 3, 130, 64, page=7, window=(20, 0), **ragged), core=True)
    for cap in (2.0, 30.0):
        yield Case(
            f"softcap {cap:g}", _build(2, 4, 2, 3, 300, 64, softcap=cap, std=4.0, return_lse=True), core=cap == 2
        )
    for slopes in (1, 2):
        yield Case(f"alibi {slopes}-D", _build(2, 4, 2, 3, 700, 64, slopes=slopes, causal=True, return_lse=True),
                   core=slopes == 2)  # fmt: skip
    yield Case("everything", _build(3, 6, 2, 4, 900, 64, page=20, lengths=(900, 13, 555), leftpad=(3, 0, 500), slopes=2,
                                    window=(300, 0), softcap=20.0, causal=True, scale=0.2, return_lse=True),
               core=True)  # fmt: skip
    for splits in (1, 2, 7):
        yield Case(f"{splits} splits", _build(2, 4, 2, 1, 3000, 64, num_splits=splits, return_lse=True))
    for splits in (3, 100, 2**31):
        build = _build(2, 2, 1, 1, 1500, 16, lengths=(1500, 333), leftpad=(130, 0), num_splits=splits)
        yield Case(f"{splits} splits of ragged sequences", build, draws=4, core=splits == 100)
    for scale in (-0.3, 0.0, 1e-38, -1e-38):
        build = _build(2, 2, 1, 2, 40, 16, lengths=(33, 7), causal=True, scale=scale, return_lse=True)
        yield Case(f"scale {scale}", build, draws=4)
    yield Case("large scores", _build(2, 4, 2, 1, 300, 64, std=20.0))
    yield Case("large scores, many rows", _build(2, 16, 2, 2, 300, 64, std=20.0))
    for what, sizes in {"no sequences": (0, 2, 2, 1, 5, 8), "no queries": (2, 2, 2, 0, 5, 8),
                        "no slots": (2, 2, 2, 1, 0, 8)}.items():  # fmt: skip
        yield Case(what, _build(*sizes))


def workload(batch: int, heads: int, kv_heads: int, length: int, dim: int, *, quick: bool = False) -> Workload:
    """One query for every sequence of a full cache, each head's keys together in memory."""
    size = batch * kv_heads * length * dim
    return Workload(
        f"B{batch} H{heads}/{kv_heads} S{length} D{dim}",
        _build(batch, heads, kv_heads, 1, length, dim, order="heads first"),
        forward_flops=4 * batch * heads * length * dim,
        backward_flops=0,
        forward_elements=2 * size,
        backward_elements=0,
        quick=quick,
    )


WORKLOADS = (
    workload(1, 12, 12, 1024, 64, quick=True),
    workload(1, 12, 12, 8192, 64, quick=True),
    workload(8, 12, 12, 8192, 64),
    workload(1, 12, 4, 8192, 64, quick=True),
    workload(8, 32, 8, 4096, 128),
)

SUITES = (
    Suite(
        name="decode",
        function=decode_attention,
        truth=definition,
        peer=peer,
        differentiable=(),
        results=("output", "lse"),
        cases=tuple(_cases()),
        workloads=WORKLOADS,
        peers=(("eager", eager),),
        reads=True,
    ),
)
