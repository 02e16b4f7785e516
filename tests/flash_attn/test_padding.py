"""unpad_input, pad_input and their relatives."""

import pytest
import torch

from fastattn.flash_attn import (
    flash_attn_varlen_func,
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64], ids=str)
def test_unpad_and_back(dtype):
    x = torch.randn(3, 4, 2, 5, requires_grad=True)
    rows, indices, bounds, longest, used = unpad_input(x, MASK.to(dtype))
    assert torch.equal(rows, x[MASK.bool()]) and indices.tolist() == [1, 2, 8, 9, 10, 11]
    assert bounds.tolist() == [0, 2, 2, 6] and bounds.dtype == used.dtype == torch.int32
    assert longest == 4 and isinstance(longest, int) and used.tolist() == [2, 0, 4]
    back = pad_input(rows, indices, 3, 4)
    assert torch.equal(back, x * MASK[:, :, None, None])
    grad = torch.randn_like(back)
    assert torch.equal(torch.autograd.grad(back, x, grad)[0], grad * MASK[:, :, None, None])


def test_places_that_are_not_used_are_kept():
    x = torch.arange(12).view(3, 4, 1)
    unused = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    rows, indices, bounds, longest, used = unpad_input(x, MASK, unused)
    assert indices.tolist() == rows.flatten().tolist() == [1, 2, 3, 8, 9, 10, 11]
    assert bounds.tolist() == [0, 3, 3, 7] and used.tolist() == [2, 0, 4] and longest == 4


def test_concatenated_sequences():
    x = torch.arange(12).view(2, 6, 1)
    rows, indices, bounds, longest = unpad_input_for_concatenated_sequences(
        x, torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    )
    assert rows.flatten().tolist() == indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert bounds.tolist() == [0, 2, 5, 11] and longest == 6


def test_rows_by_number():
    x, indices = torch.randn(5, 3, requires_grad=True), torch.tensor([3, 0])
    rows = index_first_axis(x, indices)
    assert torch.equal(rows, x[indices])
    assert torch.equal(index_put_first_axis(rows, indices, 4)[[3, 0]], rows)
    assert torch.autograd.grad(rows.sum(), x)[0].sum(1).tolist() == [3, 0, 0, 3, 0]


def test_nothing_at_all():
    rows, indices, bounds, longest, used = unpad_input(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    assert rows.shape == (0, 4) and bounds.tolist() == [0, 0, 0] and longest == 0 and used.tolist() == [0, 0]
    assert not pad_input(rows, indices, 2, 3).any()


def test_padded_attention_is_packed_attention(hold_to):
    torch.manual_seed(0)
    lengths = torch.tensor([5, 2, 9])
    mask = torch.arange(9) < lengths[:, None]
    q, k, v = (torch.randn(3, 9, 4, 16) for _ in range(3))
    (q_rows, indices, bounds, longest, _), (k_rows, *_), (v_rows, *_) = (unpad_input(t, mask) for t in (q, k, v))

    def alone(q, k, v):
        heads = (t.transpose(0, 1)[None] for t in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1)

    packed = flash_attn_varlen_func(q_rows, k_rows, v_rows, bounds, bounds, longest, longest, causal=True)
    padded = pad_input(packed, indices, 3, 9)
    for b, length in enumerate(lengths.tolist()):
        hold_to(alone, [t[b, :length] for t in (q, k, v)], [padded[b, :length]])
        assert not padded[b, length:].any()


@pytest.mark.parametrize("mask", [torch.ones(3, 5), torch.ones(3), torch.ones(4, 4)])
def test_masks_that_do_not_fit(mask):
    x = torch.randn(3, 4, 2)
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, S\) = \(3, 4\), got"):
        unpad_input(x, mask.bool())
    with pytest.raises(ValueError, match=r"unused_mask must be \(B, S\) = \(3, 4\), got"):
        unpad_input(x, torch.ones(3, 4), mask)
    with pytest.raises(ValueError, match=r"attention_mask_in_length must be \(B, S\) = \(3, 4\), got"):
        unpad_input_for_concatenated_sequences(x, mask.int())
