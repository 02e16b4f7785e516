"""A byte-level BPE, trained on the spot (Sennrich et al. 2016; byte-level as in GPT-2)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

# Text is trained on and encoded in chunks of about this size, so that a large corpus needs little memory.
CHUNK_BYTES = 1 << 16


def train_tokenizer(text: bytes, vocab_size: int) -> Tokenizer:
    """Learn at most ``vocab_size`` tokens from UTF-8 text; all 256 bytes are among them, so any text can be
    encoded.

    Raises:
        ValueError: vocab_size is below 256.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size must be at least 256 (the bytes), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_chunks(text), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: bytes) -> Tensor:
    """Token ids of UTF-8 text, (N,) int64; decoding them gives the text back."""
    encodings = tokenizer.encode_batch(list(_chunks(text)))
    ids = [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]
    return torch.from_numpy(np.concatenate(ids)) if ids else torch.empty(0, dtype=torch.int64)


def _chunks(text: bytes) -> Iterator[str]:
    """The text in pieces that end at line ends (or at the end of the text)."""
    start = 0
    while start < len(text):
        end = text.find(b"\n", start + CHUNK_BYTES) + 1 or len(text)
        yield text[start:end].decode("utf-8")
        start = end
