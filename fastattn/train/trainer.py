"""The training loop: steps, validation, log, checkpoints, and leaving and coming back at any moment.

A run lives in one folder: ``checkpoint.safetensors`` (see checkpoint.py) and ``log.jsonl``, one JSON object
per logged step. Which windows a step sees follows from (seed, step), dropout from torch's generator, whose
state is in the checkpoint. A resumed run therefore computes the same bits as one that never stopped.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from fastattn import allocator
from fastattn.models.gpt import GPT, GPTConfig
from fastattn.train import checkpoint as checkpoints
from fastattn.train.checkpoint import Checkpoint, CheckpointError
from fastattn.train.config import TrainConfig
from fastattn.train.data import Corpus, Dataset, load_corpus
from fastattn.train.step import make_optimizer, training_step
from fastattn.train.tokenizer import train_tokenizer

LOG_NAME = "log.jsonl"


class Interrupted(Exception):
    """The run stopped on a signal; its checkpoint is complete."""

    def __init__(self, step: int, signum: int) -> None:
        super().__init__(f"stopped after step {step} by {signal.Signals(signum).name}")
        self.step = step
        self.signum = signum


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number."""


@torch.no_grad()
def bits_per_byte(model: GPT, dataset: Dataset, batch_size: int) -> float:
    """Bits the model needs per byte of the whole validation text, in float32 without dropout.

    total nats over every validation token / ln 2 / bytes of the validation text. Unlike nats per token it
    does not depend on the tokenizer.
    """
    training = model.training
    model.eval()
    nats = 0.0
    for inputs, targets in dataset.validation_windows(batch_size):
        _, loss = model(inputs, targets)
        assert loss is not None
        nats += loss.item() * targets.numel()
    model.train(training)
    return nats / math.log(2) / dataset.validation_bytes


def read_log(out: Path) -> list[dict[str, Any]]:
    """The log of a run, a record per logged step."""
    return [json.loads(line) for line in (out / LOG_NAME).read_text().splitlines()]


def _trim_log(out: Path, step: int) -> None:
    """Drop what was logged after the checkpoint: those steps are about to run again."""
    path = out / LOG_NAME
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        # A kill can leave a last line without its end.
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    checkpoints.write_atomically(path, "".join(kept).encode())


@contextmanager
def _deferred_signals() -> Iterator[Callable[[], int | None]]:
    """Turn the first SIGINT or SIGTERM into a number to ask for; a second one acts as usual."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def handle(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        restore()

    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        for signum in (signal.SIGINT, signal.SIGTERM):
            previous[signum] = signal.signal(signum, handle)
    try:
        yield lambda: received[0] if received else None
    finally:
        restore()


@dataclass
class Progress:
    """How far a run is. ``seconds`` counts steps only, without validation and checkpoints."""

    step: int = 0
    seconds: float = 0.0
    val_bits_per_byte: float | None = None


@dataclass
class Trainer:
    """A run in progress; make one with ``start`` or ``resume``, then call ``run``."""

    config: TrainConfig
    out: Path
    data: list[str]
    corpus: Corpus
    tokenizer: Tokenizer
    dataset: Dataset
    model: GPT
    optimizer: torch.optim.AdamW
    progress: Progress = field(default_factory=Progress)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, config: TrainConfig, data: Sequence[str], out: Path, *, overwrite: bool = False) -> Trainer:
        """Prepare a new run. Nothing is written before everything has been read and checked.

        Raises:
            ValueError: ``out`` holds a run already (unless ``overwrite``), or the data do not do (see
                load_corpus).
        """
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is not a folder")
        if checkpoints.checkpoint_path(out).exists() and not overwrite:
            raise ValueError(f"{out} already holds a run: continue it with --resume or choose another --out")
        corpus = load_corpus(data)
        tokenizer = train_tokenizer(corpus.train, config.vocab_size)
        dataset = Dataset.build(corpus, tokenizer, config.block_size)
        torch.manual_seed(config.seed)
        model = GPT(
            GPTConfig(
                vocab_size=tokenizer.get_vocab_size(),
                block_size=config.block_size,
                n_layer=config.n_layer,
                n_head=config.n_head,
                n_embd=config.n_embd,
                dropout=config.dropout,
                bias=config.bias,
                kernels=config.kernels,
            )
        )
        optimizer = make_optimizer(model, config)
        trainer = cls(config, out, list(data), corpus, tokenizer, dataset, model, optimizer)
        out.mkdir(parents=True, exist_ok=True)
        trainer.save()
        (out / LOG_NAME).unlink(missing_ok=True)
        return trainer

    @classmethod
    def resume(cls, out: Path, data: Sequence[str] | None = None, changes: dict[str, Any] | None = None) -> Trainer:
        """Continue the run in ``out`` where its checkpoint left it.

        Args:
            out: the run's folder.
            data: where the corpus lies now, if it has moved; its content must be the same.
            changes: settings asked for; only those in config.FREE_ON_RESUME may differ from the checkpoint's.

        Raises:
            CheckpointError: there is no usable checkpoint, or it is of another model or another corpus.
        """
        checkpoint = checkpoints.load(out)
        state = checkpoint.state
        stored = TrainConfig.from_dict(state["config"])
        config = TrainConfig.from_dict({**state["config"], **(changes or {})})
        if differences := config.differences(stored):
            raise CheckpointError(f"the checkpoint in {out} is of another run: asked for {', '.join(differences)}")
        data = list(state["data"]) if data is None else list(data)
        corpus = load_corpus(data)
        if corpus.sha256 != state["corpus_sha256"]:
            raise CheckpointError(f"the checkpoint in {out} was trained on another text than {corpus.name} holds now")
        tokenizer = Tokenizer.from_str(state["tokenizer"])
        model = load_model(checkpoint)
        optimizer = make_optimizer(model, config)
        for name, parameter in model.named_parameters():
            optimizer.state[parameter].update(checkpoint.section(f"optimizer.{name}"))
        torch.set_rng_state(checkpoint.tensors["rng.torch"])
        trainer = cls(
            config,
            out,
            data,
            corpus,
            tokenizer,
            Dataset.build(corpus, tokenizer, config.block_size),
            model,
            optimizer,
            Progress(**state["progress"]),
        )
        if (threads := torch.get_num_threads()) != state["threads"]:
            trainer.notes.append(
                f"this run began with {state['threads']} threads and goes on with {threads}: "
                "sums may round differently from here on"
            )
        _trim_log(out, trainer.progress.step)
        return trainer

    def save(self) -> None:
        """Write the checkpoint; whatever the log holds up to here is on the disk before."""
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        tensors["rng.torch"] = torch.get_rng_state()
        state = {
            "config": self.config.to_dict(),
            "model": asdict(self.model.config),
            "tokenizer": self.tokenizer.to_str(),
            "data": self.data,
            "corpus_sha256": self.corpus.sha256,
            "progress": asdict(self.progress),
            "threads": torch.get_num_threads(),
        }
        checkpoints.save(self.out, Checkpoint(tensors, state))

    def run(self, *, show_progress: bool = True, tune_allocator: bool = True) -> Progress:
        """Train to the last step.

        tune_allocator: let malloc keep the memory of freed tensors, for the whole process and for good
        (fastattn.tune_allocator); without it every large activation of every step is made of fresh pages.

        Raises:
            Interrupted: on SIGINT or SIGTERM, after the step in hand and a checkpoint.
            TrainingDiverged: the loss or the gradient is not finite; the last checkpoint stays as it is.
        """
        if tune_allocator:
            allocator.tune_allocator()
        config, progress = self.config, self.progress
        tokens_per_step = config.batch_size * config.block_size * config.grad_accum
        terminal = sys.stderr.isatty()
        self.model.train()
        with (
            open(self.out / LOG_NAME, "a", buffering=1, encoding="utf-8") as log,
            _deferred_signals() as stop_signal,
            tqdm(
                total=config.steps,
                initial=progress.step,
                unit="step",
                disable=not show_progress,
                mininterval=0.2 if terminal else 15.0,
                dynamic_ncols=terminal,
            ) as bar,
        ):
            while progress.step < config.steps:
                began = time.perf_counter()
                batches = [
                    self.dataset.batch(config.seed, progress.step, micro_step, config.batch_size)
                    for micro_step in range(config.grad_accum)
                ]
                lr = config.learning_rate(progress.step)
                loss, grad_norm = training_step(self.model, self.optimizer, batches, lr, config)
                seconds = time.perf_counter() - began
                if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                    raise TrainingDiverged(
                        f"step {progress.step + 1}: loss {loss}, gradient norm {grad_norm}; try a lower learning rate"
                    )
                progress.step += 1
                progress.seconds += seconds
                record = {
                    "step": progress.step,
                    "loss": loss,
                    "lr": lr,
                    "grad_norm": grad_norm,
                    "tokens_per_s": round(tokens_per_step / seconds, 1),
                    "seconds": round(progress.seconds, 3),
                }
                last = progress.step == config.steps
                if last or progress.step % config.eval_interval == 0:
                    progress.val_bits_per_byte = bits_per_byte(self.model, self.dataset, config.batch_size)
                    record["val_bits_per_byte"] = progress.val_bits_per_byte
                if last or progress.step % config.log_interval == 0 or "val_bits_per_byte" in record:
                    log.write(json.dumps(record) + "\n")
                bar.update()
                bar.set_postfix(self._postfix(loss, tokens_per_step / seconds), refresh=False)
                signum = stop_signal()
                if last or signum is not None or progress.step % config.checkpoint_interval == 0:
                    _sync(log)
                    self.save()
                if signum is not None:
                    raise Interrupted(progress.step, signum)
        return progress

    def _postfix(self, loss: float, tokens_per_s: float) -> dict[str, str]:
        postfix = {"loss": f"{loss:.3f}", "tokens/s": f"{tokens_per_s:.0f}"}
        if self.progress.val_bits_per_byte is not None:
            postfix["val bits/byte"] = f"{self.progress.val_bits_per_byte:.3f}"
        return postfix


def _sync(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def load_model(checkpoint: Checkpoint) -> GPT:
    """The GPT of a checkpoint, in training mode.

    Raises:
        CheckpointError: the weights are not those of the model that the checkpoint describes.
    """
    model = GPT(GPTConfig(**checkpoint.state["model"]))
    try:
        model.load_state_dict(checkpoint.section("model"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the checkpoint's weights do not fit its model: {reason}") from None
    return model
