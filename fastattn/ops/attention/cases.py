"""Sample problems and workloads of attention. Shapes as in op.py: B, H, Sq, Sk, D, Dv, Hkv."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from fastattn.cases import Arguments, Case, Sampler, Suite, Workload
from fastattn.ops.attention import feature_cases, varlen_cases
from fastattn.ops.attention.op import scaled_dot_product_attention
from fastattn.ops.attention.samples import (
    LARGE_LSE,
    ONE_VISIBLE_KEY,
    ROUNDING_ONLY,
    SMALL,
    UNFUSED_PEER,
    WITH_MASK,
    Draw,
    Mask,
    additive_mask,
    additive_mask_float,
    additive_mask_inf,
    blocks,
    bool_mask,
    bshd_order,
    columns_first,
    contiguous,
    dead_rows,
    dead_rows_inf,
    definition,
    documents,
    every_other,
    expanded_batch,
    expanded_heads,
    expanded_mask,
    infinite,
    large,
    last_dims,
    may_see,
    of_shape,
    padding,
    pattern,
    peer,
    sliced,
    sliced_mask,
    smallest,
    steps,
    transposed_mask,
    unfused_peer,
    window,
)


def _sizes() -> Iterator[Case]:
    for dim in (1, 2, 3, 7, 8, 15, 16, 31, 33, 64, 65, 80, 100, 127, 128, 256, 512):
        yield Case(
            f"head dim {dim}",
            of_shape((2, 2, 35, 50, dim)),
            draws=16 if dim < 4 else 4,
            core=dim in (1, 31, 64, 80, 512),
        )
    for dim, value_dim in ((16, 24), (64, 128), (128, 64), (40, 1), (1, 17), (33, 5), (24, 512)):
        yield Case(f"value dim {value_dim} of {dim}", of_shape((2, 2, 33, 41, dim), value_dim=value_dim), draws=16)
    lengths = (
        (1, 40), (1, 300), (2, 2), (3, 130), (15, 17), (16, 16), (17, 15), (63, 65), (64, 64), (65, 63),
        (128, 128), (129, 257), (200, 70), (40, 513), (300, 300),
    )  # fmt: skip
    for queries, keys in lengths:
        yield Case(f"{queries} queries {keys} keys", of_shape((1, 2, queries, keys, 32)), core=keys in (65, 257, 513))
    yield Case("1 key", of_shape((2, 2, 40, 1, 16)), differentiable=ROUNDING_ONLY)
    yield Case("1 query 1 key", of_shape((2, 2, 1, 1, 16)), differentiable=ROUNDING_ONLY)
    yield Case("many heads of one query", of_shape((3, 16, 1, 128, 64)))
    yield Case("one head of many queries", of_shape((1, 1, 520, 130, 24)))
    yield Case("no queries", of_shape((2, 3, 0, 5, 8), return_lse=True))
    yield Case("no keys", of_shape((2, 3, 4, 0, 8), return_lse=True), core=True)
    yield Case("no batch", of_shape((0, 3, 4, 5, 8)))
    yield Case("no heads", of_shape((2, 0, 4, 5, 8)))
    for heads, kv_heads in ((4, 2), (6, 1), (9, 3), (8, 1)):
        yield Case(
            f"gqa {heads} heads on {kv_heads}", of_shape((2, heads, 33, 50, 24), kv_heads=kv_heads), core=heads == 6
        )
    yield Case("gqa causal mask", of_shape((2, 6, 70, 70, 16), kv_heads=2, is_causal=True, mask=bool_mask))
    yield Case(
        "gqa additive mask of each head",
        of_shape((2, 6, 30, 40, 16), kv_heads=2, mask=pattern(additive_mask, (False, True, True, True))),
        differentiable=WITH_MASK,
        core=True,
        **UNFUSED_PEER,
    )


def _masks() -> Iterator[Case]:
    for full in itertools.product((True, False), repeat=4):
        name = "x".join(letter if f else "1" for letter, f in zip(("B", "H", "Sq", "Sk"), full, strict=True))
        core = full in ((True,) * 4, (True, False, False, True), (False, False, True, False))
        yield Case(f"bool mask {name}", of_shape(SMALL, mask=pattern(bool_mask, full)), core=core)
        # What is added to a whole row does not change its softmax: only lse gives such a mask a gradient.
        lse = not full[3]
        additive: dict[str, Mask] = {"additive": additive_mask, "float": additive_mask_float}
        for kind, mask in additive.items():
            build = of_shape(SMALL, mask=pattern(mask, full), return_lse=lse)
            yield Case(
                f"{kind} mask {name}",
                build,
                differentiable=WITH_MASK,
                draws=16 if lse else 4,
                core=core and not lse,
                **UNFUSED_PEER,
            )
    for dims in (1, 2, 3):
        yield Case(f"bool mask of {dims} dims", of_shape(SMALL, mask=last_dims(bool_mask, dims)))
        build = of_shape(SMALL, mask=last_dims(additive_mask, dims))
        yield Case(f"additive mask of {dims} dims", build, differentiable=WITH_MASK, **UNFUSED_PEER)
    kinds: dict[str, Mask] = {
        "bool": bool_mask, "additive": additive_mask, "float": additive_mask_float, "inf": additive_mask_inf,
        "padding": padding, "documents": documents, "window": window, "smallest": smallest,
        "dead rows": dead_rows, "dead rows inf": dead_rows_inf,
    }  # fmt: skip
    for name, mask in kinds.items():
        lenience = UNFUSED_PEER if "dead" in name else {}
        build = of_shape((2, 2, 150, 170, 32), mask=mask)
        yield Case(f"{name} 150x170", build, core=name in ("window", "dead rows inf"), **lenience)
        build = of_shape((2, 2, 70, 70, 24), mask=mask, is_causal=True)
        yield Case(f"{name} causal", build, core=name == "dead rows", **lenience)
        build = of_shape((2, 2, 50, 90, 24), mask=mask, is_causal=True, causal_alignment="bottom_right")
        yield Case(f"{name} causal bottom right", build, **lenience)
    for name in ("bool", "additive", "float"):
        mask = kinds[name]
        yield Case(f"{name} mask transposed", of_shape((2, 2, 37, 50, 16), mask=transposed_mask(mask)))
        yield Case(f"{name} mask expanded", of_shape((2, 2, 37, 50, 16), mask=expanded_mask(mask)))
        yield Case(f"{name} mask sliced", of_shape((2, 2, 37, 50, 16), mask=sliced_mask(mask)))
    edges: dict[str, Mask] = {
        "blocks 64x64": blocks(64, 64), "blocks 16x8": blocks(16, 8), "blocks 8x128": blocks(8, 128),
        "steps up": steps(16, 8, 72), "steps down": steps(16, -16, 160), "steps of 12 rows": steps(12, 8, 72),
        "steps of 12 keys": steps(32, 12, 72),
    }  # fmt: skip
    for name, mask in edges.items():
        yield Case(f"mask of {name}", of_shape((2, 2, 200, 300, 16), mask=mask), core=name == "blocks 64x64")
        build = of_shape((1, 2, 211, 331, 24), mask=infinite(mask), is_causal=True, causal_alignment="bottom_right")
        yield Case(f"mask of {name} inf causal", build, core=name == "steps up")
    yield Case("mask of blocks softcap", of_shape((2, 2, 200, 300, 16), mask=blocks(64, 64), softcap=1.5))
    build = of_shape((2, 4, 200, 300, 16), mask=blocks(16, 8), alibi_slopes=torch.tensor([0.0, 0.0, 0.01, 0.02]))
    yield Case("mask of blocks some alibi", build)
    yield Case("mask of dead rows only", of_shape(SMALL, mask=lambda s, n: torch.zeros(n, dtype=torch.bool)))
    build = of_shape(SMALL, mask=dead_rows_inf)
    yield Case("mask with gradient over dead rows", build, differentiable=WITH_MASK, **UNFUSED_PEER)


def _causal() -> Iterator[Case]:
    lengths = ((50, 50), (64, 64), (130, 130), (300, 300), (30, 100), (100, 30), (1, 30), (30, 1), (200, 199))
    for queries, keys in lengths:
        for alignment in ("top_left", "bottom_right"):
            yield Case(
                f"causal {alignment} {queries}x{keys}",
                of_shape((1, 2, queries, keys, 32), is_causal=True, causal_alignment=alignment),
                differentiable=ROUNDING_ONLY if 1 in (queries, keys) else None,
                core=queries in (100, 300),
                **(ONE_VISIBLE_KEY if 1 in (queries, keys) else UNFUSED_PEER if queries == 100 else {}),
            )
    yield Case("causal of large scores", of_shape((1, 2, 90, 90, 32), is_causal=True, draw=large))


def _values() -> Iterator[Case]:
    for scale in (1.0, 0.02, -0.3, 0.0):
        yield Case(
            f"scale {scale}",
            of_shape((2, 2, 33, 50, 16), scale=scale),
            differentiable=ROUNDING_ONLY if scale == 0.0 else None,
            core=scale == -0.3,
        )
    yield Case("large values", of_shape((1, 2, 50, 70, 32), draw=large))
    build = of_shape((1, 2, 50, 70, 32), draw=lambda s, *n: s.normal(*n, std=4.0), scale=2.0)
    yield Case("scores of hundreds", build, core=True)
    yield Case("tiny values", of_shape((1, 2, 50, 70, 32), draw=lambda s, *n: s.normal(*n, std=1e-3)))

    def nan_query(s: Sampler) -> Arguments:
        arguments = of_shape((1, 2, 40, 50, 16))(s)
        arguments["query"][0, 1, 7, 3] = torch.nan
        return arguments

    yield Case("NaN in a query", nan_query, core=True)


def _dropout() -> Iterator[Case]:
    for p in (0.1, 0.5, 0.9, 1.0):
        yield Case(f"dropout {p}", of_shape((2, 3, 40, 50, 16), dropout_p=p, seed=1234), core=p in (0.1, 1.0))
    yield Case("dropout causal", of_shape((2, 2, 130, 130, 32), dropout_p=0.2, seed=7, is_causal=True), core=True)
    yield Case("dropout mask", of_shape((2, 2, 66, 70, 32), dropout_p=0.2, seed=2**62 + 5, mask=bool_mask))
    yield Case(
        "dropout additive mask",
        of_shape(
            (2, 2, 66, 71, 32), dropout_p=0.3, seed=2**63 - 1, mask=pattern(additive_mask, (False, True, True, True))
        ),
        differentiable=WITH_MASK,
    )
    yield Case("dropout gqa", of_shape((2, 6, 33, 34, 16), kv_heads=2, dropout_p=0.2, seed=0))
    yield Case("dropout bshd", of_shape((2, 3, 65, 129, 16), draw=bshd_order, dropout_p=0.2, seed=11))
    yield Case("dropout lse", of_shape((1, 2, 40, 45, 16), dropout_p=0.5, seed=3, return_lse=True))
    yield Case("dropout of dead rows", of_shape((2, 2, 40, 45, 16), dropout_p=0.5, seed=3, mask=dead_rows))


def _layouts() -> Iterator[Case]:
    draws: dict[str, Draw] = {
        "bshd": bshd_order, "columns first": columns_first, "every other": every_other,
        "expanded heads": expanded_heads, "expanded batch": expanded_batch, "sliced": sliced,
    }  # fmt: skip
    for name, draw in draws.items():
        yield Case(f"{name}", of_shape((2, 3, 50, 70, 20), draw=draw), core=name in ("bshd", "sliced"))
        build = of_shape((2, 2, 70, 70, 64), draw=draw, is_causal=True)
        yield Case(f"{name} causal", build, **(UNFUSED_PEER if name == "every other" else {}))
    yield Case("bshd gqa", of_shape((2, 4, 50, 70, 20), kv_heads=2, draw=bshd_order))
    yield Case("bshd one query", of_shape((2, 4, 1, 70, 20), draw=bshd_order))

    def dims(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...] | None = None, **call: Any):
        def build(s: Sampler) -> Arguments:
            return {"query": s.normal(*query), "key": s.normal(*key), "value": s.normal(*(value or key)), **call}

        return build

    yield Case("2 dims", dims((20, 16), (30, 16)))
    yield Case("2 dims causal lse", dims((20, 16), (30, 16), is_causal=True, return_lse=True), **UNFUSED_PEER)
    yield Case("3 dims", dims((3, 20, 16), (3, 30, 16)), core=True)
    yield Case("3 dims dropout", dims((3, 20, 16), (3, 30, 16), dropout_p=0.3, seed=5))
    yield Case("5 dims", dims((2, 2, 3, 20, 16), (2, 2, 3, 30, 16), return_lse=True))
    yield Case("6 dims", dims((1, 2, 2, 2, 20, 8), (1, 2, 2, 2, 30, 8)), **UNFUSED_PEER)
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
    yield Case("lse", of_shape((2, 3, 40, 50, 16), return_lse=True), core=True)
    yield Case("lse causal", of_shape((2, 2, 130, 130, 32), return_lse=True, is_causal=True))
    yield Case(
        "lse bottom right with dead rows",
        of_shape((1, 2, 90, 40, 32), return_lse=True, is_causal=True, causal_alignment="bottom_right"),
        core=True,
    )
    yield Case("lse bool mask", of_shape((2, 2, 40, 50, 16), return_lse=True, mask=bool_mask))
    yield Case("lse mask", of_shape((2, 2, 40, 50, 16), return_lse=True, mask=additive_mask), differentiable=WITH_MASK)
    yield Case("lse dead rows", of_shape((2, 2, 40, 50, 16), return_lse=True, mask=dead_rows_inf), core=True)
    yield Case("lse gqa", of_shape((2, 6, 33, 50, 16), kv_heads=3, return_lse=True))
    yield Case("lse bshd", of_shape((2, 4, 33, 50, 16), draw=bshd_order, return_lse=True))
    yield Case("lse large", of_shape((1, 2, 50, 70, 32), draw=large, return_lse=True), **LARGE_LSE)
    yield Case("lse of 1 key", of_shape((2, 2, 20, 1, 16), return_lse=True), differentiable=ROUNDING_ONLY)


def workload(
    batch: int, heads: int, length: int, dim: int, *, causal: bool = False, quick: bool = False, bshd: bool = False
) -> Workload:
    live = length * (length + 1) // 2 if causal else length * length
    size = batch * heads * length * dim
    name = f"{batch}x{heads}x{length}x{dim}" + (" causal" if causal else "") + (" bshd" if bshd else "")
    return Workload(
        name,
        of_shape((batch, heads, length, length, dim), is_causal=causal, draw=bshd_order if bshd else contiguous),
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
        f"{batch}x{heads}x{length}x{dim} padded {live / (batch * length * length):.1%}",
        of_shape((batch, heads, length, length, dim), mask=padding),
        forward_flops=2 * heads * live * 2 * dim,
        backward_flops=2 * heads * live * 5 * dim,
        forward_elements=4 * size,
        backward_elements=8 * size,
    )


def _masked_bench(what: str, batch: int, heads: int, length: int, dim: int, **call: Any) -> Workload:
    """A workload whose mask is the same for all heads; its name ends in the share of the scores that are seen."""
    rows = torch.empty(length, 1)
    names = ("window", "document_ids", "prefix_len")
    described = {name: call[name] for name in names if name in call}
    seen = may_see(rows, rows, call.get("is_causal", False), "top_left", **described)
    if "mask" in call:
        seen = call["mask"](Sampler(0), (batch, heads, length, length))
    live = length * length if seen is None else int(seen.sum())
    size = batch * heads * length * dim
    return Workload(
        f"{batch}x{heads}x{length}x{dim} {what} {live / length**2:.1%}",
        of_shape((batch, heads, length, length, dim), **call),
        forward_flops=2 * batch * heads * live * 2 * dim,
        backward_flops=2 * batch * heads * live * 5 * dim,
        forward_elements=4 * size,
        backward_elements=8 * size,
    )


def _masked_benches() -> Iterator[Workload]:
    shape = (1, 8, 2048, 64)
    documents = torch.arange(2048) * 8 // 2048
    yield _masked_bench("window 256", *shape, window=(255, 0))
    yield _masked_bench("window +-512", *shape, window=(512, 512))
    yield _masked_bench("8 documents", *shape, document_ids=documents)
    yield _masked_bench("8 documents causal", *shape, document_ids=documents, is_causal=True)
    yield _masked_bench("prefix", *shape, prefix_len=512, is_causal=True)
    yield _masked_bench("blocks", *shape, mask=lambda s, shape: blocks(64, 64, 0.3)(Sampler(0, s.device), shape))


def _decode_bench(batch: int, heads: int, kv_heads: int, keys: int, dim: int) -> Workload:
    cache, rest = batch * kv_heads * keys * dim, batch * heads * dim
    return Workload(
        f"decode {batch}x{heads}/{kv_heads}x{keys}x{dim}",
        of_shape((batch, heads, 1, keys, dim), kv_heads=kv_heads),
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
    *_masked_benches(),
    _decode_bench(1, 12, 12, 1024, 64),
    _decode_bench(1, 12, 4, 8192, 64),
    _decode_bench(8, 32, 8, 4096, 128),
)

#: How --shape reads for the packed op's bench.
attention_varlen_workload = varlen_cases.attention_varlen_workload

SUITES = (
    Suite(
        name="attention",
        function=scaled_dot_product_attention,
        truth=definition,
        peer=peer,
        differentiable=("query", "key", "value", "sinks"),
        results=("output", "lse"),
        # Largest errors of a few thousand elements are a matter of luck, torch's as well as ours.
        cases=(
            *(
                replace(case, draws=max(case.draws, 4))
                for case in (
                    *_sizes(),
                    *_masks(),
                    *_causal(),
                    *_values(),
                    *_layouts(),
                    *map(unfused_peer, (*_dropout(), *_lse())),
                )
            ),
            *feature_cases.all_cases(),
        ),
        workloads=WORKLOADS,
        reads=True,  # in decoding only
    ),
    varlen_cases.SUITE,
)
