"""apply_rotary_emb_qkv_ and apply_rotary_emb_kv_: in place what apply_rotary_emb is out of place."""

import pytest
import torch

from fastattn import testing
from fastattn.flash_attn import apply_rotary_emb, apply_rotary_emb_kv_, apply_rotary_emb_qkv_
from fastattn.flash_attn.rotary import RotaryEmbedding, apply_rotary
from fastattn.numerics import DOUBLE_AGREEMENT
from fastattn.testing.opcheck import available_backends

BACKENDS = available_backends("cpu")


def tables(dim=6, positions=20):
    angles = torch.rand(positions, dim)
    return angles.cos(), angles.sin()


def turned(part, cos, sin, interleaved, offsets):
    """The definition, in the dtype of the part."""
    tables = cos.to(part.dtype), sin.to(part.dtype)
    return apply_rotary_emb(part, *tables, interleaved, seqlen_offsets=offsets, backend="reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("own_keys", [False, True])
@pytest.mark.parametrize("form", ["stacked", "stacked, strided", "grouped"])
def test_qkv(form, own_keys, interleaved, recorded, backend, hold_to):
    torch.manual_seed(2)
    offsets = torch.tensor([3, 0], dtype=torch.int32)
    of_q, of_k = tables(), tables() if own_keys else (None, None)
    heads, groups = 4, 2 if form == "grouped" else 4
    q, k, v = (torch.randn(2, 7, h, 16, requires_grad=recorded) for h in (heads, groups, groups))
    if form == "grouped":
        qkv, number = torch.cat((q, k, v), 2), heads
    else:
        qkv, number = torch.stack((q, k, v), 2), None
        if form != "stacked":
            qkv = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    result = apply_rotary_emb_qkv_(qkv, *of_q, *of_k, interleaved, offsets, number, backend=backend)
    assert result is qkv
    parts = result.split((heads, groups, groups), 2) if form == "grouped" else result.unbind(2)
    keys = of_k if own_keys else of_q

    def exact(q, k, v):
        return turned(q, *of_q, interleaved, offsets), turned(k, *keys, interleaved, offsets), v

    grads = [torch.randn_like(part) for part in parts] if recorded else []
    found = torch.autograd.grad(parts, (q, k, v), grads) if recorded else []
    hold_to(exact, (q, k, v), [*parts, *found], *grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recorded", [False, True])
def test_kv(recorded, backend, hold_to):
    k, v = (torch.randn(2, 7, 3, 16, requires_grad=recorded) for _ in range(2))
    cos, sin = tables()
    kv = torch.stack((k, v), 2)
    assert apply_rotary_emb_kv_(kv, cos, sin, True, 4, backend=backend) is kv
    grads = [torch.randn_like(kv)] if recorded else []
    found = torch.autograd.grad(kv, (k, v), grads) if recorded else []
    hold_to(lambda k, v: torch.stack((turned(k, cos, sin, True, 4), v), 2), (k, v), [kv, *found], *grads)


def test_refused():
    cos, sin = tables()
    with pytest.raises(ValueError, match=r"qkv must be \(B, S, 3, H, D\), or"):
        apply_rotary_emb_qkv_(torch.randn(2, 7, 6, 16), cos, sin)
    with pytest.raises(ValueError, match="got 7 with num_heads_q 4"):
        apply_rotary_emb_qkv_(torch.randn(2, 7, 7, 16), cos, sin, num_heads_q=4)
    with pytest.raises(ValueError, match="cos_k and sin_k are given together"):
        apply_rotary_emb_qkv_(torch.randn(2, 7, 3, 2, 16), cos, sin, cos)
    with pytest.raises(ValueError, match=r"kv must be \(B, S, 2, Hkv, D\), got \(2, 7, 3, 16\)"):
        apply_rotary_emb_kv_(torch.randn(2, 7, 3, 16), cos, sin)
    with pytest.raises(RuntimeError, match="leaf"):
        apply_rotary_emb_qkv_(torch.randn(2, 7, 3, 2, 16, requires_grad=True), cos, sin)


def test_the_inverse():
    x, (cos, sin) = torch.randn(2, 7, 3, 16), tables()
    there = apply_rotary(x, cos, sin, 2, interleaved=True)
    back = apply_rotary(there, cos, sin, 2, interleaved=True, conjugate=True)
    peer = turned(turned(x, cos, sin, True, 2), cos, -sin, True, 2)
    testing.assert_lawful(back, peer, x.double())


@pytest.mark.parametrize("interleaved", [False, True])
def test_embedding(interleaved, hold_to):
    """Tables by the formula; a prompt, then what follows, is the whole."""
    module = RotaryEmbedding(8, base=100.0, interleaved=interleaved)
    assert not module.state_dict()
    qkv = torch.randn(2, 9, 3, 4, 16)
    q, k, v = qkv.clone().unbind(2)
    whole = module(qkv.clone())

    def exact(q, k, v):
        columns = torch.arange(0, 8, 2, dtype=q.dtype)
        angles = torch.arange(9)[:, None] * 100.0 ** (-columns / 8)
        return torch.stack((*(turned(t, angles.cos(), angles.sin(), interleaved, 0) for t in (q, k)), v), 2)

    hold_to(exact, (q, k, v), [whole])
    parts = [module(qkv[:, :5].clone()), module(qkv[:, 5:].clone(), seqlen_offset=5)]
    assert torch.equal(torch.cat(parts, 1), whole)
    offsets = torch.tensor([5, 5], dtype=torch.int32)
    assert torch.equal(module(qkv[:, 5:].clone(), seqlen_offset=offsets, max_seqlen=9), parts[1])
    turned_q, kv = module(q.clone(), torch.stack((k, v), 2))
    assert torch.equal(torch.cat((turned_q[:, :, None], kv), 2), whole)
    assert module(qkv.bfloat16()).dtype == torch.bfloat16


def test_embedding_with_scales(hold_to):
    """XPos: the product of a query and a key depends on their distance alone."""
    module = RotaryEmbedding(16, scale_base=64.0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def products(q, k):
        return torch.einsum("bihd,bjhd->ij", q, k)

    def exact(q, k):
        columns, positions = torch.arange(0, 16, 2, dtype=q.dtype), torch.arange(6)[:, None]
        angles = positions * 10000.0 ** (-columns / 16)
        power = ((columns + 0.4 * 16) / (1.4 * 16)) ** ((positions - 3) / 64.0)
        sides = zip((q, k), (power, 1 / power), strict=True)
        return products(
            *(turned(t.expand(1, 6, 1, 16), angles.cos() * s, angles.sin() * s, False, 0) for t, s in sides)
        )

    found = module(torch.stack((q, k, k), 2).expand(1, 6, 3, 1, 16).clone())
    hold_to(exact, (q, k), [products(found[:, :, 0], found[:, :, 1])])
    truth = exact(q.double(), k.double())
    for offset in range(-5, 6):
        diagonal = truth.diagonal(offset)
        assert (diagonal - diagonal[0]).abs().max() <= DOUBLE_AGREEMENT
    assert found[:, 0, 0].norm() > 1.01 * found[:, 5, 0].norm()
