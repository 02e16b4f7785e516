"""The attention function's arguments, against their definition."""

import pytest
import torch

from fastattn.integrations.transformers import attention, masks

WINDOW = masks.masking_utils.sliding_window_causal_mask_function(3)


def layer_of(**attributes):
    layer = torch.nn.Module()
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def rows(*shapes, dtype=torch.float32, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def test_arguments_that_few_models_pass(ask, evaluate):
    """Against the definition, in float64: weights that output_attentions returns, applied to the values."""
    query, key, value, bias, sinks, shared, factors = rows(
        (2, 4, 6, 8), (2, 2, 9, 8), (2, 2, 9, 8), (1, 4, 6, 9), (2, 4, 6, 1), (4,), (4,), dtype=torch.float64
    )  # fmt: skip
    band = masks.fastattn_mask(**ask(WINDOW, 6, 9, 3))
    dense = evaluate(ask(WINDOW, 6, 9, 3))
    listed = torch.tensor([[[0, 3, -1]] * 6, [[2, 5, 8]] * 6])
    floats = torch.zeros(2, 1, 6, 9, dtype=torch.float64).masked_fill(~dense, float("-inf"))
    for options in (
        {},
        {"softcap": 0.7},
        {"position_bias": bias},
        {"position_bias": bias, "softcap": 2.0},
        {"s_aux": shared},
        {"sinks": sinks},
        {"sinks": sinks, "position_bias": bias},
        {"head_mask": factors},
        {"indices": listed},
        {"scaling": 0.1},
    ):
        for mask in (band, dense, floats, None):
            found, weights = attention.fastattn_attention(
                layer_of(is_causal=True), query, key, value, mask, output_attentions=True, **options
            )
            values = value.repeat_interleave(2, dim=1)
            expected = (weights @ values).transpose(1, 2)
            if "head_mask" in options:
                expected = expected * factors[:, None]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            if mask is not None and "indices" not in options:
                assert torch.equal(weights == 0, ~dense.expand_as(weights))
    with pytest.raises(NotImplementedError, match="block_indices"):
        attention.fastattn_attention(layer_of(), query, key, value, None, block_indices=listed)


def test_packed_sequences_by_their_lengths(ask):
    query, key, value = rows((1, 4, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8))
    bounds = torch.tensor([0, 4, 6, 9], dtype=torch.int32)
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds.clone(), "max_length_q": 4}
    causal = masks.fastattn_mask(**ask(masks.masking_utils.causal_mask_function, 9, 9))
    window = masks.fastattn_mask(**ask(WINDOW, 9, 9))
    (bias,) = rows((1, 4, 9, 9))
    for mask, is_causal, options in (
        (None, True, {}),
        (None, False, {"softcap": 2.0}),
        (causal, True, {}),
        (window, True, {"s_aux": torch.tensor([0.3, -1.0, 0.0, 2.0])}),
        (window, True, {"position_bias": bias}),
    ):
        layer = layer_of(is_causal=is_causal)
        found, _ = attention.fastattn_attention(layer, query, key, value, mask, **given, **options)
        for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            part = mask and torch.as_tensor(mask.dense()[:, :, a:b, a:b])
            if "position_bias" in options:
                options = {"position_bias": bias[:, :, a:b, a:b]}
            alone, _ = attention.fastattn_attention(
                layer, *(t[:, :, a:b] for t in (query, key, value)), part, **options
            )  # fmt: skip
            torch.testing.assert_close(found[:, a:b], alone)


def test_one_query_that_wants_gradients_is_not_decoded(monkeypatch):
    query, key, value = rows((2, 4, 1, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    ways = []
    for name in ("_attended", "_decoded"):
        way = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, name=name, way=way: ways.append(name) or way(*a))
    attention.fastattn_attention(layer_of(), query, key, value, None)
    attention.fastattn_attention(layer_of(), query.requires_grad_(), key, value, None)
    with torch.no_grad():
        attention.fastattn_attention(layer_of(), query, key, value, None)
    assert ways == ["_decoded", "_attended", "_decoded"]
