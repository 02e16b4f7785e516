"""Reading, splitting, and the accounting of bytes and tokens."""

import math
import os
import pydoc_data.topics

import pytest
import torch

from fastattn.models import GPT, GPTConfig
from fastattn.train.data import Corpus, Dataset, load_corpus, split
from fastattn.train.tokenizer import train_tokenizer
from fastattn.train.trainer import bits_per_byte


@pytest.mark.parametrize("text", ["", "a", "abcdefghij" * 7, "äöü" * 33, "日本語テキスト" * 20, "🙂" * 50])
def test_split_loses_nothing_and_cuts_no_character(text):
    encoded = text.encode()
    train, validation = split(encoded)
    assert train + validation == encoded
    train.decode(), validation.decode()
    assert len(encoded) // 10 - 3 <= len(validation) <= len(encoded) // 10


def test_default_corpus_is_the_language_reference():
    corpus = load_corpus([])
    text = (corpus.train + corpus.validation).decode()
    assert all(topic in text for topic in pydoc_data.topics.topics.values())
    assert len(corpus.validation) == pytest.approx(len(text.encode()) / 10, abs=4)


def test_folders_are_read_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/.hidden", ".git/config", "c.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    corpus = load_corpus([str(tmp_path), str(tmp_path / "b.txt")])
    assert corpus.train + corpus.validation == b"b.txt\n\nc.txt\n\na/z.md"


def test_bytes_are_kept_as_they_are(tmp_path):
    path = tmp_path / "crlf.txt"
    path.write_bytes(b"one\r\ntwo\x00\r\n" * 9)
    corpus = load_corpus([str(path)])
    assert corpus.train + corpus.validation == path.read_bytes()


def test_unusable_paths_say_why(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("missing", "no such file or folder"),
        ("folder", "no files in"),
        ("latin1.txt", r"latin1.txt is not UTF-8 text \(byte 3"),
        ("empty.txt", "no text in"),
    ):
        with pytest.raises(ValueError, match=message):
            load_corpus([str(tmp_path / name)])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("x" * 100)
    path.chmod(0)
    with pytest.raises(PermissionError):
        load_corpus([str(path)])


def dataset_of(text: bytes, block_size: int = 8) -> tuple[Dataset, Corpus]:
    corpus = Corpus("text", *split(text))
    tokenizer = train_tokenizer(corpus.train, 280)
    return Dataset.build(corpus, tokenizer, block_size), corpus


TEXT = "".join(f"line {i}: ünïcödé and numbers {i * 37 % 101}\n" for i in range(120)).encode()


@pytest.mark.parametrize("block_size", [1, 7, 8, 64])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_validation_token_is_predicted_exactly_once(block_size, batch_size):
    dataset, _ = dataset_of(TEXT, block_size)
    inputs, targets = zip(*dataset.validation_windows(batch_size), strict=True)
    assert torch.equal(torch.cat([t.flatten() for t in targets]), dataset.validation)
    # What stands before each target: the last training token, then the validation text itself.
    before = torch.cat([dataset.train[-1:], dataset.validation[:-1]])
    assert torch.equal(torch.cat([t.flatten() for t in inputs]), before)
    assert max(t.shape[1] for t in inputs) <= block_size


def test_bits_per_byte_of_a_uniform_model():
    dataset, corpus = dataset_of(TEXT)
    config = GPTConfig(vocab_size=280, block_size=8, n_layer=1, n_head=1, n_embd=8)
    model = GPT(config)
    torch.nn.init.zeros_(model.norm.weight)  # every logit 0: log2(280) bits per token
    expected = len(dataset.validation) * math.log2(280) / len(corpus.validation)
    assert bits_per_byte(model, dataset, batch_size=3) == pytest.approx(expected, rel=1e-6)
    assert model.training, "evaluation must leave the mode as it found it"


def test_batches_are_windows_of_the_training_text_and_follow_from_seed_and_step():
    dataset, _ = dataset_of(TEXT)
    inputs, targets = dataset.batch(1, 2, 0, 5)
    assert inputs.shape == targets.shape == (5, 8)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    windows = dataset.train.unfold(0, 9, 1)
    for row_in, row_out in zip(inputs, targets, strict=True):
        assert (windows == torch.cat([row_in, row_out[-1:]])).all(dim=1).any()
    again, _ = dataset.batch(1, 2, 0, 5)
    assert torch.equal(inputs, again)
    for other in ((2, 2, 0), (1, 3, 0), (1, 2, 1)):
        assert not torch.equal(inputs, dataset.batch(*other, 5)[0])


def test_shortest_corpus():
    dataset, _ = dataset_of(TEXT)
    exact = Dataset(dataset.train[:9], dataset.validation, 100, 8)
    assert torch.equal(exact.batch(0, 0, 0, 1)[0][0], dataset.train[:8])
    with pytest.raises(ValueError, match="too short: 8 training"):
        Dataset(dataset.train[:8], dataset.validation, 100, 8)
    with pytest.raises(ValueError, match="0 validation tokens"):
        Dataset(dataset.train, dataset.validation[:0], 0, 8)
