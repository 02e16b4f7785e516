"""Rows of whole models: contenders with the same weights and batches, a gate, and their times in turn.

A section (train_step.py, transformers.py) says what there is to run (WORKLOADS), how that is set up (prepare), and how
its row is written (as_json).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from fastattn import ceilings
from fastattn.bench import cases, measure
from fastattn.bench.contenders import TORCH
from fastattn.bench.runner import Settings, allocator_in_use

DTYPES = {name: cases.DTYPES[name] for name in cases.DEFAULT_DTYPES}


class Workload(cases.Selectable, Protocol):
    """tokens, flops: of one call, flops of matrix products."""

    @property
    def tokens(self) -> int: ...
    @property
    def flops(self) -> int: ...


W = TypeVar("W", bound=Workload)


@dataclass
class Entry:
    """One contender. losses, norms: of every training step it made. embeddings: (batch, width) of its last encoding."""

    times: measure.Times | None = None
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    embeddings: Tensor | None = None


@dataclass(frozen=True)
class Contest:
    """calls: of each contender, which note in entries what they gave. differences: what is wrong there, in words."""

    entries: dict[str, Entry]
    calls: dict[str, Callable[[], None]]
    differences: Callable[[], tuple[str, ...]]


@dataclass(frozen=True)
class ModelRow(Generic[W]):
    """A section's workload in one dtype. ceiling: operations per second of the machine, None without native kernels."""

    section: str
    workload: W
    dtype: str
    allocator: str
    ceiling: float | None
    entries: dict[str, Entry]
    violations: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.section} {self.workload.name} {self.dtype} ({self.allocator} allocator)"

    def gain(self, name: str) -> float | None:
        """torch's time over the contender's."""
        times, theirs = self.entries[name].times, self.entries[TORCH].times
        return None if times is None or theirs is None or self.violations else theirs.median / times.median

    @property
    def speedup(self) -> float | None:
        """Of the fastest of ours."""
        gains = [gain for name in self.entries if name != TORCH and (gain := self.gain(name)) is not None]
        return max(gains, default=None)

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


def select(
    section: str, workloads: Sequence[W], *, quick: bool, names: Sequence[str], dtypes: Sequence[str] | None
) -> list[tuple[W, str]]:
    """(workload, dtype) pairs; ValueError for names and dtypes that there are not."""
    for dtype in dtypes or ():
        if dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype}: {section} has {', '.join(DTYPES)}")
    chosen = cases.named(section, workloads, quick, names)
    return [(workload, dtype) for workload in chosen for dtype in dtypes or DTYPES]


def run(
    section: str, selected: Sequence[tuple[W, str]], settings: Settings, prepare: Callable[[W, str], Contest]
) -> Iterator[ModelRow[W]]:
    """A row for each pair, as they are done. Sets torch's number of threads while it runs."""
    with measure.with_threads(settings.threads):
        for workload, dtype in selected:
            entries, violations = _timed(prepare(workload, dtype), settings)
            ceiling = ceilings.arithmetic(DTYPES[dtype], settings.threads)
            yield ModelRow(section, workload, dtype, allocator_in_use(), ceiling, entries, violations)


def _timed(contest: Contest, settings: Settings) -> tuple[dict[str, Entry], tuple[str, ...]]:
    for call in contest.calls.values():  # allocates; the gate is this call before the times and all of them after
        call()
    violations = contest.differences()
    if not violations:
        _, clock = measure.clock_for(settings.threads)
        times = measure.interleave(contest.calls, clock, settings.min_seconds, settings.min_samples)
        for name, entry in contest.entries.items():
            entry.times = times[name]
        violations = contest.differences()
    return contest.entries, violations


def block(row: ModelRow[Any]) -> str:
    """A row as a small table."""
    lines = ["", row.name]
    lines += [f"  FAILED {violation}" for violation in row.violations]
    lines.append(
        f"  {'':10}{'median ms':>11}{'p20':>10}{'p80':>10}{'n':>4}{'tokens/s':>10}{'ceiling':>9}{'faults':>9}"
        f"{'gain':>7}  loss"
    )
    for name, entry in row.entries.items():
        if entry.times is None:
            continue
        low, high = (1e3 * measure.quantile(entry.times.seconds, q) for q in (0.2, 0.8))
        share, gain, count = row.utilisation(name), row.gain(name), len(entry.times.seconds)
        lines.append(
            f"  {name:10}{1e3 * entry.times.median:11.1f}{low:10.1f}{high:10.1f}{count:4}"
            + f"{row.workload.tokens / entry.times.median:10.0f}"
            + (f"{'-':>9}" if share is None else f"{100 * share:8.1f}%")
            + f"{entry.times.faults / count:9.0f}"
            + (f"{'-':>7}" if gain is None else f"{gain:7.2f}")
            + (f"  {entry.losses[0]:.6f}" if entry.losses else "")
        )
    return "\n".join(lines)


def as_json(row: ModelRow[Any]) -> dict[str, Any]:
    """A row of the document: docs/benchmarks.md."""
    steps = min(len(entry.losses) for entry in row.entries.values())
    return {
        "op": row.section,
        "workload": row.workload.name,
        "dtype": row.dtype,
        "allocator": row.allocator,
        "violations": list(row.violations),
        "flops": row.workload.flops,
        "tokens": row.workload.tokens,
        "speedup": row.speedup,
        "ahead": row.ahead,
        "contenders": {
            name: {
                **({} if entry.times is None else entry.times.summary()),
                "tokens_per_s": row.tokens_per_second(name),
                "gain": row.gain(name),
                "ceiling_share": row.utilisation(name),
                "losses": entry.losses[:steps],
            }
            for name, entry in row.entries.items()
        },
    }
