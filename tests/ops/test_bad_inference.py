"""What decoding and the rotary embedding refuse: the same words from every backend, before anything is computed."""

import re

import pytest
import torch

import fastattn
from fastattn.testing.opcheck import available_backends


def f32(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


def decode(query=(2, 1, 4, 8), keys=(2, 6, 2, 8), values=None, **call):
    q, k, v = (f32(*t) if isinstance(t, tuple) else t for t in (query, keys, keys if values is None else values))
    return lambda backend: fastattn.decode_attention(q, k, v, backend=backend, **call)


def rotary(x=(2, 5, 3, 8), cos=(5, 4), sin=None, **call):
    x, c, s = (f32(*t) if isinstance(t, tuple) else t for t in (x, cos, cos if sin is None else sin))
    return lambda backend: fastattn.apply_rotary_emb(x, c, s, backend=backend, **call)


BAD = {
    # decode (what flash_attn_with_kvcache refuses as well: tests/flash_attn/test_kvcache.py)
    "decode of integers": (decode(f32(2, 1, 4, 8, dtype=torch.int32)), ValueError, r"decode: dtype torch.int32 is not"),
    "decode of 3 dims": (
        decode((2, 4, 8)),
        ValueError,
        r"decode: query is \(B, Sq, H, D\), the caches are \(rows or pages, slots, Hkv, D\), got 3, 4 and 4 dimensions",
    ),
    "decode's caches": (
        decode(values=(2, 5, 2, 8)),
        ValueError,
        r"must have the same rows, slots and heads, got \(2, 6, 2, 8\) and \(2, 5, 2, 8\)",
    ),
    "decode's head dim": (
        decode(keys=(2, 6, 2, 9)),
        ValueError,
        r"decode: query and key_cache must have one head dim, got 8 and 9",
    ),
    "decode's lengths' shape": (
        decode(cache_seqlens=torch.tensor([1])),
        ValueError,
        r"decode: cache_seqlens must be int32 or int64 of shape \(2,\), got torch.int64 \(1,\)",
    ),
    "decode's lengths' dtype": (
        decode(cache_seqlens=torch.tensor([1.0, 2.0])),
        ValueError,
        r"decode: cache_seqlens must be int32 or int64 of shape \(2,\), got torch.float32 \(2,\)",
    ),
    "decode's lengths' device": (
        decode(cache_seqlens=torch.zeros(2, dtype=torch.int32, device="meta")),
        ValueError,
        r"decode: cache_seqlens is on meta, query on cpu",
    ),
    "decode's splits": (
        decode(num_splits=-1),
        ValueError,
        r"decode: num_splits must be 0 \(automatic\) or more, got -1",
    ),
    "decode's length": (
        decode(cache_seqlens=torch.tensor([1, 7])),
        RuntimeError,
        r"decode: cache_seqlens\[1\] = 7 is not in \[0, 6\], the slots of a sequence",
    ),
    "decode's padding": (
        decode(cache_leftpad=torch.tensor([0, -1])),
        RuntimeError,
        r"decode: cache_leftpad\[1\] = -1 is not in \[0, 6\], the sequence's length",
    ),
    # rotary
    "rotary of integers": (
        rotary(f32(2, 5, 3, 8, dtype=torch.int32)),
        ValueError,
        r"rotary: x must be float32, bfloat16",
    ),
    "rotary of 3 dims": (rotary((5, 3, 8)), ValueError, r"rotary: x must be \(B, S, H, D\), got 3 dimensions"),
    "rotary packed of 4 dims": (
        rotary(cu_seqlens=torch.tensor([0, 5])),
        ValueError,
        r"rotary: x must be \(total, H, D\) with cu_seqlens, got 4 dimensions",
    ),
    "rotary's stride": (rotary(f32(2, 5, 8, 3).transpose(2, 3)), ValueError, r"rotary: x must have a last stride of 1"),
    "rotary's sin": (rotary(sin=(5, 3)), ValueError, r"both alike, got \(5, 4\) and \(5, 3\)"),
    "rotary's tables' dtype": (
        rotary(cos=f32(5, 4, dtype=torch.bfloat16)),
        ValueError,
        r"rotary: cos and sin must be of the dtype of x, torch.float32, or float32",
    ),
    "rotary_dim": (rotary(cos=(5, 5)), ValueError, r"rotary: rotary_dim 10 is more than the head dim 8"),
    "rotary's positions": (
        rotary(cos=(4, 4)),
        RuntimeError,
        r"rotary: sequence 0 of 5 rows at offset 0 is not within the 4 positions of cos and sin",
    ),
    "rotary's offset": (
        rotary(seqlen_offsets=-1),
        RuntimeError,
        r"rotary: sequence 0 of 5 rows at offset -1 is not within",
    ),
    "rotary's offsets": (
        rotary(cos=(9, 4), seqlen_offsets=torch.tensor([4, 5])),
        RuntimeError,
        r"rotary: sequence 1 of 5 rows at offset 5 is not within the 9 positions",
    ),
    "rotary's offsets' shape": (
        rotary(seqlen_offsets=torch.tensor([4])),
        ValueError,
        r"rotary: seqlen_offsets must be int32 or int64 of shape \(2,\), got torch.int64 \(1,\)",
    ),
    "descending cu_seqlens": (
        rotary((5, 3, 8), cu_seqlens=torch.tensor([0, 4, 3, 5])),
        RuntimeError,
        r"rotary: cu_seqlens\[2\] = 3 is not in \[4, 5\], from the one before to the rows of x",
    ),
    "cu_seqlens that begin late": (
        rotary((5, 3, 8), cu_seqlens=torch.tensor([1, 5])),
        RuntimeError,
        r"rotary: cu_seqlens\[0\] = 1 must be 0",
    ),
    "cu_seqlens that end early": (
        rotary((5, 3, 8), cu_seqlens=torch.tensor([0, 4])),
        RuntimeError,
        r"rotary: cu_seqlens\[1\] = 4 must be 5, the rows of x",
    ),
    "rotary in place of shared memory": (
        rotary(f32(2, 5, 1, 8).expand(2, 5, 3, 8), inplace=True),
        ValueError,
        r"rotary: inplace=True needs memory of its own for every element",
    ),
    "rotary in place with a gradient": (
        rotary(f32(2, 5, 3, 8, requires_grad=True), inplace=True),
        ValueError,
        r"rotary: inplace=True would change a tensor that needs a gradient",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_in_the_same_words_by_every_backend(name):
    call, kind, pattern = BAD[name]
    messages = set()
    for backend in (None, *available_backends("cpu")):
        with pytest.raises(kind) as raised:
            call(backend)
        assert type(raised.value) is kind
        messages.add(str(raised.value).splitlines()[0])
    assert len(messages) == 1, f"different words: {messages}"
    assert re.search(pattern, messages.pop())
