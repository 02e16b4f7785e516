"""Sampling text from a trained GPT."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastattn.models.gpt import GPT, KERNELS, KVCache
from fastattn.train import checkpoint as checkpoints
from fastattn.train.tokenizer import encode
from fastattn.train.trainer import load_model


def load(directory: Path) -> tuple[GPT, Tokenizer]:
    """The model, in evaluation mode, and the tokenizer of a run's checkpoint.

    Raises:
        CheckpointError: there is no usable checkpoint.
    """
    checkpoint = checkpoints.load(directory)
    return load_model(checkpoint).eval(), Tokenizer.from_str(checkpoint.state["tokenizer"])


@torch.no_grad()
def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """Continue a prompt; returns the prompt and its continuation.

    Args:
        model: used as it is; put it in evaluation mode first.
        tokenizer: the one that the model was trained with.
        prompt: text to continue, at least one character; only its last ``block_size`` tokens are seen.
        max_new_tokens: how many tokens to add.
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the fewest likeliest tokens whose probabilities reach p (Holtzman et al. 2020,
            nucleus
            sampling); applied after top_k.
        seed: the same seed gives the same text.

    Raises:
        ValueError: an argument is outside its range.
    """
    if not prompt:
        raise ValueError("prompt must have at least one character")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")
    try:
        ids = encode(tokenizer, prompt.encode("utf-8"))
    except UnicodeEncodeError:
        raise ValueError(f"prompt is not valid Unicode text: {prompt!a}") from None
    generator = torch.Generator().manual_seed(seed)
    block_size = model.config.block_size
    cache: KVCache | None = None
    for _ in range(max_new_tokens):
        if cache is None:
            cache = _new_cache(model)
            pending = ids[-block_size:]
        elif cache.length == block_size:
            # Learned positions cannot slide: begin again with the newer half, so that this costs one forward
            # pass every block_size/2 tokens rather than one per token.
            cache = _new_cache(model)
            pending = ids[-max(1, block_size // 2) :]
        else:
            pending = ids[-1:]
        logits, _ = model(pending[None], cache=cache)
        token = sample(
            logits[0, -1],
            generator,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            kernels=model.config.kernels,
        )
        ids = torch.cat([ids, token])
    return tokenizer.decode(ids.tolist())


def sample(
    logits: Tensor,
    generator: torch.Generator,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    kernels: str,
) -> Tensor:
    """Draw one token id, (1,) int64, from logits (V,); arguments as for ``generate``."""
    if temperature == 0.0:
        return logits.argmax(dim=-1, keepdim=True)
    ordered, ids = logits.double().sort(descending=True, stable=True)
    # Shifted first, and in float64: a tiny temperature then gives 0 and -inf, never inf - inf or 0 / 0.
    ordered = ((ordered - ordered[0]) / temperature)[:top_k]
    probabilities = KERNELS[kernels].softmax(ordered.float(), dim=-1)
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities[before < top_p]  # never empty: nothing comes before the first
    return ids[torch.multinomial(probabilities, 1, generator=generator)]


def _new_cache(model: GPT) -> KVCache:
    weight = model.token_embedding.weight
    return KVCache(model.config, 1, dtype=weight.dtype, device=weight.device)
