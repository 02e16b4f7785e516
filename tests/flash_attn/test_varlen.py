"""flash_attn_varlen_func, its packed forms and pages: every sequence is what it is alone."""

import inspect

import pytest
import torch

from fastattn import testing
from fastattn.cases import Case, Suite
from fastattn.flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from fastattn.ops.attention.samples import NEAR_KEYS_FIRST, UNFUSED_PEER
from fastattn.testing.opcheck import available_backends

BACKENDS = available_backends("cpu")
#: Queries and keys of the sequences: one without queries, one without keys, one with dead rows.
LENGTHS = ((3, 8), (0, 5), (20, 20), (7, 0), (12, 9))
Q = [0, *torch.tensor([q for q, _ in LENGTHS]).cumsum(0).tolist()]
K = [0, *torch.tensor([k for _, k in LENGTHS]).cumsum(0).tolist()]


def one_by_one(query, key, value, alibi_slopes=None, **call):
    """The definition: flash_attn_func's reference of each sequence alone."""
    rows, statistics = [], []
    probabilities = query.new_zeros(len(LENGTHS), query.shape[1], 20, 20)
    for i, (queries, keys) in enumerate(LENGTHS):
        q, k = slice(Q[i], Q[i + 1]), slice(K[i], K[i + 1])
        slopes = alibi_slopes[i] if alibi_slopes is not None and alibi_slopes.ndim == 2 else alibi_slopes
        output, lse, p = flash_attn_func(
            query[q][None], key[k][None], value[k][None], **call, alibi_slopes=slopes, return_attn_probs=True,
            backend="reference",
        )  # fmt: skip
        rows.append(output[0])
        statistics.append(lse[0])
        probabilities[i, :, :queries, :keys] = p[0]
    return torch.cat(rows), torch.cat(statistics, 1), probabilities


def bounds(dtype=torch.int32):
    return torch.tensor(Q, dtype=dtype), torch.tensor(K, dtype=dtype), 20, 20


def case(name, unlike_law=UNFUSED_PEER, slopes=None, **call):
    def build(s):
        drawn = {"query": s.normal(Q[-1], 4, 16), "key": s.normal(K[-1], 2, 16), "value": s.normal(K[-1], 2, 16)}
        given = {} if slopes is None else {"alibi_slopes": s.uniform(*slopes, dtype=torch.float32)}
        return {**drawn, **call, **given}

    return Case(name, build, draws=3, core=name in ("window and softcap", "causal"), **unlike_law)


SUITE = Suite(
    "flash_attn_varlen_func", flash_attn_varlen_func, one_by_one, one_by_one, ("query", "key", "value"),
    ("output", "lse", "probabilities"),
    (
        case("plain"),
        case("causal", causal=True),
        case("window and softcap", window_size=(5, 2), softcap=2.0),
        case("scale", softmax_scale=0.4, causal=True),
        case("slopes", NEAR_KEYS_FIRST, (4,), causal=True),
        case("slopes of each sequence", NEAR_KEYS_FIRST, (len(LENGTHS), 4)),
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "case", "dtype"),
    [
        (backend, case, dtype)
        for backend in BACKENDS
        for case in SUITE.cases
        for dtype in (torch.float32, torch.bfloat16)
        if backend != "triton" or (case.core and dtype == torch.float32)  # the interpreter takes its time
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_every_sequence_is_what_it_is_alone(case, backend, dtype):
    def function(query, key, value, **call):
        return flash_attn_varlen_func(query, key, value, *bounds(), **call, return_attn_probs=True, backend=backend)

    testing.check(function, SUITE, case, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_what_the_probabilities_say(backend, hold_to):
    torch.manual_seed(0)
    q, k, v = torch.randn(Q[-1], 4, 16), torch.randn(K[-1], 4, 16), torch.randn(K[-1], 4, 16)
    output, _, signed = flash_attn_varlen_func(
        q, k, v, *bounds(), 0.3, causal=True, return_attn_probs=True, backend=backend
    )

    def kept(q, k, v):
        probabilities = one_by_one(q, k, v, causal=True)[2] * (signed > 0) / 0.7
        return torch.cat([
            torch.einsum("hij,jhd->ihd", probabilities[i, :, :queries, :keys], v[K[i] : K[i + 1]])
            for i, (queries, keys) in enumerate(LENGTHS)
        ])  # fmt: skip

    hold_to(kept, (q, k, v), [output])
    dropped = (signed[2] < 0).sum() / (signed[2] != 0).sum()
    assert 0.2 < dropped < 0.4


TAIL = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic",
        "return_attn_probs"]  # fmt: skip
BOTH = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (flash_attn_varlen_func, ["q", "k", "v", *BOTH, *TAIL, "block_table"]),
        (flash_attn_varlen_kvpacked_func, ["q", "kv", *BOTH, *TAIL]),
        (flash_attn_varlen_qkvpacked_func, ["qkv", "cu_seqlens", "max_seqlen", *TAIL]),
    ],
)
def test_signatures_are_flash_attentions(function, names):
    parameters = inspect.signature(function).parameters
    assert [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY] == names


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_forms_are_the_plain_one(backend):
    qkv = torch.randn(K[-1], 3, 2, 16, requires_grad=True)
    q, k, v = (part.detach().clone().requires_grad_() for part in qkv.unbind(1))
    ends = torch.tensor(K, dtype=torch.int32)
    expected = flash_attn_varlen_func(q, k, v, ends, ends, 20, 20, causal=True, backend=backend)
    grad = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, (q, k, v), grad)
    output = flash_attn_varlen_qkvpacked_func(qkv, ends, 20, causal=True, backend=backend)
    assert torch.equal(output, expected)
    assert torch.equal(torch.autograd.grad(output, qkv, grad)[0], torch.stack(grads, 1))
    kv = torch.stack((k, v), 1).detach().requires_grad_()
    output = flash_attn_varlen_kvpacked_func(q, kv, ends, ends, 20, 20, causal=True, backend=backend)
    assert torch.equal(output, expected)
    assert torch.equal(torch.autograd.grad(output, kv, grad)[0], torch.stack(grads[1:], 1))


def paged(k, v, size, spare=3):
    """The keys of all sequences in pages of any order, what is no key NaN; and the table, wrong behind the ends."""
    each = max(-(-keys // size) for _, keys in LENGTHS)
    order = torch.randperm(len(LENGTHS) * each + spare)[: len(LENGTHS) * each].view(-1, each)
    pools = [torch.full((len(LENGTHS) * each + spare, size, *t.shape[1:]), torch.nan) for t in (k, v)]
    table = order.to(torch.int32)
    for i, (_, keys) in enumerate(LENGTHS):
        for j in range(keys):
            for pool, rows in zip(pools, (k, v), strict=True):
                pool[order[i, j // size], j % size] = rows[K[i] + j]
        table[i, -(-keys // size) :] = 2**30
    return *pools, table


@pytest.mark.parametrize(
    ("size", "backend"),
    [(size, backend) for size in (1, 4, 32) for backend in BACKENDS if backend != "triton" or size == 4],
)
def test_pages(size, backend):
    torch.manual_seed(1)
    q, k, v = torch.randn(Q[-1], 4, 16), torch.randn(K[-1], 2, 16), torch.randn(K[-1], 2, 16)
    call = {"causal": True, "return_attn_probs": True, "backend": backend}
    expected = flash_attn_varlen_func(q, k, v, *bounds(), **call)
    *pools, table = paged(k, v, size)
    pools = [pool.requires_grad_() for pool in pools]
    ends_q, ends_k, _, _ = bounds(torch.int64)
    results = flash_attn_varlen_func(q, *pools, ends_q, ends_k, 20, 40, block_table=table, **call)
    assert results[2].shape == (len(LENGTHS), 4, 20, 40) and not results[2][..., 20:].any()
    for result, other in zip((*results[:2], results[2][..., :20]), expected, strict=True):
        assert torch.equal(result, other)
    grads = torch.autograd.grad(results[0].sum(), pools)
    k, v = k.requires_grad_(), v.requires_grad_()
    output = flash_attn_varlen_func(q, k, v, *bounds(), causal=True, backend=backend)
    plain = torch.autograd.grad(output.sum(), (k, v))
    for grad, rows in zip(grads, plain, strict=True):
        for i, (_, keys) in enumerate(LENGTHS):
            places = [(int(table[i, j // size]), j % size) for j in range(keys)]
            if places:
                found = torch.stack([grad[place] for place in places])
                assert torch.equal(found, rows[K[i] : K[i + 1]])


def test_compiled_with_pages():
    torch._dynamo.reset()
    q, k, v = torch.randn(Q[-1], 2, 16), torch.randn(K[-1], 2, 16), torch.randn(K[-1], 2, 16)
    *pools, table = paged(k, v, 4)
    table.clamp_(max=0)

    def call(q, k, v, ends_q, ends_k, table):
        return flash_attn_varlen_func(q, k, v, ends_q, ends_k, 20, 20, causal=True, block_table=table)

    arguments = (q, *pools, *bounds()[:2], table)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), call(*arguments))


def small(**changes):
    arguments = {
        "q": torch.randn(5, 2, 8), "k": torch.randn(4, 3, 2, 8), "v": torch.randn(4, 3, 2, 8),
        "cu_seqlens_q": torch.tensor([0, 2, 5]), "cu_seqlens_k": torch.tensor([0, 4, 9]), "max_seqlen_q": 3,
        "max_seqlen_k": 5, "block_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
    }  # fmt: skip
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (small(block_table=torch.tensor([[0, 4], [2, 3]], dtype=torch.int32)), RuntimeError,
         r"block_table\[0, 1\] = 4 is not in \[0, 4\)"),
        (small(block_table=torch.tensor([[0, 1], [-1, 3]], dtype=torch.int32)), RuntimeError,
         r"block_table\[1, 0\] = -1 is not in \[0, 4\)"),
        (small(block_table=torch.zeros(2, 2, dtype=torch.int64)), ValueError, "block_table must be int32"),
        (small(block_table=torch.zeros(3, 2, dtype=torch.int32)), ValueError,
         r"cu_seqlens_k must have shape \(4,\) with a block_table of 3 rows"),
        (small(k=torch.randn(12, 2, 8)), ValueError, r"k and v must be \(pages, page size, Hkv, D\)"),
        (small(max_seqlen_k=4), RuntimeError, r"seqused_k must be in \[0, 4\], got 5 at 1"),
        (small(cu_seqlens_q=torch.tensor([0, 2, 6])), RuntimeError, r"cu_seq_q must be in \[0, 5\], got 6 at 2"),
        (small(block_table=None), ValueError, r"query, key and value are \(T, H, D\), got 3, 4 and 4"),
    ],
)  # fmt: skip
def test_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        flash_attn_varlen_func(**arguments)


def test_packed_tensors_that_do_not_fit_are_refused():
    ends = torch.tensor([0, 5])
    with pytest.raises(ValueError, match=r"qkv must be \(T, 3, H, D\), got \(5, 2, 4, 8\)"):
        flash_attn_varlen_qkvpacked_func(torch.randn(5, 2, 4, 8), ends, 5)
    with pytest.raises(ValueError, match=r"kv must be \(T, 2, H, D\), got \(5, 3, 4, 8\)"):
        flash_attn_varlen_kvpacked_func(torch.randn(5, 4, 8), torch.randn(5, 3, 4, 8), ends, ends, 5, 5)
