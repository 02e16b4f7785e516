"""Sampling: reproducible, within its limits, and the cache changes nothing."""

import math

import pytest
import torch

from fastattn.generate import generate, load, sample
from fastattn.models import GPT, GPTConfig
from fastattn.train.checkpoint import CheckpointError
from fastattn.train.tokenizer import encode, train_tokenizer

TOKENIZER = train_tokenizer(b"the cat sat on the mat and the dog sat on the log\n" * 20, 300)


@pytest.fixture(scope="module", params=["fastattn", "torch"])
def model(request):
    torch.manual_seed(0)
    config = GPTConfig(TOKENIZER.get_vocab_size(), 32, 2, 2, 32, dropout=0.3, kernels=request.param)
    model = GPT(config).eval()
    with torch.no_grad():  # far from uniform, so that tokens differ
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


def greedy_without_cache(model: GPT, prompt: str, count: int) -> str:
    ids = encode(TOKENIZER, prompt.encode())
    for _ in range(count):
        logits, _ = model(ids[None])
        ids = torch.cat([ids, logits[0, -1].argmax(dim=-1, keepdim=True)])
    return TOKENIZER.decode(ids.tolist())


def test_cache_gives_the_greedy_tokens_of_whole_forward_passes(model):
    count = model.config.block_size - len(encode(TOKENIZER, b"the cat"))
    text = generate(model, TOKENIZER, "the cat", max_new_tokens=count, temperature=0.0)
    assert text == greedy_without_cache(model, "the cat", count)


def test_generation_goes_on_beyond_the_block(model):
    prompt = "the dog " * 60
    assert len(encode(TOKENIZER, prompt.encode())) > model.config.block_size
    text = generate(model, TOKENIZER, prompt, max_new_tokens=100, temperature=0.0)
    assert text.startswith(prompt)
    assert len(encode(TOKENIZER, text.encode())) > 100


def test_same_seed_same_text(model):
    texts = [generate(model, TOKENIZER, "the", max_new_tokens=40, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert generate(model, TOKENIZER, "the", max_new_tokens=40, seed=1) == texts[0]
    assert torch.equal(torch.get_rng_state(), state), "the global generator is the caller's"


def test_no_new_tokens(model):
    assert generate(model, TOKENIZER, "thé 🙂", max_new_tokens=0) == "thé 🙂"


def draws(logits, n=400, **options) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": 1.0, "top_k": None, "top_p": None, "kernels": "torch", **options}
    return {sample(logits, generator, **options).item() for _ in range(n)}


def test_top_k_top_p_and_temperature():
    logits = torch.tensor([0.1, 0.5, 0.2, 0.05, 0.15]).log()
    assert draws(logits) == {0, 1, 2, 3, 4}
    assert draws(logits, top_k=2) == {1, 2}
    assert draws(logits, top_k=99) == {0, 1, 2, 3, 4}
    assert draws(logits, top_p=0.69) == {1, 2}
    assert draws(logits, top_p=0.71) == {1, 2, 4}
    assert draws(logits, top_p=1e-9) == {1}
    assert draws(logits, top_k=3, top_p=1.0) == {1, 2, 4}
    assert draws(logits, temperature=0.0) == draws(logits, temperature=1e-300) == {1}
    assert draws(torch.zeros(5), top_k=2) == {0, 1}, "ties: exactly k, the first ones"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("seed", -1),
    ],
)
def test_bad_values_are_named(model, option, value):
    with pytest.raises(ValueError, match=rf"{option} must be .*{value}"):
        generate(model, TOKENIZER, "the", **{option: value})


@pytest.mark.parametrize("prompt", ["", "\udcff"])
def test_bad_prompts(model, prompt):
    with pytest.raises(ValueError, match="prompt"):
        generate(model, TOKENIZER, prompt)


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(tmp_path)
