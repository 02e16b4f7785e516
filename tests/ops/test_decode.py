"""Decoding: how sequences are cut, what appending writes, and that no value in a tensor leads a kernel astray."""

import importlib

import pytest
import torch

import fastattn
from fastattn.bench.launch_cost import launching_nothing
from fastattn.flash_attn import flash_attn_with_kvcache
from fastattn.ops.decode.append import append_to_cache
from fastattn.testing.opcheck import available_backends

BACKENDS = available_backends("cpu")
KERNELS = [name for name in BACKENDS if name != "reference"]


def draw(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_the_same_bits_for_any_neighbours_and_any_room_behind(backend, dtype):
    """A sequence's result depends on its own keys only: not on the batch, nor on how long a cache could be."""
    q, k, v = draw((3, 2, 4, 16), (3, 2400, 2, 16), (3, 2400, 2, 16), dtype=dtype)
    lengths = torch.tensor([2400, 700, 200])
    together, lse = fastattn.decode_attention(q, k, v, lengths, causal=True, return_lse=True, backend=backend)
    for b, length in enumerate(lengths.tolist()):
        one, one_lse = fastattn.decode_attention(
            q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], causal=True, return_lse=True, backend=backend
        )
        assert torch.equal(one[0], together[b]) and torch.equal(one_lse[0], lse[b])


def cache_of(kind, rows, slots, heads, dim, dtype):
    """A cache full of random bits, NaN among them."""
    shape = (rows, heads, slots, dim) if kind == "heads first" else (rows, slots, heads, dim)
    if kind == "gaps":
        shape = (rows, slots + 2, heads + 1, dim + 3)
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    cache = torch.randint(-(2**15), 2**15, shape, dtype=torch.int64).to(integers).view(dtype)
    if kind == "heads first":
        return cache.transpose(1, 2)
    return cache[:, 1:-1, 1:, 2:-1] if kind == "gaps" else cache


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["slots first", "heads first", "gaps"])
@pytest.mark.parametrize("place", ["plain", "rows", "pages of 1", "pages of 7"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_appending_writes_these_bits_and_no_others(backend, place, kind, dtype):
    torch.manual_seed(1)
    batch, new, heads, dim, value_dim, slots = 3, 5, 3, 24, 20, 30
    page = int(place.split()[-1]) if place.startswith("pages") else 0
    pages = -(-slots // page) if page else 0
    count = batch * pages + 1 if page else 5 if place == "rows" else batch
    caches = [cache_of(kind, count, page or slots, heads, width, dtype) for width in (dim, value_dim)]
    rows = torch.tensor([4, 0, 3]) if place == "rows" else None
    table = torch.randperm(count)[: batch * pages].view(batch, pages).int() if page else None
    key, value = (cache_of(kind, batch, new, heads, width, dtype) for width in (dim, value_dim))
    lengths = torch.tensor([0, 25, 13])
    whole = [cache._base if cache._base is not None else cache for cache in caches]
    expected = [base.clone() for base in whole]
    for base, cache, fresh in zip(expected, caches, (key, value), strict=True):
        twin = base.as_strided(cache.shape, cache.stride(), cache.storage_offset())
        for b in range(batch):
            for i in range(new):
                slot = int(lengths[b]) + i
                at = (int(table[b, slot // page]), slot % page) if page else (b if rows is None else rows[b], slot)
                bits(twin)[at] = bits(fresh)[b, i]
    append_to_cache(*caches, key, value, lengths, None, rows, table, backend=backend)
    for base, right in zip(whole, expected, strict=True):
        assert torch.equal(bits(base), bits(right))


@pytest.mark.parametrize("backend", BACKENDS)
def test_appending_nothing_changes_nothing(backend):
    caches = draw((2, 4, 1, 8), (2, 4, 1, 8))
    before = [cache.clone() for cache in caches]
    append_to_cache(
        *caches, torch.ones(2, 0, 1, 8), torch.ones(2, 0, 1, 8), torch.tensor([4, 1]), None, None, None, backend=backend
    )
    assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_length_that_is_a_number_is_checked_as_well(backend):
    q, k, v = draw((2, 1, 2, 8), (2, 10, 2, 8), (2, 10, 2, 8))
    with pytest.raises(RuntimeError, match=r"cache_seqlens\[0\] = 11 is not in \[0, 10\]"):
        flash_attn_with_kvcache(q, k, v, cache_seqlens=11, backend=backend)
    with pytest.raises(RuntimeError, match=r"cache_seqlens\[0\] = 10 and 1 new keys do not fit into the 10"):
        flash_attn_with_kvcache(q, k, v, k[:, :1], v[:, :1], cache_seqlens=10, backend=backend)


# As on a GPU, where nobody looks at values before the kernels do.

WRONG = {
    "too long": {"lengths": [2**62, 11]},
    "negative": {"lengths": [-1, -(2**40)]},
    "no room": {"lengths": [10, 9]},
    "padding behind the end": {"leftpad": [2**40, 9]},
    "negative padding": {"leftpad": [-5, -(2**62)]},
    "rows": {"rows": [2, -1]},
    "far rows": {"rows": [2**40, -(2**40)]},
    "pages": {"table": [[-1, 2**31 - 1, 6], [-(2**31), 6, 7]]},
}


@pytest.mark.interpreted
@pytest.mark.parametrize("wrong", WRONG)
def test_kernels_stay_within_the_cache(wrong, monkeypatch):
    """Around the caches is NaN: a kernel that read it would return NaN, one that wrote would remove it."""
    monkeypatch.setattr(importlib.import_module("fastattn.ops.decode.triton"), "places", lambda *_: None)
    given = WRONG[wrong]
    paged = "table" in given
    shape = (6, 4, 2, 8) if paged else (2, 10, 2, 8)
    around = [torch.full((shape[0] + 2, *shape[1:]), torch.nan) for _ in range(2)]
    caches = [tensor[1:-1] for tensor in around]
    for cache in caches:
        cache.copy_(torch.rand(shape))
    q, k, v = draw((2, 3, 4, 8), (2, 3, 2, 8), (2, 3, 2, 8))
    lengths = torch.tensor(given.get("lengths", [4, 5]))
    leftpad = torch.tensor(given["leftpad"]) if "leftpad" in given else None
    rows = torch.tensor(given["rows"]) if "rows" in given else None
    table = torch.tensor(given["table"], dtype=torch.int32) if paged else None
    before = [cache.clone() for cache in caches]
    for window in ((-1, -1), (2, 0)):
        for page_of_one in (False, True):
            output, lse = flash_attn_with_kvcache(
                q, *caches, k, v, cache_seqlens=lengths, cache_leftpad=leftpad, cache_batch_idx=rows,
                block_table=table, window_size=window, num_splits=int(page_of_one), return_softmax_lse=True,
                backend="triton",
            )  # fmt: skip
            assert output.isfinite().all() and not lse.isnan().any()
    for tensor in around:
        assert tensor[0].isnan().all() and tensor[-1].isnan().all() and tensor[1:-1].isfinite().all()
    if "rows" in given or wrong in ("pages", "negative"):
        assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))


@pytest.mark.interpreted
def test_an_overflowing_cache_keeps_what_is_behind_its_end(monkeypatch):
    """What fits is written; the next sequence's slots, which are behind this one's, are not."""
    monkeypatch.setattr(importlib.import_module("fastattn.ops.decode.triton"), "places", lambda *_: None)
    caches = [torch.zeros(2, 10, 1, 8), torch.zeros(2, 10, 1, 8)]
    new = torch.ones(2, 3, 1, 8)
    append_to_cache(*caches, new, new, torch.tensor([9, 10]), None, None, None, backend="triton")
    for cache in caches:
        assert cache[0, 9].eq(1).all() and cache[0, :9].eq(0).all() and cache[1].eq(0).all()


class Unseen(torch.Tensor):
    """A tensor that nobody may look into: on a GPU that would be to wait for it."""

    LOOKS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__index__", "__float__", "__iter__")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert getattr(function, "__name__", "") not in cls.LOOKS, function
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.compiled
def test_nothing_is_looked_at_before_a_launch():
    def unseen(values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype).as_subclass(Unseen)

    with pytest.raises(AssertionError):
        unseen([1]).tolist()
    q, k, v = draw((2, 1, 4, 16), (2, 1, 2, 16), (2, 1, 2, 16))
    cos, sin = draw((40, 8), (40, 8))
    plain, pages = draw((3, 32, 2, 16), (9, 8, 2, 16))
    with launching_nothing() as count, torch.no_grad():
        for cache, places in (
            (plain, {"cache_batch_idx": unseen([2, 0])}),
            (pages, {"block_table": unseen([[0, 1, 2, 3], [7, 6, 5, 4]])}),
        ):
            flash_attn_with_kvcache(
                q, cache, cache.clone(), k, v, cos, sin, cache_seqlens=unseen([3, 17]), cache_leftpad=unseen([0, 1]),
                causal=True, backend="triton", **places,
            )  # fmt: skip
        x = torch.randn(7, 2, 16)
        fastattn.apply_rotary_emb(
            x, cos, sin, cu_seqlens=unseen([0, 3, 7]), seqlen_offsets=unseen([5, 0]), inplace=True, backend="triton"
        )
    assert count[0] == 2 * 4 + 1  # rotary of k and q, append, attend: of 32 slots there is nothing to combine
