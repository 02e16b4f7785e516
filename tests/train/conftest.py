"""A corpus and a model so small that a step takes milliseconds."""

import pytest
import torch

from fastattn.train.config import TrainConfig


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine the threads of such small steps would do nothing but wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield threads
    torch.set_num_threads(threads)


@pytest.fixture
def text_file(tmp_path):
    """About 10 KB of varied ASCII."""
    lines = [f"{i}: the square of {i} is {i * i}, and its cube is {i**3}; so be it.\n" for i in range(160)]
    path = tmp_path / "squares.txt"
    path.write_text("".join(lines))
    return path


@pytest.fixture
def tiny():
    """A TrainConfig with the given fields changed."""

    def make(**changes):
        values = {
            "vocab_size": 288,
            "block_size": 16,
            "n_layer": 1,
            "n_head": 2,
            "n_embd": 16,
            "dropout": 0.1,
            "steps": 12,
            "batch_size": 2,
            "warmup": 3,
            "eval_interval": 5,
            "checkpoint_interval": 4,
        }
        return TrainConfig(**{**values, **changes})

    return make
