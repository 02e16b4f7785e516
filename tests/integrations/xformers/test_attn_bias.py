"""The attn_bias classes: their matrices as xformers documents them, what they make of each other, what they refuse."""

import inspect

import pytest
import torch

from fastattn.integrations.xformers import attn_bias as biases

PADDED = biases.BlockDiagonalPaddedKeysMask


def matrix(bias, queries, keys):
    return (bias.materialize((queries, keys)) == 0).int().tolist()


def test_matrices():
    assert matrix(biases.LowerTriangularMask(), 2, 4) == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert matrix(biases.LowerTriangularFromBottomRightMask(), 2, 4) == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert matrix(biases.LowerTriangularFromBottomRightMask().make_local_attention(2), 2, 4) == [
        [0, 1, 1, 0], [0, 0, 1, 1],
    ]  # fmt: skip
    assert matrix(biases.LocalAttentionFromBottomRightMask(1, 2), 4, 5) == [
        [1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1],
    ]  # fmt: skip
    blocks = biases.BlockDiagonalMask.from_seqlens([1, 2], [2, 2], device="cpu")
    assert matrix(blocks, 3, 4) == [[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert matrix(blocks.make_causal(), 3, 4) == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert matrix(blocks.make_causal_from_bottomright(), 3, 4) == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert matrix(blocks.make_local_attention(1), 3, 4) == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    padded = PADDED.from_seqlens([1, 2], 3, [2, 1], device="cpu")
    assert matrix(padded, 3, 6) == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0]]
    assert padded.k_seqinfo.seqstart.tolist() == [0, 3, 6] and padded.k_seqinfo.seqlen.tolist() == [2, 1]
    assert padded.make_local_attention(0, 0).window == (0, 0)


def test_fields_are_xformers():
    info = biases.BlockDiagonalMask.from_seqlens([3, 0, 5], device="cpu").q_seqinfo
    assert info.seqstart.dtype == torch.int32 and info.seqstart.tolist() == info.seqstart_py == [0, 3, 3, 8]
    assert (info.max_seqlen, info.min_seqlen) == (5, 0)
    assert list(info.intervals()) == [(0, 3), (3, 3), (3, 8)]


#: What code that asks isinstance relies on: the class of xformers above each, AttentionBias where there is none; and
#: the arguments of __init__, in their order.
BLOCKS, PAGES = ["q_seqinfo", "k_seqinfo"], ["q_seqinfo", "k_seqinfo", "block_tables", "page_size"]
CLASSES = {
    "LowerTriangularMask": (None, ["device"]),
    "LowerTriangularMaskWithTensorBias": ("LowerTriangularMask", ["bias"]),
    "LowerTriangularFromBottomRightMask": (None, []),
    "LowerTriangularFromBottomRightLocalAttentionMask": ("LowerTriangularFromBottomRightMask", ["_window_size"]),
    "LocalAttentionFromBottomRightMask": (None, ["window_left", "window_right"]),
    "BlockDiagonalMask": (None, [*BLOCKS, "_batch_sizes"]),
    "BlockDiagonalCausalMask": ("BlockDiagonalMask", [*BLOCKS, "_batch_sizes"]),
    "BlockDiagonalCausalFromBottomRightMask": ("BlockDiagonalMask", [*BLOCKS, "_batch_sizes"]),
    "BlockDiagonalCausalLocalAttentionMask": ("BlockDiagonalCausalMask", [*BLOCKS, "_batch_sizes", "_window_size"]),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (
        "BlockDiagonalCausalFromBottomRightMask", [*BLOCKS, "_batch_sizes", "_window_size"]),
    "BlockDiagonalPaddedKeysMask": (None, BLOCKS),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": ("BlockDiagonalPaddedKeysMask", [*BLOCKS, "causal_diagonal"]),
    "BlockDiagonalLocalAttentionPaddedKeysMask": (
        "BlockDiagonalPaddedKeysMask", [*BLOCKS, "window_left", "window_right"]),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": ("BlockDiagonalPaddedKeysMask", [*BLOCKS, "_window_size"]),
    "BlockDiagonalGappyKeysMask": (None, BLOCKS),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": ("BlockDiagonalGappyKeysMask", BLOCKS),
    "PagedBlockDiagonalPaddedKeysMask": (None, PAGES),
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask": ("PagedBlockDiagonalPaddedKeysMask", PAGES),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_classes_are_related_and_made_as_xformers(name):
    parent, arguments = CLASSES[name]
    kind = getattr(biases, name)
    assert list(inspect.signature(kind).parameters) == arguments
    above = {name}
    while parent is not None:
        above.add(parent)
        parent = CLASSES[parent][0]
    assert {other for other in CLASSES if issubclass(kind, getattr(biases, other))} == above
    assert issubclass(kind, biases.AttentionBias)


@pytest.mark.parametrize(
    "bias",
    [
        biases.LowerTriangularMask(),
        biases.LocalAttentionFromBottomRightMask(1, 1),
        biases.LowerTriangularMask().add_bias(torch.ones(2, 2)),
        biases.BlockDiagonalMask.from_seqlens([1, 2], device="cpu").make_local_attention(2),
        PADDED.from_seqlens([1, 2], 3, [2, 1], device="cpu"),
        biases.PagedBlockDiagonalPaddedKeysMask.from_seqlens([1], [2], torch.zeros(1, 1).int(), 4, device="cpu"),
    ],
    ids=lambda bias: type(bias).__name__,
)
def test_to_another_device(bias):
    moved = bias.to("meta")
    assert type(moved) is type(bias) and moved.window == bias.window
    for value in (*vars(moved).values(), *vars(getattr(moved, "k_seqinfo", object))):
        assert not isinstance(value, torch.Tensor) or value.is_meta


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: biases.LocalAttentionFromBottomRightMask(-1, 0), "must be at least 0, got -1 and 0"),
        (lambda: biases.LowerTriangularFromBottomRightLocalAttentionMask(0), "window_size must be at least 1, got 0"),
        (lambda: biases.BlockDiagonalMask.from_seqlens([1], [1, 2]), "as many sequences of queries as of keys"),
        (lambda: biases.BlockDiagonalMask.from_seqlens([-1]), "a length of at least 0"),
        (lambda: PADDED.from_seqlens([1], 3, [4]), r"kv_seqlen must be in \[0, kv_padding\], \[0, 3\], got \[4\]"),
        (lambda: biases.BlockDiagonalGappyKeysMask.from_seqlens([1], [0, 3], [4]), "does not fit between 0 and 3"),
        (lambda: biases.BlockDiagonalGappyKeysMask.from_seqlens([1], [0], [1]), "one number more than kv_seqlen"),
        (lambda: biases.BlockDiagonalMask.from_seqlens([2], [1]).make_causal_from_bottomright(),
         "block 0 has 2 queries and 1 keys"),
        (lambda: biases.BlockDiagonalMask.from_seqlens([2]).make_local_attention(0), "at least 1, got 0"),
        (lambda: biases.BlockDiagonalMask.from_seqlens([2]).materialize((3, 3)), "of 2 queries and 2 keys"),
    ],
)  # fmt: skip
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_installed():
    import importlib.util

    if importlib.util.find_spec("xformers") is not None:
        pytest.skip("xformers is installed")
    from fastattn.integrations import xformers as integration

    assert integration.install()
    try:
        import xformers
        import xformers.ops as xops
        from xformers.ops import fmha, unbind
        from xformers.ops.fmha import BlockDiagonalMask
        from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask

        assert xformers.__version__ == integration.VERSION
        assert xops.memory_efficient_attention is integration.memory_efficient_attention
        assert xops.memory_efficient_attention_backward is fmha.memory_efficient_attention_backward
        assert fmha.merge_attentions is integration.merge_attentions
        assert xops.LowerTriangularMask is biases.LowerTriangularMask is fmha.LowerTriangularMask
        assert fmha.attn_bias.BlockDiagonalMask is BlockDiagonalMask is biases.BlockDiagonalMask
        assert LowerTriangularFromBottomRightMask is biases.LowerTriangularFromBottomRightMask
        assert [t.shape for t in unbind(torch.randn(2, 3), 0)] == [(3,), (3,)]
    finally:
        integration.uninstall()
    assert importlib.util.find_spec("xformers") is None
