"""The attention function's arguments, against their definition."""

from types import SimpleNamespace

import pytest
import torch

from fastattn import testing
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
    """Weights are those of the definition; outputs are theirs applied to the values."""
    query, key, value, bias, sinks, shared, factors = rows(
        (2, 4, 6, 8), (2, 2, 9, 8), (2, 2, 9, 8), (1, 4, 6, 9), (2, 4, 6, 1), (4,), (4,), dtype=torch.float64
    )  # fmt: skip
    band = masks.fastattn_mask(**ask(WINDOW, 6, 9, 3))
    dense = evaluate(ask(WINDOW, 6, 9, 3))
    listed = torch.tensor([[[0, 3, -1]] * 6, [[2, 5, 8]] * 6])
    blocks = torch.tensor([[[[0, -1]] * 6, [[1, 2]] * 6], [[[2, 0]] * 6, [[1, -1]] * 6]])
    floats = torch.zeros(2, 1, 6, 9, dtype=torch.float64).masked_fill(~dense, float("-inf"))
    triangle = torch.ones(6, 9, dtype=torch.bool).tril()
    everything = torch.ones(2, 4, 6, 9, dtype=torch.bool)
    keys_listed = torch.zeros_like(everything)
    keys_listed[0, ..., [0, 3]] = keys_listed[1, ..., [2, 5, 8]] = True
    blocks_listed = torch.zeros_like(everything)  # of 4, 4 and 1 keys, for two heads each
    blocks_listed[0, :2, :, :4] = blocks_listed[0, 2:, :, 4:] = True
    blocks_listed[1, :2, :, :4] = blocks_listed[1, :2, :, 8:] = blocks_listed[1, 2:, :, 4:8] = True
    layer = layer_of(is_causal=True, indexer=SimpleNamespace(block_size=4))

    def low(values):
        return {
            k: v.float() if isinstance(v, torch.Tensor) and v.dtype == torch.float64 else v for k, v in values.items()
        }

    for options, seen in (
        ({}, everything),
        ({"softcap": 0.7}, everything),
        ({"position_bias": bias}, everything),
        ({"position_bias": bias, "softcap": 2.0}, everything),
        ({"s_aux": shared}, everything),
        ({"sinks": sinks}, everything),
        ({"sinks": sinks, "position_bias": bias}, everything),
        ({"head_mask": factors}, everything),
        ({"indices": listed}, keys_listed),
        ({"indices": listed, "position_bias": bias}, keys_listed),
        ({"block_indices": blocks}, blocks_listed),
        ({"block_indices": blocks, "position_bias": bias, "s_aux": shared}, blocks_listed),
        ({"scaling": 0.1}, everything),
    ):
        for mask in (band, dense, floats, None):

            def definition(dtype, mask=mask, options=options):
                """The output, from the weights."""
                given = options if dtype == torch.float64 else low(options)
                mask = mask.to(dtype) if mask is floats else mask
                inputs = (tensor.to(dtype) for tensor in (query, key, value))
                _, weights = attention.fastattn_attention(layer, *inputs, mask, output_attentions=True, **given)
                found = (weights @ value.to(dtype).repeat_interleave(2, dim=1)).transpose(1, 2)
                return found * given["head_mask"][:, None] if "head_mask" in given else found, weights

            (truth, weights), (peer, _) = definition(torch.float64), definition(torch.float32)
            assert torch.equal(weights != 0, seen & (triangle if mask is None else dense))
            inputs = [tensor.float() for tensor in (query, key, value)]
            given = mask.float() if mask is floats else mask
            found, nothing = attention.fastattn_attention(layer, *inputs, given, **low(options))
            assert nothing is None
            testing.assert_lawful(found, peer, truth)


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
            inputs = [t[:, :, a:b] for t in (query, key, value)]
            peer, _ = attention.fastattn_attention(layer, *inputs, part, **options)
            doubled = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            truth, _ = attention.fastattn_attention(layer, *(t.double() for t in inputs), part, **doubled)
            testing.assert_lawful(found[:, a:b], peer, truth)


def test_packed_sequences_that_are_no_single_row_are_refused(ask):
    query, key, value = rows((2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    causal = masks.fastattn_mask(**ask(masks.masking_utils.causal_mask_function, 9, 9))
    for mask in (None, causal):
        with pytest.raises(ValueError, match=r"one row.*got 2 rows of 9 queries and 9 keys"):
            attention.fastattn_attention(layer_of(), query, key, value, mask, cu_seq_lens_q=bounds)
    with pytest.raises(ValueError, match="got 1 rows of 9 queries and 7 keys"):
        attention.fastattn_attention(
            layer_of(), query[:1], key[:1, :, :7], value[:1, :, :7], None, cu_seq_lens_q=bounds
        )
    with pytest.raises(ValueError, match=r"cu_seq_lens_k.*got \[0, 3, 9\] beside \[0, 4, 9\]"):
        attention.fastattn_attention(
            layer_of(), query[:1], key[:1], value[:1], None, cu_seq_lens_q=bounds,
            cu_seq_lens_k=torch.tensor([0, 3, 9], dtype=torch.int32),
        )  # fmt: skip
    # A mask that tells sequences apart needs no bounds.
    given = torch.tensor([[True] * 7 + [False] * 2, [True] * 9])[:, None, None]
    found, _ = attention.fastattn_attention(layer_of(), query, key, value, given, cu_seq_lens_q=bounds)
    assert torch.equal(found, attention.fastattn_attention(layer_of(), query, key, value, given)[0])


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
