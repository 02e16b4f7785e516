"""The model: parity of its two kernel namespaces, initialisation, causality, cache."""

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from fastattn import dispatch, ops, testing
from fastattn.models import GPT, GPTConfig, KVCache

CONFIG = GPTConfig(vocab_size=61, block_size=24, n_layer=2, n_head=3, n_embd=36)


def make(config: GPTConfig = CONFIG, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(config)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def with_kernels(model: GPT, kernels: str) -> GPT:
    twin = GPT(replace(model.config, kernels=kernels))
    twin.load_state_dict(model.state_dict())
    return twin


def exactly(model: GPT) -> GPT:
    """The model on torch's kernels, in float64."""
    return with_kernels(model, "torch").double()


def assert_logits_lawful(found: torch.Tensor, model: GPT, idx: torch.Tensor) -> None:
    """Those of the last positions of the whole sequence, which torch's kernels see at once."""
    twins = with_kernels(model, "torch"), exactly(model)
    with torch.no_grad():
        peer, truth = (twin.eval()(idx)[0][:, -found.shape[1] :] for twin in twins)
    testing.assert_lawful(found, peer, truth)


@pytest.mark.parametrize("bias", [True, False])
def test_both_namespaces_give_the_same_loss_and_gradients(bias):
    ours = make(replace(CONFIG, bias=bias))
    theirs = with_kernels(ours, "torch")
    idx, targets = tokens(4, 19), tokens(4, 19)
    targets[0, :5] = -100
    exact = exactly(ours)

    def losses(model):
        if model is exact:  # whose own loss is rounded to float32
            return [F.cross_entropy(model(i)[0].flatten(0, 1), t.flatten()) for i, t in batches]
        return [model(i, t)[1] for i, t in batches]

    # A loss is one number, which may be right by chance.
    batches = [(idx, targets), *((tokens(4, 19, seed=seed), tokens(4, 19, seed=-seed)) for seed in range(2, 17))]
    dispatch.reset_served()
    found = losses(ours)
    assert sum(dispatch.served().values()) > 0, "fastattn's ops were not called"
    sides = found, losses(theirs), losses(exact)
    testing.assert_lawful(*(torch.stack(side).detach() for side in sides))
    testing.assert_lawful(*(model(idx)[0].detach() for model in (ours, theirs, exact)))
    for side in sides:
        side[0].backward()
    # All gradients as one result, in which each counts as much as any other.
    sizes = [p.grad.norm() for p in exact.parameters()]
    result, peer, truth = (
        torch.cat([(p.grad.double() / size).flatten() for p, size in zip(model.parameters(), sizes, strict=True)])
        for model in (ours, theirs, exact)
    )
    testing.assert_lawful(result.float(), peer.float(), truth)


def test_torch_kernels_do_not_touch_ours():
    dispatch.reset_served()
    make(replace(CONFIG, kernels="torch"))(tokens(2, 8), tokens(2, 8))
    assert not dispatch.served()


@pytest.mark.parametrize("kernels", ["fastattn", "torch"])
def test_bf16_autocast_trains_with_a_float32_loss(kernels):
    model = make(replace(CONFIG, kernels=kernels, dropout=0.1))
    reference, _ = with_kernels(model, "torch").eval()(tokens(2, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss = model(tokens(2, 12), tokens(2, 12))
        logits, _ = model.eval()(tokens(2, 12))
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert (logits.float() - reference).norm() < 0.02 * reference.norm()


def test_initialisation_follows_gpt2():
    config = GPTConfig(vocab_size=512, block_size=128, n_layer=6, n_head=4, n_embd=128)
    model = make(config)
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.position_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for block in model.blocks:
        for linear in (block.attention.qkv, block.mlp.expansion):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not linear.bias.any()
        for linear in (block.attention.projection, block.mlp.projection):
            assert linear.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * 6), rel=0.05)
        assert (block.mlp_norm.weight == 1).all() and not block.mlp_norm.bias.any()
    idx = torch.randint(512, (4, 128))
    _, loss = model(idx, idx.roll(-1, 1))
    assert loss.item() == pytest.approx(math.log(512), rel=0.02)


def test_output_matrix_is_the_embedding():
    model = make()
    V, T, L, C = CONFIG.vocab_size, CONFIG.block_size, CONFIG.n_layer, CONFIG.n_embd
    linear = (C * 3 * C + 3 * C) + (C * C + C) + (C * 4 * C + 4 * C) + (4 * C * C + C)
    assert model.num_parameters() == V * C + T * C + L * (linear + 4 * C) + 2 * C


def test_a_position_sees_no_later_token():
    model = make().eval()
    idx = tokens(1, 16)
    changed = idx.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % CONFIG.vocab_size
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[0, :10], after[0, :10])
    assert not torch.allclose(before[0, 10:], after[0, 10:])


@pytest.mark.parametrize("kernels", ["fastattn", "torch"])
@pytest.mark.parametrize("pieces", [[1] * 24, [10] + [1] * 14, [7, 9, 8]])
def test_cache_gives_the_logits_of_the_whole_sequence(kernels, pieces):
    model = make(replace(CONFIG, kernels=kernels)).eval()
    idx = tokens(2, 24)
    cache = KVCache(model.config, 2, dtype=torch.float32, device=idx.device)
    with torch.no_grad():
        parts = [model(piece, cache=cache)[0] for piece in idx.split(pieces, dim=1)]
    assert cache.length == 24
    assert_logits_lawful(torch.cat(parts, dim=1), model, idx)
    with pytest.raises(ValueError, match="1 to 0 tokens"):
        model(idx[:, :1], cache=cache)


def test_cached_steps_are_decoded():
    """Tokens after the first go through the decode kernel, not through attention with a mask."""
    model = make().eval()
    idx = tokens(2, 24)
    cache = KVCache(model.config, 2, dtype=torch.float32, device=idx.device)
    with torch.no_grad():
        model(idx[:, :10], cache=cache)
        with mock.patch.object(ops, "scaled_dot_product_attention", side_effect=AssertionError):
            parts = [model(piece, cache=cache)[0] for piece in (idx[:, 10:11], idx[:, 11:])]
    assert_logits_lawful(torch.cat(parts, dim=1), model, idx)


def test_dropout_acts_in_training_only():
    model = make(replace(CONFIG, dropout=0.5))
    idx = tokens(2, 8)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 5}, "multiple of n_head"),
        ({"n_layer": 0}, "n_layer must be an integer of at least 1"),
        ({"vocab_size": 1.5}, "vocab_size must be an integer"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"dropout": math.nan}, "dropout must be in"),
        ({"kernels": "cublas"}, "kernels must be one of"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


@pytest.mark.parametrize("length", [0, CONFIG.block_size + 1])
def test_bad_lengths(length):
    with pytest.raises(ValueError, match=f"got {length}"):
        make()(tokens(1, length))
