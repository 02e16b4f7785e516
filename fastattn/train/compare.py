"""The same training on fastattn's kernels and on torch's: how fast, and how far apart.

Both sides start from the same weights, see the same batches and take turns within one process, so that
whatever else the machine does hits both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastattn.models.gpt import GPT, GPTConfig
from fastattn.train.config import KERNELS, TrainConfig
from fastattn.train.data import Dataset
from fastattn.train.step import make_optimizer, training_step

WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class StepTimes:
    """Seconds per training step, measured in alternation, of each side, in the order measured."""

    dtype: str
    dropout: float
    fastattn: list[float]
    torch: list[float]

    @property
    def speedup(self) -> float:
        """Median of torch's times over the median of ours; above 1 ours are faster."""
        return statistics.median(self.torch) / statistics.median(self.fastattn)

    def summary(self, side: str) -> dict[str, float]:
        """Median and quartiles in milliseconds."""
        low, median, high = (1e3 * q for q in statistics.quantiles(getattr(self, side), n=4, method="inclusive"))
        return {"median_ms": round(median, 2), "q1_ms": round(low, 2), "q3_ms": round(high, 2)}


def _model(config: GPTConfig, weights: Mapping[str, Tensor], kernels: str, dropout: float) -> GPT:
    model = GPT(replace(config, kernels=kernels, dropout=dropout))
    model.load_state_dict(weights)
    return model


def time_steps(
    model: GPT,
    dataset: Dataset,
    config: TrainConfig,
    *,
    dtype: str,
    dropout: float,
    rounds: int = 11,
    budget_seconds: float = 10.0,
) -> StepTimes:
    """Time whole training steps (forward, backward, clipping, AdamW) of both sides from the model's weights.

    Args:
        model: its weights are copied; it is not changed.
        dtype: fp32, or bf16 for autocast.
        dropout: of the timed models, on the residual branches and on the attention weights.
        rounds: steps of each side, after two that are not counted.
        budget_seconds: on a slow machine stop after this much time, but never below five rounds.
    """
    config = replace(config, dtype=dtype, dropout=dropout, grad_accum=1)
    weights = model.state_dict()
    models = {kernels: _model(model.config, weights, kernels, dropout) for kernels in KERNELS}
    optimizers = {kernels: make_optimizer(models[kernels], config) for kernels in KERNELS}
    times: dict[str, list[float]] = {kernels: [] for kernels in KERNELS}
    deadline = time.perf_counter() + budget_seconds
    for round_ in range(WARMUP_ROUNDS + rounds):
        batches = [dataset.batch(config.seed, round_, 0, config.batch_size)]
        # Who goes first alternates: the second may find caches warm, or the clock slower.
        for kernels in KERNELS if round_ % 2 else reversed(KERNELS):
            began = time.perf_counter()
            training_step(models[kernels], optimizers[kernels], batches, config.min_lr, config)
            if round_ >= WARMUP_ROUNDS:
                times[kernels].append(time.perf_counter() - began)
        if len(times["torch"]) >= 5 and time.perf_counter() > deadline:
            break
    return StepTimes(dtype, dropout, times["fastattn"], times["torch"])


def compare_losses(model_config: GPTConfig, dataset: Dataset, config: TrainConfig, steps: int = 50) -> list[float]:
    """Relative difference of the two sides' losses at each of the first ``steps`` steps of a run.

    float32, no dropout, the run's own initialisation, batches and learning rates.
    """
    config = replace(config, dtype="fp32", dropout=0.0, grad_accum=1)
    torch.manual_seed(config.seed)
    weights = GPT(replace(model_config, dropout=0.0)).state_dict()
    losses: dict[str, list[float]] = {}
    for kernels in KERNELS:
        model = _model(model_config, weights, kernels, 0.0)
        optimizer = make_optimizer(model, config)
        losses[kernels] = [
            training_step(
                model,
                optimizer,
                [dataset.batch(config.seed, step, 0, config.batch_size)],
                config.learning_rate(step),
                config,
            )[0]
            for step in range(steps)
        ]
    return [abs(ours - theirs) / abs(theirs) for ours, theirs in zip(losses["fastattn"], losses["torch"], strict=True)]
