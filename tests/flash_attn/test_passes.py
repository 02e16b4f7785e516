"""Forward and backward alone: they are what the functions with autograd are, and parts of them can be put together."""

import pytest
import torch

from fastattn import dispatch
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


NAMES = ("dropout_p", "softmax_scale", "causal", "softcap", "alibi_slopes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
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
    torch.testing.assert_close(softmax_d, (grad.float() * out.float()).sum(-1).transpose(1, 2))
    for a, b in zip(places, torch.autograd.grad(expected[0], (q, k, v), grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_packed(call, skip_without_native):
    torch.manual_seed(5)
    q, k, v = (torch.randn(13, h, 16).requires_grad_() for h in (4, 2, 2))
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


def test_a_ring_of_two(skip_without_native):
    """Keys in two halves: partial results merged by lse, each half's gradients from the merged output and lse."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, 2, 16).requires_grad_() for _ in range(3))
    tail = (0.0, 0.25, False, -1, -1, 0.0, None)
    halves = [(k[:, :4], v[:, :4]), (k[:, 4:], v[:, 4:])]
    parts = [passes._flash_attn_forward(q, *half, *tail, False)[:2] for half in halves]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(o * (part - lse).exp().transpose(1, 2)[..., None] for o, part in parts)
    expected = flash_attn_func(q, k, v, softmax_scale=0.25)
    torch.testing.assert_close(out, expected)
    grad, total, others = torch.randn_like(out), torch.zeros_like(q), []
    for half in halves:
        places = [torch.empty_like(t) for t in (q, *half)]
        passes._flash_attn_backward(grad, q, *half, out, lse, *places, *tail, True)
        total = total + places[0]
        others.append(places[1:])
    found = [total, *(torch.cat(pair, 1) for pair in zip(*others, strict=True))]
    for a, b in zip(found, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(a, b)


def test_what_only_the_definition_could_serve_is_refused():
    q = torch.randn(1, 4, 2, 8, dtype=torch.float64)
    out, lse, *_ = passes._flash_attn_forward(q, q, q, 0.0, 0.3, False, -1, -1, 0.0, None, False)
    with pytest.raises(dispatch.BackendUnsupported, match="needs a fused kernel"):
        passes._flash_attn_backward(q, q, q, q, out, lse, q, q, q, 0.0, 0.3, False, -1, -1, 0.0, None, False)
    with pytest.raises(ValueError, match="leftpad_k is for caches"):
        passes._flash_attn_varlen_forward(q[0], q[0], q[0], ENDS[:2], ENDS[:2], 4, 4, 0.0, 0.3, False,
                                          leftpad_k=torch.zeros(1))  # fmt: skip
