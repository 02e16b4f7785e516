"""`fastattn bench train-step`: a whole training step of our GPT, on our kernels and on torch's.

Forward, loss, backward, clipping and AdamW, as `fastattn train` does them (train/trainer.py). Both sides start from the
same weights and see the same random tokens in the same order, so that their losses must be the same: that is the gate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastattn import ceilings
from fastattn.bench import measure
from fastattn.bench.contenders import OURS, TORCH
from fastattn.bench.runner import Settings, allocator_in_use
from fastattn.models.gpt import GPT, GPTConfig
from fastattn.train.config import TrainConfig
from fastattn.train.step import make_optimizer, training_step

NAME = "train-step"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
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


@dataclass
class Entry:
    """One side. losses, norms: of every step it made."""

    times: measure.Times | None = None
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class StepRow:
    """A workload in one dtype. ceiling: operations per second of the machine, None without native kernels."""

    workload: Workload
    dtype: str
    allocator: str
    ceiling: float | None
    entries: dict[str, Entry]
    violations: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{NAME} {self.workload.name} {self.dtype} ({self.allocator} allocator)"

    @property
    def speedup(self) -> float | None:
        ours, theirs = (self.entries[name].times for name in (OURS, TORCH))
        return None if ours is None or theirs is None or self.violations else theirs.median / ours.median

    @property
    def ahead(self) -> bool:
        return self.speedup is not None and self.speedup > 1.0

    def utilisation(self, name: str) -> float | None:
        """Model FLOP utilisation: the products' share of the ceiling."""
        times = self.entries[name].times
        return None if times is None or self.ceiling is None else self.workload.flops / times.median / self.ceiling

    def tokens_per_second(self, name: str) -> float | None:
        times = self.entries[name].times
        return None if times is None else self.workload.tokens / times.median


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


def select(*, quick: bool, names: Sequence[str], dtypes: Sequence[str] | None) -> list[tuple[Workload, str]]:
    """(workload, dtype) pairs; ValueError for names and dtypes that there are not."""
    for dtype in dtypes or ():
        if dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype}: {NAME} has {', '.join(DTYPES)}")
    chosen = [w for w in WORKLOADS if (any(n in w.name for n in names) if names else w.quick or not quick)]
    if not chosen:
        raise ValueError(f"--workload: {NAME} has {', '.join(w.name for w in WORKLOADS)}")
    return [(workload, dtype) for workload in chosen for dtype in dtypes or DTYPES]


def run_steps(selected: Sequence[tuple[Workload, str]], settings: Settings) -> Iterator[StepRow]:
    """A row for each pair, as they are done. Sets torch's number of threads while it runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        for workload, dtype in selected:
            yield _run(workload, dtype, settings)
    finally:
        torch.set_num_threads(before)


def random_batches(workload: Workload, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    """(inputs, targets) of BATCHES steps, (batch, sequence) each, the same ones at every call."""
    generator = torch.Generator().manual_seed(1)
    shape = (workload.batch, workload.sequence + 1)
    windows = [torch.randint(workload.model.vocab_size, shape, generator=generator) for _ in range(BATCHES)]
    return [(w[:, :-1].contiguous().to(device), w[:, 1:].contiguous().to(device)) for w in windows]


def _run(workload: Workload, dtype: str, settings: Settings) -> StepRow:
    batches = random_batches(workload)
    sides = {name: Side(workload, dtype, name, batches) for name in (OURS, TORCH)}
    entries = {name: side.entry for name, side in sides.items()}
    for side in sides.values():  # allocates; the gate is this step before the times and all of them after
        side.step()
    violations = differences(entries, dtype)
    if not violations:
        _, clock = measure.clock_for(settings.threads)
        calls = {name: side.step for name, side in sides.items()}
        times = measure.interleave(calls, clock, settings.min_seconds, settings.min_samples)
        for name in entries:
            entries[name].times = times[name]
        violations = differences(entries, dtype)
    ceiling = ceilings.arithmetic(DTYPES[dtype], settings.threads)
    return StepRow(workload, dtype, allocator_in_use(), ceiling, entries, violations)


def block(row: StepRow) -> str:
    """A row as a small table."""
    lines = ["", row.name]
    lines += [f"  FAILED {violation}" for violation in row.violations]
    lines.append(
        f"  {'':10}{'median ms':>11}{'p20':>10}{'p80':>10}{'n':>4}{'tokens/s':>10}{'ceiling':>9}{'faults':>9}  loss"
    )
    for name, entry in row.entries.items():
        if entry.times is None:
            continue
        low, high = (1e3 * measure.quantile(entry.times.seconds, q) for q in (0.2, 0.8))
        share, rate = row.utilisation(name), row.tokens_per_second(name)
        lines.append(
            f"  {name:10}{1e3 * entry.times.median:11.1f}{low:10.1f}{high:10.1f}"
            + f"{len(entry.times.seconds):4}{rate:10.0f}"
            + (f"{'-':>9}" if share is None else f"{100 * share:8.1f}%")
            + f"{entry.times.faults / len(entry.times.seconds):9.0f}  {entry.losses[0]:.6f}"
        )
    if row.speedup is not None:
        lines.append(f"  {'ahead of' if row.ahead else 'behind'} torch: {row.speedup:.2f} x")
    return "\n".join(lines)


def as_json(row: StepRow) -> dict[str, Any]:
    """A row of the document: docs/benchmarks.md."""
    steps = min(len(entry.losses) for entry in row.entries.values())
    return {
        "op": NAME,
        "workload": row.workload.name,
        "model": asdict(row.workload.model) | {"kernels": None},
        "dtype": row.dtype,
        "allocator": row.allocator,
        "violations": list(row.violations),
        "flops": row.workload.flops,
        "tokens": row.workload.tokens,
        "steps_compared": steps,
        "largest_loss_difference": _largest(row.entries),
        "speedup": row.speedup,
        "ahead": row.ahead,
        "contenders": {
            name: {
                **({} if entry.times is None else entry.times.summary()),
                "tokens_per_s": row.tokens_per_second(name),
                "ceiling_share": row.utilisation(name),
                "losses": entry.losses[:steps],
            }
            for name, entry in row.entries.items()
        },
    }


def _largest(entries: dict[str, Entry]) -> float:
    pairs = zip(entries[OURS].losses, entries[TORCH].losses, strict=False)
    return max((abs(ours - theirs) / abs(theirs) for ours, theirs in pairs), default=math.nan)
