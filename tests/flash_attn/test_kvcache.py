"""flash_attn_with_kvcache: what it appends, what it rotates, what it refuses; against a formula of its own."""

import inspect
import itertools
import math

import pytest
import torch

from fastattn import testing
from fastattn.flash_attn import flash_attn_with_kvcache
from fastattn.testing.opcheck import available_backends

BACKENDS = available_backends("cpu")


def rotate(x, cos, sin, interleaved, positions):
    """x (S, H, D), one position for each row."""
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    half = cos.shape[1]
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    a, b, y = x[..., first], x[..., second], x.clone()
    y[..., first], y[..., second] = a * c - b * s, a * s + b * c
    return y


def attend(q, k, v, causal, window, softcap, slopes):
    """q (Sq, H, D), k (S, Hkv, D): (Sq, H, D)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[2])
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    distance = torch.arange(k.shape[0])[None, :] - (torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0])
    if slopes is not None:
        scores = scores - slopes.to(scores.dtype).view(-1, 1, 1) * distance.abs()
    left, right = window[0], 0 if causal else window[1]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1).nan_to_num(0.0)
    return torch.einsum("hij,jhd->ihd", weights, v)


class Caches:
    """Random caches, plain or paged, and where slot i of sequence b is."""

    def __init__(self, batch, slots, heads, dim, dtype, page=0, chosen=None):
        self.page, self.table, self.chosen = page, None, chosen
        rows = batch + 2 if chosen is not None else batch
        shape = (rows, slots, heads, dim)
        if page:
            each = -(-slots // page)
            self.table = torch.randperm(batch * each + 1)[: batch * each].view(batch, each).to(torch.int32)
            shape = (batch * each + 1, page, heads, dim)
        self.k, self.v = (torch.randn(shape).to(dtype) for _ in range(2))

    def at(self, b, i):
        if self.page:
            return int(self.table[b, i // self.page]), i % self.page
        return (b if self.chosen is None else int(self.chosen[b])), i

    def slots(self, cache, b, begin, end):
        return torch.stack([cache[self.at(b, i)] for i in range(begin, end)])

    def arguments(self):
        return {"k_cache": self.k, "v_cache": self.v, "block_table": self.table, "cache_batch_idx": self.chosen}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["plain", "rows", "pages of 1", "pages of 5", "pages of 16"])
@pytest.mark.parametrize(("style", "mask"), list(itertools.product((None, True, False), ("none", "causal", "window"))))
def test_against_a_formula(backend, kind, style, mask, dtype):
    torch.manual_seed(3)
    batch, slots, heads, kv_heads, dim, new = 3, 40, 6, 2, 32, 3
    page = int(kind.split()[-1]) if kind.startswith("pages") else 0
    chosen = torch.tensor([4, 0, 2], dtype=torch.int32) if kind == "rows" else None
    caches = Caches(batch, slots, kv_heads, dim, dtype, page, chosen)
    before_k, before_v = caches.k.clone(), caches.v.clone()
    q = torch.randn(batch, new, heads, dim).to(dtype)
    k, v = (torch.randn(batch, new, kv_heads, dim).to(dtype) for _ in range(2))
    lengths = torch.tensor([0, 37, 20], dtype=torch.int32)
    leftpad = torch.tensor([0, 30, 4], dtype=torch.int32)
    angles = torch.rand(slots, 12)
    cos, sin = (None, None) if style is None else (angles.cos().to(dtype), angles.sin().to(dtype))
    causal, window = mask == "causal", (6, 2) if mask == "window" else (-1, -1)
    slopes, softcap = (torch.rand(heads), 5.0) if mask == "window" else (None, 0.0)
    output, lse = flash_attn_with_kvcache(
        q, k=k, v=v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=lengths, cache_leftpad=leftpad, causal=causal,
        window_size=window, softcap=softcap, rotary_interleaved=bool(style), alibi_slopes=slopes,
        return_softmax_lse=True, backend=backend, **caches.arguments(),
    )  # fmt: skip
    assert output.shape == q.shape and output.dtype == dtype and lse.shape == (batch, heads, new)
    untouched = torch.ones(caches.k.shape[:2], dtype=torch.bool)
    for b in range(batch):
        begin, end = int(leftpad[b]), int(lengths[b])
        positions = end + torch.arange(new)
        places = positions if mask != "none" else torch.full((new,), end)
        query, key = q[b], k[b]
        if style is not None:
            exact = rotate(key.double(), cos.double(), sin.double(), style, positions)
            key = caches.slots(caches.k, b, end, end + new)
            testing.assert_lawful(key, rotate(k[b], cos, sin, style, positions), exact)
            query = rotate(query, cos, sin, style, places)
        else:
            assert torch.equal(caches.slots(caches.k, b, end, end + new), key)
        assert torch.equal(caches.slots(caches.v, b, end, end + new), v[b])
        for i in range(end, end + new):
            untouched[caches.at(b, i)] = False
        caches_now = [caches.slots(cache, b, begin, end + new) for cache in (caches.k, caches.v)]
        exact_query = q[b].double()
        if style is not None:
            exact_query = rotate(exact_query, cos.double(), sin.double(), style, places)
        truth = attend(exact_query, *(cache.double() for cache in caches_now), causal, window, softcap, slopes)
        peer = attend(query, *caches_now, causal, window, softcap, slopes)
        testing.assert_lawful(output[b], peer.to(dtype), truth)
    assert torch.equal(caches.k[untouched], before_k[untouched])
    assert torch.equal(caches.v[untouched], before_v[untouched])


def test_signature_is_flash_attentions():
    names = [p for p, v in inspect.signature(flash_attn_with_kvcache).parameters.items() if v.kind != v.KEYWORD_ONLY]
    assert names == [
        "q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx",
        "cache_leftpad", "block_table", "softmax_scale", "causal", "window_size", "softcap", "rotary_interleaved",
        "alibi_slopes", "num_splits", "return_softmax_lse",
    ]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_length_for_all_and_none_for_everything(backend):
    q, k, v = torch.randn(2, 1, 4, 16), torch.randn(2, 9, 4, 16), torch.randn(2, 9, 4, 16)
    whole = flash_attn_with_kvcache(q, k, v, backend=backend)
    assert torch.equal(whole, flash_attn_with_kvcache(q, k, v, cache_seqlens=9, backend=backend))
    some = flash_attn_with_kvcache(q, k, v, cache_seqlens=5, backend=backend)
    assert torch.equal(some, flash_attn_with_kvcache(q, k[:, :5], v[:, :5], backend=backend))
    assert torch.equal(whole, flash_attn_with_kvcache(q, k, v, softcap=-1.0, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_by_step_is_causal_attention(backend, hold_to):
    """A prompt, then one token at a time: the rows of causal attention over the whole."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 30, 4, 16), torch.randn(2, 30, 2, 16), torch.randn(2, 30, 2, 16)
    k_cache, v_cache = torch.full((2, 30, 2, 16), torch.nan), torch.full((2, 30, 2, 16), torch.nan)
    parts, at = [], 0
    for step in (11, 1, 1, 1, 7, 1, 8):
        piece = slice(at, at + step)
        parts.append(
            flash_attn_with_kvcache(
                q[:, piece], k_cache, v_cache, k[:, piece], v[:, piece], cache_seqlens=at, causal=True, backend=backend
            )
        )
        at += step

    def whole(q, k, v):
        heads = (t.transpose(1, 2) for t in (q, k, v))
        output = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2)

    hold_to(whole, (q, k, v), [torch.cat(parts, 1)])


def small(**changes):
    """A call that fits, but for the changes."""
    arguments = {
        "q": torch.ones(2, 1, 4, 8),
        "k_cache": torch.zeros(2, 10, 2, 8),
        "v_cache": torch.zeros(2, 10, 2, 8),
        "k": torch.ones(2, 3, 2, 8),
        "v": torch.ones(2, 3, 2, 8),
        "cache_seqlens": torch.tensor([2, 7], dtype=torch.int32),
    }
    return {**arguments, **changes}


def paged(table, **changes):
    pages = {"k_cache": torch.zeros(6, 4, 2, 8), "v_cache": torch.zeros(6, 4, 2, 8)}
    return small(block_table=torch.tensor(table, dtype=torch.int32), **pages, **changes)


REFUSED = {
    "overflow": (small(cache_seqlens=torch.tensor([2, 8])), r"cache_seqlens\[1\] = 8 and 3 new keys do not fit into the"
                 r" 10 slots"),
    "overflow of one length": (small(cache_seqlens=8), r"cache_seqlens\[0\] = 8 and 3 new keys do not fit"),
    "beyond the cache": (small(k=None, v=None, cache_seqlens=torch.tensor([2, 11])),
                         r"cache_seqlens\[1\] = 11 is not in \[0, 10\]"),
    "negative length": (small(cache_seqlens=torch.tensor([-1, 2])), r"cache_seqlens\[0\] = -1 is not in \[0, 10\]"),
    "padding behind the end": (small(cache_leftpad=torch.tensor([0, 8])), r"cache_leftpad\[1\] = 8 is not in \[0, 7\]"),
    "row out of range": (small(cache_batch_idx=torch.tensor([0, 2])), r"cache_batch_idx\[1\] = 2 is not in \[0, 2\)"),
    "a row twice": (small(cache_batch_idx=torch.tensor([1, 1])), r"cache row 1 would be written by sequences 0 and 1"),
    "page out of range": (paged([[0, 1, 2], [3, 4, 6]]), r"block_table\[1, 2\] = 6 is not in \[0, 6\)"),
    "negative page": (paged([[-1, 1, 2], [3, 4, 5]]), r"block_table\[0, 0\] = -1 is not in \[0, 6\)"),
    "a shared page that is written": (paged([[0, 1, 2], [3, 1, 5]]), r"page 1 would be written by sequences 0 and 1"),
    "a page twice": (paged([[0, 1, 2], [3, 4, 4]], cache_seqlens=torch.tensor([2, 6])),
                     r"page 4 would be written by sequences 1 and 1 \(twice\)"),
    "overflow of pages": (paged([[0, 1], [2, 3]]), r"cache_seqlens\[1\] = 7 and 3 new keys do not fit into the 8"),
    "angles": (small(rotary_cos=torch.ones(9, 4), rotary_sin=torch.ones(9, 4)),
               r"sequence 1 of 3 rows at offset 7 is not within the 9 positions"),
    "dtype": (small(v_cache=torch.zeros(2, 10, 2, 8, dtype=torch.bfloat16)), r"value_cache must have the query's"),
    "dtype of k": (small(k=torch.ones(2, 3, 2, 8).half()), r"k must have the query's dtype"),
    "shape of k": (small(k=torch.ones(2, 3, 1, 8)), r"k must be \(B, new, Hkv, D\) = \(2, 3, 2, 8\), got"),
    "shape of v": (small(v=torch.ones(2, 2, 2, 8)), r"v must be \(B, new, Hkv, D\) = \(2, 3, 2, 8\), got"),
    "k alone": (small(v=None), r"k and v are given together"),
    "no lengths": (small(cache_seqlens=None), r"k and v need cache_seqlens"),
    "cos alone": (small(rotary_cos=torch.ones(10, 4)), r"rotary_cos and rotary_sin are given together"),
    "angles without k": (small(k=None, v=None, rotary_cos=torch.ones(10, 4), rotary_sin=torch.ones(10, 4)),
                         r"need k and v to append"),
    "stride": (small(k_cache=torch.zeros(2, 10, 8, 2).transpose(2, 3)), r"key_cache must have a last stride of 1"),
    "heads": (small(q=torch.ones(2, 1, 3, 8)), r"query heads \(3\) must be a multiple of the cache's heads \(2\)"),
    "slopes": (small(alibi_slopes=torch.ones(3)), r"alibi_slopes must be float32 of shape \(4,\) or \(2, 4\)"),
    "window": (small(window_size=(-2, 0)), r"window must be two lengths"),
    "softcap": (small(softcap=math.nan), r"softcap must be 0 \(none\) or more"),
    "NaN scale": (small(softmax_scale=math.nan), r"scale must be finite"),
    "rows": (small(k_cache=torch.zeros(3, 10, 2, 8), v_cache=torch.zeros(3, 10, 2, 8)),
             r"a cache of 3 rows for a batch of 2 needs cache_batch_idx"),
    "pages and rows": (paged([[0, 1, 2], [3, 4, 5]], cache_batch_idx=torch.tensor([0, 1])), r"no cache_batch_idx"),
    "wide table": (small(block_table=torch.zeros(2, 3, dtype=torch.int64)), r"block_table must be int32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_caches_unchanged(name):
    arguments, message = REFUSED[name]
    words = set()
    for backend in (None, *BACKENDS):
        with pytest.raises((ValueError, RuntimeError), match=message) as raised:
            flash_attn_with_kvcache(**arguments, backend=backend)
        words.add(str(raised.value).splitlines()[0])
        assert not arguments["k_cache"].any() and not arguments["v_cache"].any()
    assert len(words) == 1, words


def test_shared_pages_may_be_read():
    flash_attn_with_kvcache(**paged([[0, 1, 2], [0, 3, 4]], cache_seqlens=torch.tensor([4, 5])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend):
    """One graph; the writes to the caches survive functionalization."""

    def step(q, k, v, k_cache, v_cache, lengths, cos, sin):
        out = flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cos, sin, cache_seqlens=lengths, causal=True, backend=backend
        )
        return out + k_cache.sum()  # reads what was written

    torch._dynamo.reset()
    q, k, v = torch.randn(2, 2, 4, 16), torch.randn(2, 2, 2, 16), torch.randn(2, 2, 2, 16)
    cos, sin = torch.rand(20, 8), torch.rand(20, 8)
    lengths = torch.tensor([3, 11], dtype=torch.int32)
    caches = [torch.randn(2, 20, 2, 16) for _ in range(2)]
    twins = [c.clone() for c in caches]
    expected = step(q, k, v, *caches, lengths, cos, sin)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, *twins, lengths, cos, sin), expected)
    assert all(torch.equal(a, b) for a, b in zip(caches, twins, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_what_writes(backend):
    key, value = torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2, 8)
    caches = torch.randn(2, 10, 2, 8), torch.randn(2, 10, 2, 8)
    lengths = torch.tensor([1, 5], dtype=torch.int32)
    append = getattr(torch.ops.fastattn.cache_append, backend)
    torch.library.opcheck(append, (*caches, key, value, lengths, None, None, None))
    rotary = getattr(torch.ops.fastattn.rotary_in_place, backend)
    torch.library.opcheck(rotary, (key, torch.rand(9, 4), torch.rand(9, 4), lengths, None, 0, True))


def test_there_is_no_gradient():
    q = torch.randn(1, 1, 2, 8, requires_grad=True)
    output = flash_attn_with_kvcache(q, torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8))
    with pytest.raises(RuntimeError, match="decode has no gradient; it is for inference"):
        output.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_for_any_threads_and_neighbours(dtype, skip_without_native):
    q, k, v = (torch.randn(3, n, h, 64).to(dtype) for n, h in ((1, 6), (3000, 2), (3000, 2)))
    lengths = torch.tensor([3000, 1700, 600], dtype=torch.int32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 3, before):
        torch.set_num_threads(threads)
        results.append(flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, backend="cpu"))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)
    for b in range(3):
        alone = flash_attn_with_kvcache(
            q[b : b + 1], k[b : b + 1], v[b : b + 1], cache_seqlens=lengths[b : b + 1], backend="cpu"
        )
        assert torch.equal(alone[0], results[0][b])
