"""Sample problems of packed sequences, their definition and torch's peer: attention, one sequence after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastattn import philox
from fastattn.cases import Arguments, Case, Sampler, Suite, Workload
from fastattn.numerics import accumulation_dtype
from fastattn.ops.attention import samples
from fastattn.ops.attention.varlen import attention_varlen, sequences_of


def _one_by_one(
    attend: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    window_size: tuple[int, int] = (-1, -1),
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    **call: Any,
) -> Any:
    outputs, statistics, at = [], [], 0
    sequences = sequences_of(query, key, cu_seq_q, cu_seq_k, seqused_k, max_q, max_k)
    rows = query.shape[0]
    for i, (q0, q1, k0, k1) in enumerate([*sequences, (rows, rows, 0, 0)]):
        outputs.append(query.new_zeros((q0 - at, query.shape[1], value.shape[2])))
        statistics.append(query.new_full((query.shape[1], q0 - at), -torch.inf))
        at = q1
        if q0 == q1:
            continue
        one = dict(call)
        if alibi_slopes is not None:
            one["alibi_slopes"] = alibi_slopes[i] if alibi_slopes.ndim == 2 else alibi_slopes
        q, k, v = (t.transpose(0, 1) for t in (query[q0:q1], key[k0:k1], value[k0:k1]))
        if dropout_p > 0.0:
            assert seed is not None
            state = philox.fixed(seed, query.device)
            one["keep"] = philox.keep_mask(state, dropout_p, i + 1, query.shape[1], q1 - q0, k1 - k0)[i]
            one["dropout_p"] = dropout_p
        output, lse = attend(
            q, k, v, window=window_size, causal_alignment="bottom_right", return_lse=True, **one
        )  # fmt: skip
        outputs.append(output.transpose(0, 1))
        statistics.append(lse.to(query.dtype) if lse.dtype != accumulation_dtype(query.dtype) else lse)
    nothing = sum(t[:0].sum() for t in (query, key, value))  # the result depends on all, be there sequences or not
    output = torch.cat(outputs) + nothing
    if return_aux is None:
        return output
    return output, torch.cat([s.to(accumulation_dtype(query.dtype)) for s in statistics], 1) + nothing


def definition(*args: Any, **call: Any) -> Any:
    """Attention written down, for every sequence."""
    return _one_by_one(samples.definition, *args, **call)


def peer(*args: Any, **call: Any) -> Any:
    """torch's scaled_dot_product_attention for every sequence, the definition where lse is wanted."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        if call.get("return_aux") is not None or "keep" in rest:
            return samples.definition(query, key, value, **rest)
        rest.pop("return_lse")
        # Torch's fused kernels take 4 dims only.
        output = samples.peer(query[None], key[None], value[None], **rest)[0]
        return output, query.new_zeros(output.shape[:-1])

    return _one_by_one(attend, *args, **call)


Lengths = tuple[int, ...]


def _packed(
    queries: Lengths,
    keys: Lengths | None = None,
    heads: int = 2,
    kv_heads: int | None = None,
    dim: int = 16,
    value_dim: int | None = None,
    before: int = 0,
    after: int = 0,
    dtype: torch.dtype = torch.int32,
    make: Callable[[Sampler], Arguments] = lambda s: {},
    lse: bool = False,
    strided: bool = False,
    **call: Any,
) -> Callable[[Sampler], Arguments]:
    """Arguments of sequences with these lengths; before, after: rows that belong to none."""
    keys = queries if keys is None else keys
    hkv = heads if kv_heads is None else kv_heads

    def bounds(lengths: Lengths) -> Tensor:
        return torch.tensor(list(itertools.accumulate((before, *lengths))), dtype=dtype)

    def build(s: Sampler) -> Arguments:
        def rows(lengths: Lengths, count: int, columns: int) -> Tensor:
            total = before + sum(lengths) + after
            if strided:
                return s.normal(count, total, columns + 3)[..., 1:-2].transpose(0, 1)
            return s.normal(total, count, columns)

        arguments: Arguments = {
            "query": rows(queries, heads, dim),
            "key": rows(keys, hkv, dim),
            "value": rows(keys, hkv, value_dim or dim),
            "cu_seq_q": bounds(queries).to(s.device),
            "cu_seq_k": bounds(keys).to(s.device),
            "max_q": max(queries, default=0),
            "max_k": max(keys, default=0),
        }
        if hkv != heads:
            arguments["enable_gqa"] = True
        if lse:
            arguments["return_aux"] = SimpleNamespace(lse=True)
        return {**arguments, **make(s), **call}

    return build


MIXED = (70, 1, 0, 130, 17, 200)
OTHER = (33, 40, 5, 0, 300, 64)


def _cases() -> Iterator[Case]:
    for name, queries, keys in (
        ("mixed", MIXED, None), ("of other lengths", MIXED, OTHER), ("one", (150,), None), ("none", (), None),
        ("empty", (0, 0), None), ("no keys", (5, 3), (0, 0)), ("no queries", (0, 0), (5, 3)),
        ("long", (600, 30), None), ("longer", (300, 513, 100), None),
    ):  # fmt: skip
        yield Case(name, _packed(queries, keys), core=name in ("of other lengths", "none"))
        for window in ((-1, 0), (40, 0), (7, 30)):
            build = _packed(queries, keys, window_size=window, dim=24)
            yield Case(f"{name} window {window[0]} {window[1]}", build, core=name == "of other lengths")
    yield Case("ones", _packed((1,) * 9, (20,) * 9), core=True)
    for dim in (80, 128, 256):
        yield Case(f"head dim {dim} causal", _packed((128, 200, 65), dim=dim, window_size=(-1, 0)))
    yield Case("lse", _packed(MIXED, OTHER, lse=True), core=True)
    yield Case("gqa", _packed(MIXED, OTHER, heads=6, kv_heads=2, window_size=(-1, 0)), core=True)
    yield Case("many heads", _packed(MIXED, heads=12, dim=8, window_size=(-1, 0)))
    yield Case("head dims", _packed(MIXED, OTHER, dim=40, value_dim=24))
    yield Case("head dim 64", _packed((128, 256, 65), dim=64, window_size=(-1, 0)))
    yield Case("int64", _packed(MIXED, OTHER, dtype=torch.int64))
    yield Case("rows of no sequence", _packed(MIXED, OTHER, before=3, after=11, lse=True), core=True)
    yield Case("strided", _packed(MIXED, OTHER, strided=True), core=True)
    yield Case("scale", _packed(MIXED, scale=-0.3))
    used = (30, 0, 5, 0, 123, 64)
    yield Case("seqused_k", _packed(MIXED, OTHER, seqused_k=torch.tensor(used), window_size=(-1, 0)), core=True)
    yield Case("seqused_k int32 lse", _packed(MIXED, OTHER, seqused_k=torch.tensor(used).int(), lse=True))
    yield Case("softcap", _packed(MIXED, OTHER, softcap=1.5))
    slopes = torch.tensor([0.3, 0.05])
    yield Case("alibi", _packed(MIXED, OTHER, alibi_slopes=slopes))
    yield Case("alibi of each sequence", _packed(MIXED, OTHER, alibi_slopes=slopes * torch.arange(6)[:, None] / 8))
    yield Case("sinks", _packed(MIXED, OTHER, make=lambda s: {"sinks": s.normal(2)}, lse=True), core=True)
    yield Case(
        "sinks softcap window gqa",
        _packed(
            MIXED, OTHER, heads=4, kv_heads=2, softcap=2.0, window_size=(50, 0), make=lambda s: {"sinks": s.normal(4)}
        ),
    )
    yield Case("dropout", _packed(MIXED, OTHER, dropout_p=0.3, seed=5), core=True)
    yield Case(
        "dropout causal sinks",
        _packed(MIXED, dropout_p=0.3, seed=5, window_size=(-1, 0), make=lambda s: {"sinks": s.normal(2)}),
    )


def _drawn(case: Case) -> Case:
    return replace(case, draws=16 if "sinks" in case.name else 4)


def attention_varlen_workload(rows: int, heads: int, dim: int, *, quick: bool = False) -> Workload:
    """Causal sequences of a half, a quarter, an eighth and so on of the packed rows, down to two of a sixteenth."""
    lengths = [rows // 2, rows // 4, rows // 8, rows // 16]
    lengths.append(rows - sum(lengths))
    live = sum(n * (n + 1) // 2 for n in lengths)
    size = rows * heads * dim
    return Workload(
        f"{len(lengths)} sequences of {rows}x{heads}x{dim} causal",
        _packed(tuple(lengths), heads=heads, dim=dim, window_size=(-1, 0)),
        forward_flops=2 * heads * live * 2 * dim,
        backward_flops=2 * heads * live * 5 * dim,
        forward_elements=4 * size,
        backward_elements=8 * size,
        quick=quick,
    )


SUITE = Suite(
    name="attention_varlen",
    function=attention_varlen,
    truth=definition,
    peer=peer,
    differentiable=("query", "key", "value", "sinks"),
    results=("output", "lse"),
    cases=tuple(map(_drawn, _cases())),
    workloads=(attention_varlen_workload(2048, 8, 64, quick=True), attention_varlen_workload(4096, 8, 128)),
)
