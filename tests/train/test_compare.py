"""The comparison is fair: same weights, same batches, in turn, and it leaves the model alone."""

from collections import Counter

import pytest
import torch

from fastattn.train import compare
from fastattn.train.compare import WARMUP_ROUNDS, StepTimes, compare_losses, time_steps
from fastattn.train.trainer import Trainer


@pytest.fixture
def trainer(tiny, text_file, tmp_path):
    return Trainer.start(tiny(), [str(text_file)], tmp_path / "run")


def test_both_sides_take_turns_from_the_same_weights_on_the_same_batches(trainer, monkeypatch):
    steps, first_losses = [], {}
    original = compare.training_step

    def record(model, optimizer, batches, lr, config):
        loss, norm = original(model, optimizer, batches, lr, config)
        steps.append((model.config.kernels, batches[0][0].clone()))
        first_losses.setdefault(model.config.kernels, loss)
        return loss, norm

    monkeypatch.setattr(compare, "training_step", record)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    times = time_steps(trainer.model, trainer.dataset, trainer.config, dtype="fp32", dropout=0.0, rounds=6)
    assert len(times.torch) == len(times.fastattn) == 6
    assert len(steps) == 2 * (6 + WARMUP_ROUNDS)
    for (one, batch), (other, same_batch) in zip(steps[::2], steps[1::2], strict=True):
        assert {one, other} == {"fastattn", "torch"}
        assert torch.equal(batch, same_batch)
    assert Counter(kernels for kernels, _ in steps[::2]) == {"fastattn": 4, "torch": 4}, "who is first alternates"
    assert first_losses["fastattn"] == pytest.approx(first_losses["torch"], rel=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_times_with_dropout(trainer, dtype):
    times = time_steps(trainer.model, trainer.dataset, trainer.config, dtype=dtype, dropout=0.1, rounds=2)
    assert (times.dtype, times.dropout) == (dtype, 0.1)
    assert min(times.torch + times.fastattn) > 0


def test_budget_ends_the_rounds_but_not_below_five(trainer):
    times = time_steps(
        trainer.model,
        trainer.dataset,
        trainer.config,
        dtype="fp32",
        dropout=0.0,
        rounds=50,
        budget_seconds=0.0,
    )
    assert len(times.torch) == 5


def test_summary_and_speedup():
    times = StepTimes("fp32", 0.0, fastattn=[0.010, 0.020, 0.030], torch=[0.030, 0.040, 0.050])
    assert times.speedup == pytest.approx(2.0)
    assert times.summary("fastattn") == {"median_ms": 20.0, "q1_ms": 15.0, "q3_ms": 25.0}


def test_losses_of_both_sides_agree(trainer):
    differences = compare_losses(trainer.model.config, trainer.dataset, trainer.config, steps=20)
    assert len(differences) == 20
    assert max(differences) < 1e-5
