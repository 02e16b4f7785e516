"""From text files to batches: reading, the train/validation split, and which windows a step sees."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from fastattn.train.tokenizer import encode

VALIDATION_FRACTION = 0.1

# Documents are joined by a blank line.
SEPARATOR = b"\n\n"


@dataclass(frozen=True)
class Corpus:
    """UTF-8 text cut in two: the last tenth of the bytes is for validation, and nothing else sees it."""

    name: str
    train: bytes
    validation: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.train + self.validation).hexdigest()


def load_corpus(paths: Sequence[str]) -> Corpus:
    """Read text files, and folders of them, in the order given; without paths, Python's language reference.

    A folder stands for all files below it in sorted order, without hidden ones; a file named twice counts
    once.

    Raises:
        ValueError: a path does not exist, a folder has no files, a file is not UTF-8, or there is no text.
        OSError: a file cannot be read.
    """
    if paths:
        files = list(dict.fromkeys(file for path in paths for file in _files(Path(path))))
        text = SEPARATOR.join(document for file in files if (document := _read(file)))
        name = ", ".join(str(path) for path in paths)
    else:
        text = _python_reference()
        name = "Python's language reference (pydoc_data.topics)"
    if not text.strip():
        raise ValueError(f"no text in {name}")
    return Corpus(name, *split(text))


def split(text: bytes, fraction: float = VALIDATION_FRACTION) -> tuple[bytes, bytes]:
    """Cut UTF-8 text into (train, validation): the last ``fraction`` of the bytes, no character cut in two.

    A cut inside a character moves forward to its end.
    """
    cut = len(text) - int(len(text) * fraction)
    while cut < len(text) and (text[cut] & 0xC0) == 0x80:  # 10xxxxxx continues a character
        cut += 1
    return text[:cut], text[cut:]


def _files(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise ValueError(f"no such file or folder: {path}")
    if not path.is_dir():
        yield path.resolve()
        return
    found = False
    for folder, folders, names in os.walk(path, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            if not name.startswith(".") and file.is_file():
                found = True
                yield file.resolve()
    if not found:
        raise ValueError(f"no files in {path}")


def _raise(error: OSError) -> None:
    raise error


def _read(path: Path) -> bytes:
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason})") from None
    return content


def _python_reference() -> bytes:
    from pydoc_data.topics import topics

    return SEPARATOR.join(topics[name].encode("utf-8") for name in sorted(topics))


@dataclass(frozen=True)
class Dataset:
    """The encoded corpus.

    ``train`` (N,) and ``validation`` (M,) are int64 token ids; ``validation_bytes`` is the size of the text
    behind ``validation``, the denominator of bits per byte.

    Raises:
        ValueError: a split is too short for one window of ``block_size``.
    """

    train: Tensor
    validation: Tensor
    validation_bytes: int
    block_size: int

    def __post_init__(self) -> None:
        if len(self.train) < self.block_size + 1 or not len(self.validation):
            raise ValueError(
                f"the corpus is too short: {len(self.train)} training and {len(self.validation)} validation "
                f"tokens, but block_size={self.block_size} needs at least {self.block_size + 1} and 1"
            )

    @classmethod
    def build(cls, corpus: Corpus, tokenizer: Tokenizer, block_size: int) -> Dataset:
        return cls(
            encode(tokenizer, corpus.train),
            encode(tokenizer, corpus.validation),
            len(corpus.validation),
            block_size,
        )

    def batch(self, seed: int, step: int, micro_step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both (batch_size, block_size) int64, drawn uniformly from all training windows.

        A pure function of its arguments: a resumed run sees what the uninterrupted one would have seen.
        """
        generator = np.random.default_rng((seed, step, micro_step))
        starts = torch.from_numpy(generator.integers(len(self.train) - self.block_size, size=(batch_size, 1)))
        windows = self.train[starts + torch.arange(self.block_size + 1)]
        return windows[:, :-1], windows[:, 1:]

    def validation_windows(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, targets) that cover the validation split: every token is a target exactly once.

        Windows do not overlap. The last training token stands before the first validation token, which would
        otherwise have nothing to be predicted from. The last window may be shorter and comes alone.
        """
        tokens = torch.cat([self.train[-1:], self.validation])
        whole = len(self.validation) // self.block_size * self.block_size
        inputs = tokens[:whole].view(-1, self.block_size)
        targets = tokens[1 : whole + 1].view(-1, self.block_size)
        yield from zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
        if whole < len(self.validation):
            yield tokens[None, whole:-1], tokens[None, whole + 1 :]
