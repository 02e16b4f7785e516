"""The rotary embedding in place, and that no position leads a kernel out of the tables."""

import importlib

import pytest
import torch

import fastattn
from fastattn.testing.opcheck import available_backends

BACKENDS = available_backends("cpu")


def tables(positions, half, dtype=torch.float32):
    torch.manual_seed(0)
    angles = torch.rand(positions, half) * 6.0
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("half", [0, 5, 12])
@pytest.mark.parametrize("form", ["whole", "packed", "one of three", "heads first"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_is_what_a_new_tensor_would_be(backend, form, half, interleaved, dtype):
    torch.manual_seed(2)
    cos, sin = tables(30, half)
    call = {"interleaved": interleaved, "backend": backend}
    if form == "packed":
        whole = torch.randn(11, 3, 24).to(dtype)
        x = whole
        call |= {
            "cu_seqlens": torch.tensor([0, 4, 4, 11], dtype=torch.int32),
            "seqlen_offsets": torch.tensor([7, 9, 2]),
        }
    elif form == "one of three":
        whole = torch.randn(2, 9, 3, 3, 25).to(dtype)
        x = whole[:, :, 1, :, 1:]
        call["seqlen_offsets"] = 4
    elif form == "heads first":
        whole = torch.randn(2, 3, 9, 24).to(dtype)
        x = whole.transpose(1, 2)
        call["seqlen_offsets"] = torch.tensor([0, 21])
    else:
        whole = x = torch.randn(2, 9, 3, 24).to(dtype)
    before, expected = whole.clone(), fastattn.apply_rotary_emb(x, cos, sin, **call)
    result = fastattn.apply_rotary_emb(x, cos, sin, inplace=True, **call)
    assert result is x and torch.equal(x, expected)
    inside = torch.zeros_like(whole, dtype=torch.bool)
    inside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    assert torch.equal(whole[~inside], before[~inside])


@pytest.mark.interpreted
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("wrong", ["offset", "offsets", "ends", "late ends", "no tables"])
def test_kernels_stay_within_the_tables(wrong, interleaved, monkeypatch):
    """As on a GPU, where nobody looks at values before the kernels do. Around the tables is NaN."""
    monkeypatch.setattr(importlib.import_module("fastattn.ops.rotary.triton"), "positions", lambda *_: None)
    around = [torch.full((8, 4), torch.nan) for _ in range(2)]
    count = 0 if wrong == "no tables" else 6
    cos, sin = (table[1 : 1 + count] for table in around)
    for table, values in zip((cos, sin), tables(count, 4), strict=True):
        table.copy_(values)
    call = {
        "offset": {"seqlen_offsets": 2**40},
        "offsets": {"seqlen_offsets": torch.tensor([-(2**62), 2**62])},
        "ends": {"cu_seqlens": torch.tensor([0, 2**31 - 1, -5], dtype=torch.int32)},
        "late ends": {"cu_seqlens": torch.tensor([3, 3, 4])},
        "no tables": {},
    }[wrong]
    x = torch.rand(5, 3, 8) if "cu_seqlens" in call else torch.rand(2, 5, 3, 8)
    output = fastattn.apply_rotary_emb(x, cos, sin, interleaved, backend="triton", **call)
    assert output.isfinite().all()
