"""The BPE: any text can be encoded, and none of it comes from the validation split."""

import pytest

from fastattn.train import tokenizer as tokenizers
from fastattn.train.data import Corpus, split
from fastattn.train.tokenizer import encode, train_tokenizer
from fastattn.train.trainer import Trainer


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
def test_round_trip_of_any_text(monkeypatch, chunk):
    monkeypatch.setattr(tokenizers, "CHUNK_BYTES", chunk)
    tokenizer = train_tokenizer(b"only ascii was seen\n" * 20, 300)
    text = "  naïve 日本語 🙂\r\n\n\ttabs\x00 and  spaces \n no last newline"
    assert tokenizer.decode(encode(tokenizer, text.encode()).tolist()) == text
    assert len(encode(tokenizer, b"")) == 0


def test_vocabulary_size():
    assert train_tokenizer(b"ab" * 50, 256).get_vocab_size() == 256
    assert train_tokenizer(b"abcd efgh " * 50, 260).get_vocab_size() == 260
    assert train_tokenizer(b"x", 4096).get_vocab_size() == 256  # nothing to merge
    with pytest.raises(ValueError, match="at least 256"):
        train_tokenizer(b"x", 255)


def test_training_is_reproducible():
    text = b"".join(b"word%d and more words %d\n" % (i, i * i) for i in range(300))
    assert train_tokenizer(text, 400).to_str() == train_tokenizer(text, 400).to_str()


def test_the_bpe_does_not_see_the_validation_text(tmp_path, tiny):
    # "zyx" is frequent, but only in the last tenth.
    text = b"abc def ghi. " * 400 + b"zyxzyx" * 60
    assert b"zyx" not in split(text)[0]
    (tmp_path / "text.txt").write_bytes(text)
    trainer = Trainer.start(tiny(), [str(tmp_path / "text.txt")], tmp_path / "run")
    learnt = [token for token in trainer.tokenizer.get_vocab() if len(token) > 1]
    assert learnt and not any(set(token) & set("zyx") for token in learnt)
    assert trainer.corpus == Corpus(trainer.corpus.name, *split(text))
