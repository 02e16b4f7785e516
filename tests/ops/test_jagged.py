"""Attention of jagged nested tensors: every sequence is what it is alone."""

import pytest
import torch

from fastattn import explain, scaled_dot_product_attention, testing
from fastattn.testing.opcheck import available_backends

BACKENDS = available_backends("cpu")
LENGTHS = (3, 17, 1, 9)


def jagged(*shape, lengths=LENGTHS, dtype=torch.float32, like=None):
    """(rows, nested): (T, *shape) and its (B, j, *shape); `like` has the same ragged dimension."""
    rows = torch.randn(sum(lengths), *shape).to(dtype).requires_grad_()
    offsets = torch.tensor([0, *lengths]).cumsum(0) if like is None else like.offsets()
    return rows, torch.nested.nested_tensor_from_jagged(rows, offsets)


def headed(nested):
    return nested.transpose(1, 2)


def alone(q, k, v, lengths_q=LENGTHS, lengths_k=LENGTHS, **call):
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([
        scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in one), backend="reference", **call)[0]
        .transpose(0, 1) for one in parts
    ])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", [{}, {"is_causal": True}, {"window": (4, 0), "softcap": 3.0}, {"scale": 0.2}], ids=str)
def test_every_sequence_is_what_it_is_alone(call, backend, dtype):
    torch.manual_seed(0)
    q, nested_q = jagged(4, 16, dtype=dtype)
    (k, nested_k), (v, nested_v) = (jagged(2, 16, dtype=dtype, like=nested_q) for _ in range(2))
    output = scaled_dot_product_attention(
        *map(headed, (nested_q, nested_k, nested_v)), enable_gqa=True, backend=backend, **call
    )
    assert output.is_nested and output.shape == headed(nested_q).shape  # one ragged dimension: they can be added
    rows = headed(output).values()
    grad = torch.randn_like(rows)
    results = [rows, *torch.autograd.grad(rows, (q, k, v), grad)]
    others = []
    for kind in (dtype, torch.float64):
        inputs = [t.detach().to(kind).requires_grad_() for t in (q, k, v)]
        expected = alone(*inputs, enable_gqa=True, **call)
        others.append([expected, *torch.autograd.grad(expected, inputs, grad.to(kind))])
    for result, peer, truth in zip(results, *others, strict=True):
        testing.assert_lawful(result, peer, truth)


def test_lse_and_heads_and_projections(hold_to):
    x = torch.nested.nested_tensor([torch.randn(n, 24) for n in LENGTHS], layout=torch.jagged)
    q, k, v = torch.nn.Linear(24, 72)(x).chunk(3, -1)
    output, lse = scaled_dot_product_attention(q, k, v, is_causal=True, return_lse=True)
    assert output.shape == q.shape and lse.is_nested and lse.dim() == 2
    (output + q).values().sum().backward()

    def one_by_one(*sides):
        call = {"is_causal": True, "return_lse": True, "backend": "reference"}
        parts = zip(*(t.split(LENGTHS) for t in sides), strict=True)
        found = [scaled_dot_product_attention(*one, **call) for one in parts]
        return [torch.cat(results) for results in zip(*found, strict=True)]

    hold_to(one_by_one, [t.values() for t in (q, k, v)], [output.values(), lse.values()])
    heads = [headed(t.unflatten(-1, (3, 8))) for t in (q, k, v)]
    output, lse = scaled_dot_product_attention(*heads, return_lse=True)
    assert output.shape == heads[0].shape and lse.dim() == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_of_other_lengths(backend, hold_to):
    lengths = (5, 2, 1, 30)
    q, nested_q = jagged(2, 8)
    k, nested_k = jagged(2, 8, lengths=lengths)
    nested_v = nested_k * 2.0
    sides = [headed(t) for t in (nested_q, nested_k, nested_v)]
    output = scaled_dot_product_attention(*sides, backend=backend)
    hold_to(lambda q, k: alone(q, k, 2 * k, LENGTHS, lengths), (q, k), [headed(output).values()])
    with pytest.raises(ValueError, match='pass causal_alignment="bottom_right"'):
        scaled_dot_product_attention(*sides, is_causal=True, backend=backend)
    call = {"is_causal": True, "causal_alignment": "bottom_right"}
    output = scaled_dot_product_attention(*sides, backend=backend, **call)
    hold_to(lambda q, k: alone(q, k, 2 * k, LENGTHS, lengths, **call), (q, k), [headed(output).values()])


def test_keys_with_room_behind_them(hold_to):
    padded = torch.randn(4, 20, 2, 8)
    starts, lengths = torch.tensor([0, 2, 1, 5]), torch.tensor(LENGTHS)
    keys = torch.nested.narrow(padded, 1, starts, lengths, layout=torch.jagged)
    q, queries = jagged(2, 8)
    output = scaled_dot_product_attention(headed(queries), headed(keys), headed(keys))

    def exact(q, padded):
        k = torch.cat([row[start : start + n] for row, start, n in zip(padded, starts, lengths, strict=True)])
        return alone(q, k, k)

    hold_to(exact, (q, padded), [headed(output).values()])
    with pytest.raises(ValueError, match="must not have room behind its sequences"):
        scaled_dot_product_attention(headed(keys), headed(keys), headed(keys))


def test_explained_and_refused():
    _, nested = jagged(2, 8)
    side = headed(nested)
    assert explain(scaled_dot_product_attention, side, side, side).op == "attention_varlen"
    with pytest.raises(ValueError, match="value is no nested tensor"):
        scaled_dot_product_attention(side, side, torch.randn(4, 2, 5, 8))
    with pytest.raises(ValueError, match="attn_mask cannot be combined with nested tensors"):
        scaled_dot_product_attention(side, side, side, torch.ones(1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"must be \(B, H, j, D\) or \(B, j, D\)"):
        scaled_dot_product_attention(nested, nested, nested)
    with pytest.raises(ValueError, match="key and value must have the same offsets"):
        scaled_dot_product_attention(side, side, headed(jagged(2, 8)[1]))
    strided = torch.nested.nested_tensor([torch.randn(2, n, 8) for n in LENGTHS])
    with pytest.raises(ValueError, match="a nested tensor of another layout"):
        scaled_dot_product_attention(strided, strided, strided)


def test_compiled_for_any_lengths():
    """One graph for all; what the longest sequence is does not become part of it."""
    torch._dynamo.reset()

    def call(nested):
        side = headed(nested)
        return headed(scaled_dot_product_attention(side, side, side, is_causal=True)).values()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ((3, 7), (5, 2, 9), (4, 4, 4, 11)):
        rows = torch.randn(sum(lengths), 2, 8, requires_grad=True)
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        nested = torch.nested.nested_tensor_from_jagged(rows, offsets, min_seqlen=min(lengths), max_seqlen=max(lengths))
        output, expected = compiled(nested), call(nested)
        assert torch.equal(output, expected)
        assert torch.equal(*(torch.autograd.grad(t.sum(), rows)[0] for t in (output, expected)))
