"""Runs: they learn, and nothing that stops them changes what they compute."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastattn import allocator, use_backend
from fastattn.testing import assert_lawful
from fastattn.train import checkpoint as checkpoints
from fastattn.train.checkpoint import CheckpointError
from fastattn.train.step import make_optimizer, training_step
from fastattn.train.trainer import (
    Interrupted,
    Trainer,
    TrainingDiverged,
    read_log,
)


def start(config, text_file, out) -> Trainer:
    return Trainer.start(config, [str(text_file)], out)


def results(out: Path) -> list[tuple]:
    """What must not depend on interruptions: everything in the log but times."""
    keys = ("step", "loss", "lr", "grad_norm", "val_bits_per_byte")
    return [tuple(record.get(key) for key in keys) for record in read_log(out)]


def assert_same_run(one: Path, other: Path) -> None:
    assert results(one) == results(other)
    a, b = checkpoints.load(one), checkpoints.load(other)
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def test_a_run_learns_and_logs_every_step(tiny, text_file, tmp_path):
    config = tiny(steps=60, lr=1e-2, dropout=0.0)
    progress = start(config, text_file, tmp_path / "run").run(show_progress=False)
    log = read_log(tmp_path / "run")
    assert [record["step"] for record in log] == list(range(1, 61))
    assert [record["step"] for record in log if "val_bits_per_byte" in record] == list(range(5, 61, 5))
    assert log[-1]["loss"] < log[0]["loss"] - 1.0
    assert log[-1]["val_bits_per_byte"] == progress.val_bits_per_byte < log[4]["val_bits_per_byte"]
    assert [record["lr"] for record in log] == [config.learning_rate(step) for step in range(60)]


@pytest.mark.parametrize("wanted", [True, False])
def test_the_allocator_is_tuned_unless_told_not_to(tiny, text_file, tmp_path, monkeypatch, wanted):
    calls = []
    monkeypatch.setattr(allocator, "tune_allocator", lambda: calls.append("tuned"))
    trainer = start(tiny(steps=1), text_file, tmp_path / "run")
    assert calls == []
    trainer.run(show_progress=False, **({} if wanted else {"tune_allocator": False}))
    assert calls == ["tuned"] * wanted


def test_log_interval_keeps_the_last_and_the_validated_steps(tiny, text_file, tmp_path):
    start(tiny(log_interval=4, eval_interval=6, steps=15), text_file, tmp_path / "run").run(show_progress=False)
    assert [record["step"] for record in read_log(tmp_path / "run")] == [4, 6, 8, 12, 15]


@pytest.mark.parametrize("kernels", ["fastattn", "torch"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_at_any_step_gives_the_same_bits(tiny, text_file, tmp_path, monkeypatch, dtype, kernels):
    config = tiny(dtype=dtype, kernels=kernels, grad_accum=2)
    start(config, text_file, tmp_path / "whole").run(show_progress=False)
    out = tmp_path / "resumed"
    trainer = start(config, text_file, out)
    original = Trainer.save
    for stop in (2, 7, 10):

        def save_then_stop(self, stop=stop):
            if self.progress.step == stop:
                os.kill(os.getpid(), signal.SIGINT)
            original(self)

        # A save at every step, and Ctrl-C during one of them: it takes effect after the next step.
        monkeypatch.setattr(Trainer, "save", save_then_stop)
        object.__setattr__(trainer.config, "checkpoint_interval", 1)
        with pytest.raises(Interrupted) as stopped:
            trainer.run(show_progress=False)
        assert stopped.value.step == stop + 1 and stopped.value.signum == signal.SIGINT
        monkeypatch.setattr(Trainer, "save", original)
        torch.manual_seed(999)  # whatever the process did in between
        trainer = Trainer.resume(out)
        assert trainer.progress.step == stop + 1
    trainer.run(show_progress=False)
    assert_same_run(tmp_path / "whole", out)


def test_signal_handlers_are_restored(tiny, text_file, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    start(tiny(steps=2), text_file, tmp_path / "run").run(show_progress=False)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_resume_drops_what_was_logged_after_the_checkpoint(tiny, text_file, tmp_path):
    start(tiny(), text_file, tmp_path / "whole").run(show_progress=False)
    out = tmp_path / "killed"
    trainer = start(tiny(), text_file, out)
    save = Trainer.save
    with pytest.MonkeyPatch.context() as patch:
        # The kill: after step 4's checkpoint no other is written, the log runs on.
        patch.setattr(Trainer, "save", lambda self: save(self) if self.progress.step <= 4 else None)
        trainer.run(show_progress=False)
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 13, "lo')  # and stops within a line
    Trainer.resume(out).run(show_progress=False)
    assert_same_run(tmp_path / "whole", out)


def command(config, text_file: Path, out: Path) -> list[str]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in config.to_dict().items() if name != "bias"]
    return [sys.executable, "-m", "fastattn", "train", "--out", str(out), "--data", str(text_file), *options]


def kill_once_under_way(arguments: list[str], out: Path, delay: float) -> bool:
    """Start a training process and kill -9 it some time after it has logged; whether that was in time."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = out / "log.jsonl"
    size = log.stat().st_size if log.exists() else 0
    deadline = time.monotonic() + 120
    try:
        while process.poll() is None and not (log.exists() and log.stat().st_size > size):
            assert time.monotonic() < deadline, "training did not begin"
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
    finally:
        _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    return process.returncode != 0


def test_kill_9_then_resume_gives_the_same_bits(tiny, text_file, tmp_path):
    # A checkpoint after every step: most of the time goes into writing them, so there the kill hits.
    config = tiny(steps=120, checkpoint_interval=1, eval_interval=50)
    out = tmp_path / "killed"
    assert kill_once_under_way(command(config, text_file, out), out, delay=0.05)
    trainer = Trainer.resume(out)
    assert 0 < trainer.progress.step < config.steps
    assert [record["step"] for record in read_log(out)] == list(range(1, trainer.progress.step + 1))
    trainer.run(show_progress=False)
    start(config, text_file, tmp_path / "whole").run(show_progress=False)
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.slow
def test_many_kills_with_many_threads(tiny, text_file, tmp_path, one_thread):
    torch.set_num_threads(one_thread)
    # Large enough for parallel kernels.
    config = tiny(steps=500, checkpoint_interval=1, eval_interval=100, n_embd=64, block_size=128, batch_size=8)
    start(config, text_file, tmp_path / "whole").run(show_progress=False)
    out = tmp_path / "killed"
    randomness = random.Random(0)
    kills = int(kill_once_under_way(command(config, text_file, out), out, delay=0.1))
    resume = [sys.executable, "-m", "fastattn", "train", "--resume", "--out", str(out)]
    while kill_once_under_way(resume, out, randomness.uniform(0.0, 0.8)):
        kills += 1
        assert kills < 60
    assert kills >= 3
    assert_same_run(tmp_path / "whole", out)


def test_a_new_run_does_not_overwrite_one(tiny, text_file, tmp_path):
    start(tiny(), text_file, tmp_path / "run")
    before = checkpoints.checkpoint_path(tmp_path / "run").read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        start(tiny(seed=1), text_file, tmp_path / "run")
    assert checkpoints.checkpoint_path(tmp_path / "run").read_bytes() == before


def test_resume_refuses_another_model_or_text(tiny, text_file, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Trainer.resume(out)
    start(tiny(), text_file, out)
    with pytest.raises(CheckpointError, match=r"asked for n_embd=32 \(not 16\)"):
        Trainer.resume(out, changes={"n_embd": 32})
    moved = text_file.rename(tmp_path / "moved.txt")
    with pytest.raises(ValueError, match="no such file"):
        Trainer.resume(out)
    assert Trainer.resume(out, [str(moved)]).progress.step == 0
    moved.write_text(moved.read_text() + "one line more\n")
    with pytest.raises(CheckpointError, match="another text"):
        Trainer.resume(out, [str(moved)])


def test_resume_refuses_weights_that_do_not_fit_their_settings(tiny, text_file, tmp_path):
    out = tmp_path / "run"
    start(tiny(), text_file, out)
    checkpoint = checkpoints.load(out)
    del checkpoint.tensors["model.norm.weight"]
    checkpoints.save(out, checkpoint)
    with pytest.raises(CheckpointError, match=r"do not fit its model.*norm\.weight"):
        Trainer.resume(out)


def test_resume_says_when_threads_differ(tiny, text_file, tmp_path, monkeypatch):
    start(tiny(), text_file, tmp_path / "run")
    assert not Trainer.resume(tmp_path / "run").notes
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert "threads" in Trainer.resume(tmp_path / "run").notes[0]


def test_divergence_stops_the_run_and_keeps_the_checkpoint(tiny, text_file, tmp_path):
    out = tmp_path / "run"
    trainer = start(tiny(checkpoint_interval=2), text_file, out)
    original = type(trainer.dataset).batch

    def poison(self, seed, step, *rest):
        if step == 4:
            torch.nn.init.constant_(trainer.model.norm.weight, float("inf"))
        return original(self, seed, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.dataset), "batch", poison)
        with pytest.raises(TrainingDiverged, match="step 5"):
            trainer.run(show_progress=False)
    assert Trainer.resume(out).progress.step == 4


def test_nothing_is_written_before_everything_is_checked(tiny, text_file, tmp_path):
    for config, data in (
        (tiny(block_size=100_000), text_file),
        (tiny(), tmp_path / "missing.txt"),
    ):
        with pytest.raises(ValueError):
            start(config, data, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="is not a folder"):
        start(tiny(), text_file, text_file)


def test_matrices_decay_and_vectors_do_not(tiny, text_file, tmp_path):
    trainer = start(tiny(weight_decay=0.3), text_file, tmp_path / "run")
    decay, no_decay = make_optimizer(trainer.model, trainer.config).param_groups
    assert decay["weight_decay"] == 0.3 and all(p.dim() == 2 for p in decay["params"])
    assert no_decay["weight_decay"] == 0.0 and all(p.dim() == 1 for p in no_decay["params"])
    assert len(decay["params"]) + len(no_decay["params"]) == len(list(trainer.model.parameters()))


def test_accumulation_equals_a_larger_batch(tiny, text_file, tmp_path):
    """Under the accuracy law, the truth being the larger batch in float64: over eight steps the losses and norms of
    gradients, and all weights after them."""
    config = tiny(dropout=0.0)

    def run(parts, dtype):
        trainer = start(config, text_file, tmp_path / f"{parts} parts in {dtype}")
        model = trainer.model.to(dtype)
        numbers = []
        for step in range(8):
            inputs, targets = trainer.dataset.batch(0, step, 0, 4)
            logits, _ = model(inputs)
            exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
            batches = list(zip(inputs.chunk(parts), targets.chunk(parts), strict=True))
            loss, norm = training_step(model, trainer.optimizer, batches, 1e-3, config)
            # The model's own losses are always float32.
            numbers.append((exact if dtype == torch.float64 else loss, norm))
        losses, norms = torch.tensor(numbers, dtype=dtype).unbind(1)
        return losses, norms, torch.cat([p.detach().flatten() for p in model.parameters()])

    found, peer = run(2, torch.float32), run(1, torch.float32)
    with use_backend("reference"):
        truth = run(1, torch.float64)
    for results in zip(found, peer, truth, strict=True):
        assert_lawful(*results)


def test_checkpoint_state_is_readable_json(tiny, text_file, tmp_path):
    trainer = start(tiny(), text_file, tmp_path / "run")
    state = checkpoints.load(tmp_path / "run").state
    assert state["config"] == trainer.config.to_dict()
    assert state["model"]["vocab_size"] == trainer.tokenizer.get_vocab_size()
    json.dumps(state)
