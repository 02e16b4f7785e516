"""memory_efficient_attention: every bias against its own matrix, every layout, gradients, bad input."""

import dataclasses

import pytest
import torch

from fastattn import philox, testing
from fastattn.cases import Case, Suite
from fastattn.integrations.xformers import attn_bias as biases
from fastattn.integrations.xformers import (
    memory_efficient_attention,
    memory_efficient_attention_backward,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
    memory_efficient_attention_partial,
    merge_attentions,
)
from fastattn.numerics import accumulation_dtype
from fastattn.ops.attention.samples import UNFUSED_PEER


def definition(query, key, value, attn_bias=None, scale=None, bias=None, keep=None, p=0.0):
    """(softmax(scale * Q K^T + bias) V, lse) in the dtype of the query; a tensor bias is what `attn_bias` holds."""
    shape, scale = (*query.shape[:-1], value.shape[-1]), query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (t.reshape(*t.shape[:2], -1, t.shape[-1]) for t in (query, key, value))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * scale
    if bias is not None:
        scores = scores + (bias.reshape(bias.shape[0], -1, *bias.shape[-2:]) if bias.ndim in (3, 5) else bias)
    if isinstance(attn_bias, biases.AttentionBias):
        seen = attn_bias.materialize(scores.shape[-2:], torch.float64) == 0
        scores = scores.masked_fill(~seen, -torch.inf)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    if keep is not None:
        weights = weights * keep / (1 - p)
    lse = scores.detach().to(accumulation_dtype(query.dtype)).logsumexp(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, value).reshape(shape), lse


def formula(*args, **kwargs):
    return definition(*args, **kwargs)[0]


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


class Passes(torch.autograd.Function):
    """Both passes as callers with an autograd of their own have them: (output, lse)."""

    @staticmethod
    def forward(ctx, query, key, value, attn_bias, scale):
        output, lse = memory_efficient_attention_forward_requires_grad(query, key, value, attn_bias, scale=scale)
        ctx.save_for_backward(output, lse, query, key, value)
        ctx.call = {"attn_bias": attn_bias, "scale": scale}
        ctx.mark_non_differentiable(lse)
        return output, lse

    @staticmethod
    def backward(ctx, grad, _):
        return *memory_efficient_attention_backward(grad, *ctx.saved_tensors, **ctx.call), None, None


def passes(query, key, value, attn_bias=None, scale=None):
    return Passes.apply(query, key, value, attn_bias, scale)


PASSES = dataclasses.replace(
    SUITE, name="both passes", function=passes, peer=definition, truth=definition, results=("output", "lse")
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PASSES.cases, ids=lambda case: case.name)
def test_passes_of_every_bias(case, dtype, skip_without_native):
    testing.check(passes, PASSES, case, dtype=dtype)


@pytest.fixture
def lawful(hold_to):
    """Call with (call, exact, leaves): the result and all gradients keep the law beside those of `exact`."""

    def check(call, exact, *leaves):
        output = call(*leaves)
        grad = torch.randn_like(output)
        hold_to(exact, leaves, [output, *torch.autograd.grad(output, leaves, grad)], grad)

    return check


def drawn(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
def test_tensors_have_gradients(causal, lawful):
    shape = (2, 9, 3, 16)
    leaves = drawn(shape, shape, shape, (2, 3, 9, 9))
    triangle = biases.LowerTriangularMask()

    def call(q, k, v, bias):
        return memory_efficient_attention(q, k, v, triangle.add_bias(bias) if causal else bias)

    lawful(call, lambda q, k, v, b: formula(q, k, v, triangle if causal else None, bias=b), *leaves)
    both = triangle.add_bias(leaves[3]).materialize((2, 3, 9, 9))
    assert torch.equal(both, leaves[3] + triangle.materialize((2, 3, 9, 9)))


def test_one_head(lawful):
    """(B, M, K), with a bias of three dimensions."""
    leaves = drawn((2, 9, 16), (2, 11, 16), (2, 11, 8), (2, 9, 11))
    lawful(memory_efficient_attention, lambda q, k, v, bias: formula(q, k, v, bias=bias), *leaves)


def expanded(tensor):
    return tensor.expand(-1, -1, -1, 4, -1)


@pytest.mark.parametrize("heads", [1, 4])
def test_groups(heads, lawful):
    """(B, M, G, H, K); expanded keys are read once and get the gradient of all."""
    leaves = drawn((2, 9, 2, 4, 16), (2, 11, 2, heads, 16), (2, 11, 2, heads, 16), (2, 2, 4, 9, 11))
    lawful(
        lambda q, k, v, bias: memory_efficient_attention(q, expanded(k), expanded(v), bias),
        lambda q, k, v, bias: formula(q, expanded(k), expanded(v), bias=bias), *leaves,
    )  # fmt: skip


def test_groups_in_blocks(lawful):
    leaves = drawn((1, 15, 2, 4, 16), (1, 19, 2, 1, 16), (1, 19, 2, 1, 16))
    for function in (memory_efficient_attention, lambda *args: passes(*args)[0]):
        lawful(
            lambda q, k, v, function=function: function(q, expanded(k), expanded(v), BLOCKS),
            lambda q, k, v: formula(q, expanded(k), expanded(v), BLOCKS), *leaves,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("shapes", "bias", "of_lse"),
    [
        (((2, 9, 16), (2, 11, 16), (2, 11, 8)), (2, 9, 11), (2, 1, 9)),
        (((2, 9, 3, 16), (2, 11, 3, 16), (2, 11, 3, 8)), (9, 11), (2, 3, 9)),
        (((2, 9, 2, 4, 16), (2, 11, 2, 4, 16), (2, 11, 2, 4, 8)), None, (2, 2, 4, 9)),
        (((1, 15, 2, 4, 16), (1, 19, 2, 4, 16), (1, 19, 2, 4, 8)), BLOCKS, (1, 2, 4, 15)),
    ],
)
def test_passes_of_every_layout(shapes, bias, of_lse, lawful):
    """Tensor biases that broadcast, and where lse lies."""
    leaves = drawn(*shapes)
    bias = torch.randn(bias) if isinstance(bias, tuple) else bias
    held = {"bias": bias} if isinstance(bias, torch.Tensor) else {"attn_bias": bias}
    lawful(lambda q, k, v: passes(q, k, v, bias)[0], lambda q, k, v: formula(q, k, v, **held), *leaves)
    assert passes(*leaves, bias)[1].shape == of_lse


def padded_blocks(room, lengths):
    return biases.BlockDiagonalPaddedKeysMask.from_seqlens([6, 5, 4], room, lengths, device="cpu")


#: What the queries see of the keys in each of two parts, and how many keys there are.
PARTS = {
    "halves": ((None, 8), (None, 11)),
    "a triangle and the rest": ((biases.LowerTriangularMask(), 8), (None, 11)),
    "queries that see nothing of one part, or of both": (
        (padded_blocks(8, [8, 0, 0]), 24), (padded_blocks(4, [3, 4, 0]), 12)),
}  # fmt: skip


def hidden(attn_bias, keys):
    """0 and -inf, (15, keys)"""
    return torch.zeros(15, keys) if attn_bias is None else attn_bias.materialize((15, keys))


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_the_keys(name, dtype, groups, recorded, skip_without_native, hold_to):
    """Merged outputs, lse and gradients are those of all keys: recorded, or by passes that know the merged results."""
    torch.manual_seed(2)
    heads = (2, 4) if groups else (3,)
    (bias, keys), (other, more) = PARTS[name]
    rows = (15, keys, keys, more, more)
    leaves = [torch.randn(1, n, *heads, 16).to(dtype).requires_grad_() for n in rows]
    q, k, v, k2, v2 = leaves
    parts = ((k, v, bias), (k2, v2, other))
    output, lse = merge_attentions(*zip(*(memory_efficient_attention_partial(q, *part) for part in parts), strict=True))
    grad = torch.randn_like(output)
    if recorded:
        grads = torch.autograd.grad(output, leaves, grad)
    else:
        (dq, *d), (dq2, *d2) = (memory_efficient_attention_backward(grad, output, lse, q, *part) for part in parts)
        grads = (dq + dq2, *d, *d2)

    def whole(q, k, v, k2, v2):
        mask = torch.cat((hidden(bias, keys), hidden(other, more)), 1).to(q.dtype)
        return definition(q, torch.cat((k, k2), 1), torch.cat((v, v2), 1), bias=mask)

    hold_to(lambda *tensors: whole(*tensors)[0], leaves, [output, *grads], grad)
    hold_to(lambda *tensors: whole(*tensors)[1].reshape(lse.shape), leaves, [lse])


def test_parts_are_lists_or_one_tensor():
    outputs, lses = torch.randn(3, 2, 5, 4, 8).bfloat16(), torch.randn(3, 2, 4, 5)
    output, lse = merge_attentions(outputs, lses)
    assert output.dtype == torch.bfloat16 and lse.dtype == torch.float32
    for found, expected in zip(merge_attentions(outputs.unbind(), list(lses)), (output, lse), strict=True):
        assert torch.equal(found, expected)
    wide, nothing = merge_attentions(outputs, lses, write_lse=False, output_dtype=torch.float32)
    assert nothing is None and wide.dtype == torch.float32 and torch.equal(wide.bfloat16(), output)


def test_dropout_and_dtypes(hold_to):
    q, k, v = drawn((2, 9, 3, 16), (2, 11, 3, 16), (2, 11, 3, 16))
    torch.manual_seed(4)
    output = memory_efficient_attention(q, k, v, p=0.3)
    torch.manual_seed(4)
    keep = philox.keep_mask(philox.draw(torch.device("cpu")), 0.3, 2, 3, 9, 11)
    hold_to(lambda *tensors: formula(*tensors, keep=keep, p=0.3), (q, k, v), [output])
    assert memory_efficient_attention(q, k, v, output_dtype=torch.float64).dtype == torch.float64
    assert not memory_efficient_attention_forward(q, k, v, biases.LowerTriangularMask()).requires_grad


def test_parts_with_dropout(hold_to):
    """Each part draws its mask; merged they are attention to all keys under both."""
    q, k, v = drawn((2, 9, 3, 16), (2, 11, 3, 16), (2, 11, 3, 16))

    def attended(p):
        return [
            memory_efficient_attention_partial(q, *keys, p=p) for keys in ((k[:, :4], v[:, :4]), (k[:, 4:], v[:, 4:]))
        ]

    torch.manual_seed(4)
    parts = attended(0.3)
    torch.manual_seed(4)
    masks = [philox.keep_mask(philox.draw(torch.device("cpu")), 0.3, 2, 3, 9, keys) for keys in (4, 7)]
    output, lse = merge_attentions(*zip(*parts, strict=True))
    grad = torch.randn(output.shape)
    found = [output, *torch.autograd.grad(output, (q, k, v), grad)]
    hold_to(lambda *tensors: formula(*tensors, keep=torch.cat(masks, -1), p=0.3), (q, k, v), found, grad)
    _, without = merge_attentions(*zip(*attended(0.0), strict=True))
    assert torch.equal(lse, without)


def test_lists_of_tensors(hold_to):
    parts = [torch.randn(2, 5, 3, 8), torch.randn(1, 7, 3, 8), torch.randn(3, 1, 3, 8)]
    mask, rows = biases.BlockDiagonalCausalMask.from_tensor_list(parts)
    assert rows.shape == (1, 20, 3, 8)
    triangle = biases.LowerTriangularMask()
    for part, result in zip(parts, mask.split(memory_efficient_attention(rows, rows, rows, mask)), strict=True):
        hold_to(lambda part: formula(part, part, part, triangle), [part], [result])
    keys = [torch.randn(2, 3, 3, 8), torch.randn(1, 9, 3, 8), torch.randn(3, 2, 3, 8)]
    mask, q, k, v = biases.BlockDiagonalMask.from_tensor_lists_qkv(parts, keys, keys)
    results = mask.split_queries(memory_efficient_attention(q, k, v, mask))
    for part, key, result in zip(parts, keys, results, strict=True):
        hold_to(lambda part, key: formula(part, key, key), [part, key], [result])
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


def test_passes_alone_have_no_dropout():
    with pytest.raises(ValueError, match=r"memory_efficient_attention_forward_requires_grad: p must be 0, got 0.1"):
        memory_efficient_attention_forward_requires_grad(ROWS, ROWS, ROWS, p=0.1)
    with pytest.raises(ValueError, match=r"memory_efficient_attention_backward: p must be 0, got 0.1"):
        memory_efficient_attention_backward(ROWS, ROWS, rows(1, 3, 15), ROWS, ROWS, ROWS, p=0.1)


@pytest.mark.parametrize(
    ("grad", "output", "lse", "message"),
    [
        (rows(1, 15, 3, 8), ROWS, rows(1, 3, 15), r"grad must be \(1, 15, 3, 16\), got \(1, 15, 3, 8\)"),
        (ROWS, rows(1, 15, 48), rows(1, 3, 15), r"output must be \(1, 15, 3, 16\), got \(1, 15, 48\)"),
        (ROWS, ROWS, rows(1, 3, 16), r"lse must be \(1, 3, 15\), got \(1, 3, 16\)"),
    ],
)
def test_results_that_do_not_fit(grad, output, lse, message):
    with pytest.raises(ValueError, match=message):
        memory_efficient_attention_backward(grad, output, lse, ROWS, ROWS, ROWS)


@pytest.mark.parametrize(
    ("outputs", "lses", "message"),
    [
        ([], [], "at least one, got 0 outputs and 0 lse"),
        ([ROWS], [rows(1, 3, 15)] * 2, "an lse for each output, and at least one, got 1 outputs and 2 lse"),
        ([ROWS], [rows(1, 15, 3)], r"got \(1, 15, 3, 16\) and \(1, 15, 3\)"),
        ([ROWS, rows(1, 15, 3, 8)], [rows(1, 3, 15)] * 2, r"got \(1, 15, 3, 8\) and \(1, 3, 15\) beside"),
        ([rows(1, 15, 16)], [rows(1, 1, 15)], r"must all be one \(B, M, H, Kv\) or"),
    ],
)
def test_parts_that_do_not_fit(outputs, lses, message):
    with pytest.raises(ValueError, match=message):
        merge_attentions(outputs, lses)
