"""memory_efficient_attention: every bias against its own matrix, every layout, gradients, bad input."""

import pytest
import torch

from fastattn import philox, testing
from fastattn.cases import Case, Suite
from fastattn.integrations.xformers import attn_bias as biases
from fastattn.integrations.xformers import memory_efficient_attention, memory_efficient_attention_forward
from fastattn.ops.attention.samples import UNFUSED_PEER


def formula(query, key, value, attn_bias=None, scale=None, bias=None, keep=None, p=0.0):
    """softmax(scale * Q K^T + bias) V in the dtype of the query; a tensor bias is what `attn_bias` holds."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * scale
    if bias is not None:
        scores = scores + bias
    if isinstance(attn_bias, biases.AttentionBias):
        seen = attn_bias.materialize(scores.shape[-2:], torch.float64) == 0
        scores = scores.masked_fill(~seen, -torch.inf)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    if keep is not None:
        weights = weights * keep / (1 - p)
    return torch.einsum("bhij,bjhd->bihd", weights, value)


def table(sequences, pages):
    return torch.randperm(sequences * pages, generator=torch.Generator().manual_seed(0)).view(sequences, pages).int()


Q, K = [5, 1, 9], [7, 3, 9]
BLOCKS = biases.BlockDiagonalMask.from_seqlens(Q, K, device="cpu")
SAME = biases.BlockDiagonalMask.from_seqlens(Q, device="cpu")
FEW = biases.BlockDiagonalMask.from_seqlens(Q, [4, 1, 7], device="cpu")
PADDED = (Q, 12, K)
#: name -> (bias, batch size, queries, keys)
BIASES = {
    "none": (None, 2, 15, 19),
    "causal": (biases.LowerTriangularMask(), 2, 15, 19),
    "causal, more queries": (biases.LowerTriangularMask(), 2, 19, 15),
    "bottom right": (biases.LowerTriangularFromBottomRightMask(), 2, 15, 19),
    "bottom right, dead rows": (biases.LowerTriangularFromBottomRightMask(), 2, 19, 15),
    "bottom right, local": (biases.LowerTriangularFromBottomRightMask().make_local_attention(4), 2, 15, 19),
    "local": (biases.LocalAttentionFromBottomRightMask(3, 2), 2, 15, 19),
    "blocks": (BLOCKS, 1, 15, 19),
    "blocks, causal": (BLOCKS.make_causal(), 1, 15, 19),
    "blocks, causal, same lengths": (SAME.make_causal(), 1, 15, 15),
    "blocks, causal, fewer keys": (FEW.make_causal(), 1, 15, 12),
    "blocks, bottom right": (BLOCKS.make_causal_from_bottomright(), 1, 15, 19),
    "blocks, local": (BLOCKS.make_local_attention(3), 1, 15, 19),
    "blocks, local, fewer keys": (FEW.make_local_attention(7), 1, 15, 12),
    "blocks, local, bottom right": (BLOCKS.make_local_attention_from_bottomright(3), 1, 15, 19),
    "padded": (biases.BlockDiagonalPaddedKeysMask.from_seqlens(*PADDED, device="cpu"), 1, 15, 36),
    "padded, causal": (
        biases.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(*PADDED, device="cpu"), 1, 15, 36),
    "padded, local": (biases.BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local(*PADDED, 2, 1), 1, 15, 36),
    "padded, causal and local": (
        biases.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(*PADDED, 3), 1, 15, 36),
    "gappy": (biases.BlockDiagonalGappyKeysMask.from_seqlens(Q, [2, 11, 15, 30], K, device="cpu"), 1, 15, 30),
    "gappy, causal": (
        biases.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(Q, [0, 8, 20, 30], K, device="cpu"), 1, 15, 30),
    "pages": (biases.PagedBlockDiagonalPaddedKeysMask.from_seqlens(Q, K, table(3, 3), 4, device="cpu"), 1, 15, 36),
    "pages, causal": (
        biases.BlockDiagonalPaddedKeysMask.from_seqlens(*PADDED, device="cpu").make_paged(
            table(3, 3), 4, biases.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask), 1, 15, 36),
}  # fmt: skip


def case(name, attn_bias, batch, queries, keys):
    def build(s):
        rows = {"query": s.normal(batch, queries, 3, 16), "key": s.normal(batch, keys, 3, 16)}
        return {**rows, "value": s.normal(batch, keys, 3, 24), "attn_bias": attn_bias, "scale": 0.3}

    return Case(name, build, draws=2, **UNFUSED_PEER)


SUITE = Suite(
    "memory_efficient_attention", memory_efficient_attention, formula, formula, ("query", "key", "value"), ("output",),
    tuple(case(name, *of) for name, of in BIASES.items()),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SUITE.cases, ids=lambda case: case.name)
def test_every_bias(case, dtype, skip_without_native):
    testing.check(memory_efficient_attention, SUITE, case, dtype=dtype)


def lawful(call, exact, *leaves):
    """The result and all gradients of `call`, against those of `exact`, which is called in both dtypes."""
    output = call(*leaves)
    grad = torch.randn_like(output)
    found = [output, *torch.autograd.grad(output, leaves, grad)]
    others = []
    for dtype in (output.dtype, torch.float64):
        inputs = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        result = exact(*inputs)
        others.append([result, *torch.autograd.grad(result, inputs, grad.to(dtype))])
    for result, peer, truth in zip(found, *others, strict=True):
        testing.assert_lawful(result, peer, truth)


def drawn(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
def test_tensors_have_gradients(causal):
    shape = (2, 9, 3, 16)
    leaves = drawn(shape, shape, shape, (2, 3, 9, 9))
    triangle = biases.LowerTriangularMask()

    def call(q, k, v, bias):
        return memory_efficient_attention(q, k, v, triangle.add_bias(bias) if causal else bias)

    lawful(call, lambda q, k, v, b: formula(q, k, v, triangle if causal else None, bias=b), *leaves)
    both = triangle.add_bias(leaves[3]).materialize((2, 3, 9, 9))
    torch.testing.assert_close(both, leaves[3] + triangle.materialize((2, 3, 9, 9)))


def test_one_head():
    """(B, M, K), with a bias of three dimensions."""
    leaves = drawn((2, 9, 16), (2, 11, 16), (2, 11, 8), (2, 9, 11))

    def exact(q, k, v, bias):
        return formula(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), bias=bias.unsqueeze(1)).squeeze(2)

    lawful(memory_efficient_attention, exact, *leaves)


@pytest.mark.parametrize("expanded", [False, True])
def test_groups(expanded):
    """(B, M, G, H, K); expanded keys are read once and get the gradient of all."""
    heads = 1 if expanded else 4
    leaves = drawn((2, 9, 2, 4, 16), (2, 11, 2, heads, 16), (2, 11, 2, heads, 16), (2, 2, 4, 9, 11))

    def call(q, k, v, bias):
        k, v = (t.expand(-1, -1, -1, 4, -1) for t in (k, v))
        return memory_efficient_attention(q, k, v, bias)

    def exact(q, k, v, bias):
        k, v = (t.expand(-1, -1, -1, 4, -1).flatten(2, 3) for t in (k, v))
        return formula(q.flatten(2, 3), k, v, bias=bias.flatten(1, 2)).unflatten(2, (2, 4))

    lawful(call, exact, *leaves)


def test_groups_in_blocks():
    q, k, v = drawn((1, 15, 2, 4, 16), (1, 19, 2, 1, 16), (1, 19, 2, 1, 16))
    output = memory_efficient_attention(q, k.expand(-1, -1, -1, 4, -1), v.expand(-1, -1, -1, 4, -1), BLOCKS)
    k, v = (t.expand(-1, -1, -1, 4, -1).flatten(2, 3) for t in (k, v))
    torch.testing.assert_close(output.flatten(2, 3), formula(q.flatten(2, 3), k, v, BLOCKS))


def test_dropout_and_dtypes():
    q, k, v = drawn((2, 9, 3, 16), (2, 11, 3, 16), (2, 11, 3, 16))
    torch.manual_seed(4)
    output = memory_efficient_attention(q, k, v, p=0.3)
    torch.manual_seed(4)
    keep = philox.keep_mask(philox.draw(torch.device("cpu")), 0.3, 2, 3, 9, 11)
    torch.testing.assert_close(output, formula(q, k, v, keep=keep, p=0.3))
    assert memory_efficient_attention(q, k, v, output_dtype=torch.float64).dtype == torch.float64
    assert not memory_efficient_attention_forward(q, k, v, biases.LowerTriangularMask()).requires_grad


def test_lists_of_tensors():
    parts = [torch.randn(2, 5, 3, 8), torch.randn(1, 7, 3, 8), torch.randn(3, 1, 3, 8)]
    mask, rows = biases.BlockDiagonalCausalMask.from_tensor_list(parts)
    assert rows.shape == (1, 20, 3, 8)
    for part, result in zip(parts, mask.split(memory_efficient_attention(rows, rows, rows, mask)), strict=True):
        torch.testing.assert_close(
            result, memory_efficient_attention(part, part, part, biases.LowerTriangularMask()))  # fmt: skip
    keys = [torch.randn(2, 3, 3, 8), torch.randn(1, 9, 3, 8), torch.randn(3, 2, 3, 8)]
    mask, q, k, v = biases.BlockDiagonalMask.from_tensor_lists_qkv(parts, keys, keys)
    for part, key, result in zip(
        parts, keys, mask.split_queries(memory_efficient_attention(q, k, v, mask)), strict=True
    ):
        torch.testing.assert_close(result, memory_efficient_attention(part, key, key))
    assert [t.shape for t in mask.split_kv(k)] == [t.shape for t in keys]
    with pytest.raises(ValueError, match="use split_queries or split_kv"):
        mask.split(q)


def test_compiled():
    torch._dynamo.reset()
    q, k, v = drawn((2, 9, 3, 16), (2, 9, 3, 16), (2, 9, 3, 16))

    def call(q, k, v):
        return memory_efficient_attention(q, k, v, attn_bias=biases.LowerTriangularMask())

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), call(q, k, v))


def rows(*shape):
    return torch.randn(shape)


ROWS = rows(1, 15, 3, 16)
REFUSED = [
    ((rows(5, 8), rows(5, 8), rows(5, 8)), {}, r"must all be \(B, M, H, K\), \(B, M, K\) or \(B, M, G, H, K\)"),
    ((rows(1, 5, 2, 8), rows(1, 5, 8), rows(1, 5, 8)), {}, "must all be"),
    ((rows(2, 5, 2, 8), rows(1, 5, 2, 8), rows(1, 5, 2, 8)), {}, "nothing is broadcast"),
    ((rows(1, 5, 4, 8), rows(1, 5, 2, 8), rows(1, 5, 2, 8)), {}, "nothing is broadcast"),
    ((rows(1, 5, 4, 8), rows(1, 5, 4, 9), rows(1, 5, 4, 8)), {}, "do not fit"),
    ((ROWS, ROWS, ROWS), {"attn_bias": torch.ones(15, 15, dtype=torch.bool)}, "a floating tensor, which is added, got"),
    (
        (ROWS, ROWS, ROWS),
        {"attn_bias": "causal"},
        "must be an AttentionBias or a floating tensor, which is added, got str",
    ),
    ((ROWS, ROWS, ROWS), {"attn_bias": torch.ones(4, 15)}, "does not broadcast"),
    ((ROWS, ROWS, ROWS), {"p": 1.5}, r"dropout_p must be in \[0, 1\], got 1.5"),
    ((ROWS, ROWS, ROWS), {"attn_bias": BLOCKS}, "is of 19 keys, got 15"),
    ((rows(1, 9, 3, 16), ROWS, ROWS), {"attn_bias": BLOCKS}, "is of 15 queries, got 9"),
    ((rows(2, 15, 3, 16),) * 3, {"attn_bias": SAME}, "the batch size must be 1, got 2"),
]


@pytest.mark.parametrize(("tensors", "call", "message"), REFUSED)
def test_refused(tensors, call, message):
    with pytest.raises(ValueError, match=message):
        memory_efficient_attention(*tensors, **call)
