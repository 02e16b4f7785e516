"""Masks as bands, ranges and ids: what they say is what Transformers evaluates point by point."""

import pytest
import torch

from fastattn import testing
from fastattn.integrations.transformers import BandMask, RangeMask, attention, masks


def functions():
    """(name, mask function, what a band says of it) for 12 queries and keys."""
    m = masks.masking_utils
    ids = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0] * 2 + [1] * 10])
    positions = torch.tensor([[*range(5), *range(4), *range(3)], [*range(2), *range(10)]])
    padding = torch.tensor([0, 3])
    packed = m.packed_sequence_mask_function(ids)

    def causal(b, h, q, k):
        return k <= q

    def moved(function):
        return lambda b, h, q, k: function(b, h, positions[b, q], positions[b, k])

    chunked = m.and_masks(
        lambda b, h, q, k: (k - padding[b]) // 4 == (q - padding[b]) // 4, causal
    )  # fmt: skip
    window = m.sliding_window_causal_mask_function(3)
    return [
        ("causal", m.causal_mask_function, True),
        ("window", window, True),
        ("window of one", m.sliding_window_causal_mask_function(1), True),
        ("wide window", m.sliding_window_causal_mask_function(50), True),
        ("chunked", chunked, True),
        ("packed", m.and_masks(causal, packed), True),
        ("packed window", m.and_masks(window, packed), True),
        ("packed, positions begin anew", m.and_masks(moved(window), packed), True),
        ("packed chunks", m.and_masks(moved(chunked), packed), True),
        ("everything", lambda b, h, q, k: q >= 0, True),
        ("distance", lambda b, h, q, k: abs(q - k) <= 2, True),
        ("distance, the other way round", lambda b, h, q, k: k - q >= -2, True),
        ("strictly before", lambda b, h, q, k: k < q, True),
        ("strictly before, in a window", lambda b, h, q, k: (k + 1 <= q) & (q - 4 < k), True),
        ("both bounds", lambda b, h, q, k: (k - q < 3) & (q - k < 2), True),
        ("a table of keys", m.padding_mask_function(torch.rand(2, 40) < 0.7), True),
        ("two tables", m.and_masks(lambda b, h, q, k: ids[b, q % 12] == ids[b, k % 12], packed_or(ids)), True),
        ("prefix", m.or_masks(causal, lambda b, h, q, k: k < 4), False),
        ("far away", lambda b, h, q, k: abs(q - k) >= 3, False),
        ("blocks or causal", m.or_masks(causal, packed), False),
        ("only the future", lambda b, h, q, k: q - k <= -2, False),
        ("a product", lambda b, h, q, k: q * k >= 6, False),
    ]


def packed_or(ids):
    return lambda b, h, q, k: ids[b, k % 12] >= 1


FUNCTIONS = {name: (function, known) for name, function, known in functions()}


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_masks_are_what_transformers_evaluates(name, padding, ask, evaluate):
    function, known = FUNCTIONS[name]
    keep = None
    if padding:
        keep = torch.ones(2, 12, dtype=torch.bool)
        keep[0, :3] = keep[1, 10:] = False
    arguments = ask(function, 12, 12, attention_mask=keep, allow_is_causal_skip=known)
    found = masks.fastattn_mask(**arguments)
    assert isinstance(found, BandMask) == known
    assert torch.equal(found & True, evaluate(arguments))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    ("queries", "keys", "query_start", "key_start"),
    [
        (12, 12, 0, 0), (4, 12, 8, 0), (12, 20, 0, 0), (3, 20, 5, 0), (1, 12, 11, 0), (1, 20, 11, 0), (4, 6, 9, 7),
        (1, 3, 9, 7),
    ],
)  # fmt: skip
def test_offsets_of_caches(window, queries, keys, query_start, key_start, ask, evaluate):
    m = masks.masking_utils
    function = m.causal_mask_function if window is None else m.sliding_window_causal_mask_function(window)
    keep = torch.ones(2, query_start + queries, dtype=torch.bool)
    keep[1, :6] = False
    for attention_mask in (None, keep):
        arguments = ask(function, queries, keys, query_start, key_start, attention_mask)
        found, expected = masks.fastattn_mask(**arguments), evaluate(arguments)
        if found is None:
            assert expected.all() and queries == 1
        else:
            assert isinstance(found, BandMask if queries > 1 else RangeMask)
            assert torch.equal(found & True, expected)
        layer = torch.nn.Module()
        layer.is_causal = True
        q, k, v = (torch.randn(2, h, n, 8) for h, n in ((4, queries), (2, keys), (2, keys)))
        ours, _ = attention.fastattn_attention(layer, q, k, v, found)
        truth, _ = attention.fastattn_attention(layer, q.double(), k.double(), v.double(), expected)
        peer, _ = attention.fastattn_attention(layer, q, k, v, expected)
        testing.assert_lawful(ours, peer, truth)


def test_a_mask_is_a_tensor_for_who_takes_it_as_one(ask, evaluate):
    arguments = ask(FUNCTIONS["window"][0], 6, 8, 2)
    mask, expected = masks.fastattn_mask(**arguments), evaluate(arguments)
    assert mask.shape == expected.shape == (2, 1, 6, 8) and mask.dtype == torch.bool and len(mask) == 2
    assert mask.ndim == mask.dim() == 4 and mask.size(-1) == 8 and mask.size() == expected.size()
    assert mask[:, :, :, :8] is mask and mask.to("cpu") is mask and mask.contiguous() is mask
    for use in (
        lambda m: m[:, :, :, :5],
        lambda m: m[:, 0],
        lambda m: m | torch.eye(6, 8, dtype=torch.bool),
        lambda m: ~m,
        lambda m: m.to(torch.float32),
        lambda m: m.long(),
        lambda m: torch.where(m, 0.0, -1.0),
        lambda m: torch.zeros(2, 3, 6, 8).masked_fill(m, 1.0),
        lambda m: torch.cat([m, m], dim=-1),
        lambda m: torch.zeros(6, 8) + m,
        lambda m: 1.0 - m.float(),
    ):
        assert torch.equal(use(mask), use(expected))


def test_explicit_masks_are_recognised():
    """Padding, causality and both, bool and additive; anything else stays what it is."""
    lowest = torch.finfo(torch.float32).min
    keep = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    keep[0, ..., :3] = keep[1, ..., 7:] = False
    full = torch.ones(2, 1, 6, 9, dtype=torch.bool)
    holes = keep.clone()
    holes[0, ..., 5] = False
    for seen, kind in (
        (full, BandMask),
        (full & keep, BandMask),
        (full.tril(3), BandMask),
        (full.tril(3) & keep, BandMask),
        (full & holes, BandMask),
        (keep, RangeMask),
        (holes, None),
        (full.tril(2), None),
        (full.triu(), None),
        (full[:, :, :, :1].expand(2, 3, 6, 9), None),
    ):
        for mask in (seen, torch.zeros(seen.shape).masked_fill(~seen, lowest)):
            found = masks.recognised(mask)
            assert type(found) is kind if kind else found is mask
            assert masks.recognised(mask) is found
            if kind:
                assert torch.equal(found & True, seen)
        biased = torch.full(seen.shape, 0.5).masked_fill(~seen, lowest)
        assert masks.recognised(biased) is biased
    mask = torch.zeros(2, 1, 6, 9)
    assert masks.recognised(mask).ids is None
    mask[0, :, :, :3] = lowest
    assert masks.recognised(mask).ids is not None, "what has been written since counts"
