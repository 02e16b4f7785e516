"""Forward and backward alone: they are what the functions with autograd are, and parts of them can be put together."""

import contextlib

import pytest
import torch

from fastattn import testing, use_backend
from fastattn.flash_attn import flash_attn_func, flash_attn_varlen_func, passes

ENDS = torch.tensor([0, 4, 4, 13], dtype=torch.int32)
CALLS = [
    {},
    {"causal": True},
    {"window_size": (3, 2), "softcap": 2.0},
    {"dropout_p": 0.3, "alibi_slopes": torch.tensor([0.5, 0.3, 0.2, 0.1])},
]


def options(call, names):
    given = {"dropout_p": 0.0, "softmax_scale": 0.3, "causal": False, "softcap": 0.0, "alibi_slopes": None, **call}
    left, right = call.get("window_size", (-1, -1))
    return {**{name: given[name] for name in names}, "window_size_left": left, "window_size_right": right}


#: float64 is the definition's.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
NAMES = ("dropout_p", "softmax_scale", "causal", "softcap", "alibi_slopes")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_dense(call, dtype, skip_without_native):
    torch.manual_seed(5)
    q, k, v = (torch.randn(2, n, h, 16).to(dtype).requires_grad_() for n, h in ((7, 4), (9, 2), (9, 2)))
    state = torch.get_rng_state()
    out, lse, shown, rng = passes._flash_attn_forward(q, k, v, **options(call, NAMES), return_softmax=True)
    assert not out.requires_grad
    torch.set_rng_state(state)
    expected = flash_attn_func(q, k, v, softmax_scale=0.3, **call, return_attn_probs=True)
    for a, b in zip((out, lse, shown), expected, strict=True):
        assert torch.equal(a, b)
    grad = torch.randn_like(out)
    places = [torch.empty_like(t) for t in (q, k, v)]
    softmax_d = passes._flash_attn_backward(
        grad, q, k, v, out, lse, *places, **options(call, NAMES), deterministic=False, rng_state=rng
    )
    peer, truth = ((grad.to(wide) * out.to(wide)).sum(-1).transpose(1, 2) for wide in (softmax_d.dtype, torch.float64))
    assert softmax_d.dtype == lse.dtype
    testing.assert_lawful(softmax_d, peer, truth)
    for a, b in zip(places, torch.autograd.grad(expected[0], (q, k, v), grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_packed(call, dtype, skip_without_native):
    torch.manual_seed(5)
    q, k, v = (torch.randn(13, h, 16).to(dtype).requires_grad_() for h in (4, 2, 2))
    bounds = (ENDS, ENDS, 9, 9)
    state = torch.get_rng_state()
    out, lse, shown, rng = passes._flash_attn_varlen_forward(
        q, k, v, *bounds, **options(call, NAMES), return_softmax=True
    )
    torch.set_rng_state(state)
    expected = flash_attn_varlen_func(q, k, v, *bounds, softmax_scale=0.3, **call, return_attn_probs=True)
    for a, b in zip((out, lse, shown), expected, strict=True):
        assert torch.equal(a, b)
    places = [torch.empty_like(t) for t in (q, k, v)]
    softmax_d = passes._flash_attn_varlen_backward(
        torch.ones_like(out), q, k, v, out, lse, *places, *bounds, **options(call, NAMES), deterministic=True,
        rng_state=rng,
    )  # fmt: skip
    assert softmax_d.shape == (4, 13)
    for a, b in zip(places, torch.autograd.grad(expected[0].sum(), (q, k, v)), strict=True):
        assert torch.equal(a, b)


def merged(parts, transposed):
    """(out, lse) of all keys, from those of parts of them."""
    lse = torch.stack([part for _, part in parts]).logsumexp(0)
    shares = [(part - lse).exp() for _, part in parts]
    out = sum(o * (share.transpose(*transposed).unsqueeze(-1)) for (o, _), share in zip(parts, shares, strict=True))
    return out.to(parts[0][0].dtype), lse


def ring(forward, backward, q, halves, grad, transposed):
    """(out, gradients of q, of the keys, of the values) of halves that know the merged out and lse, not each other."""
    out, lse = merged([forward(q, *half)[:2] for half in halves], transposed)
    total, others = torch.zeros_like(q), []
    for half in halves:
        places = [torch.empty_like(t) for t in (q, *half[:2])]
        backward(grad, q, *half[:2], out, lse, *places, *half[2:])
        total = total + places[0]
        others.append(places[1:])
    return [out, total, *zip(*others, strict=True)]


TAIL = (0.0, 0.25, False, -1, -1, 0.0, None)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_ring_of_two(dtype, backend, skip_without_native, hold_to):
    """Keys in two halves: partial results merged by lse, each half's gradients from the merged output and lse."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(1, 8, 2, 16).to(dtype) for _ in range(4))
    with use_backend(backend) if backend else contextlib.nullcontext():
        out, dq, dk, dv = ring(
            lambda q, k, v: passes._flash_attn_forward(q, k, v, *TAIL, False),
            lambda *tensors: passes._flash_attn_backward(*tensors, *TAIL, True),
            q, [(k[:, :4], v[:, :4]), (k[:, 4:], v[:, 4:])], grad, (1, 2),
        )  # fmt: skip
    found = [out, dq, torch.cat(dk, 1), torch.cat(dv, 1)]

    def whole(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), scale=0.25
        ).transpose(1, 2)

    hold_to(whole, (q, k, v), found, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_ring_of_two_packed(dtype, skip_without_native, hold_to):
    """Of sequences whose keys are in two halves, one of which has none of one sequence's."""
    torch.manual_seed(0)
    q, grad = (torch.randn(9, 2, 16).to(dtype) for _ in range(2))
    of_q = torch.tensor([0, 4, 9], dtype=torch.int32)
    halves = [
        (torch.randn(ends[-1], 2, 16).to(dtype), torch.randn(ends[-1], 2, 16).to(dtype), of_q, torch.tensor(ends), 5, 5)
        for ends in ([0, 5, 5], [0, 2, 6])
    ]
    out, dq, dk, dv = ring(
        lambda q, *half: passes._flash_attn_varlen_forward(q, *half, *TAIL),
        lambda *arguments: passes._flash_attn_varlen_backward(*arguments, *TAIL, True),
        q, halves, grad, (0, 1),
    )  # fmt: skip
    found = [out, dq, torch.cat(dk), torch.cat(dv)]

    def whole(q, k, v):
        keys = torch.tensor([0] * 5 + [0] * 2 + [1] * 4)
        seen = keys == torch.tensor([0] * 4 + [1] * 5)[:, None]
        heads = (t.transpose(0, 1)[None] for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads, seen, scale=0.25)[0].transpose(0, 1)

    keys, values = (torch.cat([half[i] for half in halves]) for i in (0, 1))
    hold_to(whole, (q, keys, values), found, grad)


def test_what_is_refused():
    q = torch.randn(4, 2, 8)
    with pytest.raises(ValueError, match="leftpad_k is for caches"):
        passes._flash_attn_varlen_forward(q, q, q, ENDS[:2], ENDS[:2], 4, 4, 0.0, 0.3, False, leftpad_k=torch.zeros(1))
