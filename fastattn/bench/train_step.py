"""`fastattn bench train-step`: a whole training step of our GPT, on our kernels and on torch's.

Forward, loss, backward, clipping and AdamW, as `fastattn train` does them (train/step.py). Both sides start from the
same weights and see the same random tokens in the same order, so that their losses must be the same: that is the gate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn.bench import models
from fastattn.bench.contenders import OURS, TORCH
from fastattn.bench.models import Contest, Entry, ModelRow
from fastattn.models.gpt import GPT, GPTConfig
from fastattn.train.config import TrainConfig
from fastattn.train.step import make_optimizer, training_step

#: Batches are used again after this many steps.
BATCHES = 4
#: Largest relative difference of a loss and of a gradient's norm between the two sides. In bfloat16 every activation is
#: rounded to 8 bits, and the two sides round at different places.
LIMITS = {"fp32": 1e-4, "bf16": 5e-3}


@dataclass(frozen=True)
class Workload:
    """A model and the batch of one step. quick: part of --quick."""

    name: str
    model: GPTConfig
    batch: int
    sequence: int
    quick: bool = True

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def flops(self) -> int:
        """Of matrix products, forward and twice that backward; of the scores only what a causal mask leaves."""
        m = self.model
        weights = m.n_layer * 12 * m.n_embd**2 + m.vocab_size * m.n_embd
        scores = m.n_layer * m.n_embd * self.sequence * (self.sequence + 1) * self.batch
        return 6 * self.tokens * weights + 3 * 2 * scores


def _gpt(vocabulary: int, sequence: int, layers: int, heads: int, width: int) -> GPTConfig:
    return GPTConfig(vocabulary, sequence, layers, heads, width)


WORKLOADS = (
    Workload("gpt2-124m 1x1024", _gpt(50304, 1024, 12, 12, 768), 1, 1024),
    Workload("gpt-10m 12x256", _gpt(65, 256, 6, 6, 384), 12, 256),
    Workload("gpt-16m-large-vocabulary 4x512", _gpt(50304, 512, 4, 4, 256), 4, 512, quick=False),
)


class Side:
    """A model and its optimizer, from the same weights as the other side's."""

    def __init__(
        self,
        workload: Workload,
        dtype: str,
        kernels: str,
        batches: Sequence[tuple[Tensor, Tensor]],
        device: str = "cpu",
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.config = TrainConfig(dtype=dtype)
        self.model = GPT(replace(workload.model, kernels=kernels)).to(device)
        if compiled:
            self.model.compile(dynamic=False)
        self.optimizer = make_optimizer(self.model, self.config)
        self.batches, self.entry = batches, Entry()

    def step(self) -> None:
        batch = self.batches[len(self.entry.losses) % len(self.batches)]
        loss, norm = training_step(self.model, self.optimizer, [batch], self.config.min_lr, self.config)
        self.entry.losses.append(loss)
        self.entry.norms.append(norm)


def differences(entries: dict[str, Entry], dtype: str) -> tuple[str, ...]:
    """What is wrong with the two sides' losses and gradient norms, in words."""
    found = []
    for what in ("losses", "norms"):
        pairs = zip(*(getattr(entries[name], what) for name in (OURS, TORCH)), strict=False)
        for step, (ours, theirs) in enumerate(pairs, 1):
            apart = abs(ours - theirs) / abs(theirs)
            if not apart <= LIMITS[dtype]:
                found.append(f"{what} of step {step}: {ours:.6g} and torch's {theirs:.6g} are {apart:.1e} apart")
                break
    return tuple(found)


def random_batches(workload: Workload, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    """(inputs, targets) of BATCHES steps, (batch, sequence) each, the same ones at every call."""
    generator = torch.Generator().manual_seed(1)
    shape = (workload.batch, workload.sequence + 1)
    windows = [torch.randint(workload.model.vocab_size, shape, generator=generator) for _ in range(BATCHES)]
    return [(w[:, :-1].contiguous().to(device), w[:, 1:].contiguous().to(device)) for w in windows]


def prepare(workload: Workload, dtype: str) -> Contest:
    """Both sides of a workload."""
    batches = random_batches(workload)
    sides = {name: Side(workload, dtype, name, batches) for name in (OURS, TORCH)}
    entries = {name: side.entry for name, side in sides.items()}
    return Contest(entries, {name: side.step for name, side in sides.items()}, lambda: differences(entries, dtype))


def as_json(row: ModelRow[Workload]) -> dict[str, Any]:
    """A row of the document: docs/benchmarks.md."""
    ours, theirs = (row.entries[name].losses for name in (OURS, TORCH))
    apart = [abs(mine - other) / abs(other) for mine, other in zip(ours, theirs, strict=False)]
    return models.as_json(row) | {
        "model": asdict(row.workload.model) | {"kernels": None},
        "steps_compared": len(apart),
        "largest_loss_difference": max(apart, default=math.nan),
    }
