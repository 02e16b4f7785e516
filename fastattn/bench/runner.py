"""Runs cases: gate, memory, times; one row for each case and direction."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastattn import allocator, ceilings
from fastattn.bench import contenders, measure
from fastattn.bench.cases import BenchCase
from fastattn.bench.contenders import OURS, TORCH, Contender
from fastattn.bench.gate import Verdict, verdict
from fastattn.bench.trial import BOTH, DIRECTIONS, FORWARD, Results, Trial
from fastattn.dispatch import BackendUnsupported, explain
from fastattn.numerics import Error

TUNED, DEFAULT = "tuned", "default"


@dataclass(frozen=True)
class Settings:
    """threads: torch's. min_seconds, min_samples: of every contender in every row, at least.

    scaling: ours and torch's also run on one thread, in turn with the rest.
    """

    threads: int
    min_seconds: float
    min_samples: int
    contenders: tuple[str, ...] | None = None
    scaling: bool = False


@dataclass(frozen=True)
class Roof:
    """The least seconds that the machine needs for a row's work, by arithmetic or by memory, whichever is more."""

    seconds: float
    bound: str
    flops: int
    bytes: int


@dataclass
class Entry:
    """A contender in a row. errors: by result, against float64. memory: bytes, see measure.peak_memory."""

    errors: dict[str, Error] = field(default_factory=dict)
    times: measure.Times | None = None
    memory: int | None = None
    unavailable: str | None = None


@dataclass(frozen=True)
class Row:
    """One case in one direction. violations: of the accuracy law by our result; then nothing was timed.

    allocator: "tuned" (fastattn.tune_allocator) or "default". alone: times on one thread, with Settings.scaling.
    """

    case: BenchCase
    direction: str
    backend: str
    roof: Roof | None
    entries: dict[str, Entry]
    violations: tuple[str, ...]
    allocator: str
    alone: dict[str, measure.Times] = field(default_factory=dict)

    def scaling(self, name: str) -> float | None:
        """How many times as fast a contender is as on one thread."""
        times = self.entries[name].times
        return None if times is None or name not in self.alone else self.alone[name].median / times.median

    @property
    def name(self) -> str:
        allocator = "" if self.allocator == TUNED else f" ({self.allocator} allocator)"
        return f"{self.case.suite.name} {self.case.workload.name} {self.case.dtype_name} {self.direction}{allocator}"

    @property
    def best_peer(self) -> str | None:
        """The fastest contender that is not ours."""
        timed = {n: e.times.median for n, e in self.entries.items() if e.times is not None and n != OURS}
        return min(timed, key=timed.__getitem__) if timed else None

    @property
    def speedup(self) -> float | None:
        """Median of the best peer over ours: above 1 we are ahead."""
        ours, peer = self.entries[OURS].times, self.best_peer
        if ours is None or peer is None:
            return None
        theirs = self.entries[peer].times
        assert theirs is not None
        return theirs.median / ours.median

    @property
    def ahead(self) -> bool:
        return self.speedup is not None and self.speedup > 1.0

    def share(self, name: str) -> float | None:
        """The share of the machine's ceiling that a contender reaches."""
        times = self.entries[name].times
        return None if times is None or self.roof is None else self.roof.seconds / times.median


def run_cases(cases: Sequence[BenchCase], settings: Settings) -> Iterator[Row]:
    """Every case in both directions, rows as they are done. Sets torch's number of threads while it runs."""
    with measure.with_threads(settings.threads):
        for case in cases:
            torch._dynamo.reset()  # graphs of earlier cases would count against torch.compile's limit
            yield from _run_case(case, settings)


def _run_case(case: BenchCase, settings: Settings) -> Iterator[Row]:
    makers = contenders.choices(case.suite)
    taking_part = {name: makers[name]() for name in contenders.names(case.suite, settings.contenders)}
    trial = Trial(case.suite, case.workload, case.dtype)
    backend = explain(case.suite.function, **trial.arguments).backend
    assert backend is not None, "the reference serves everything"
    truth, part = trial.truth()
    for direction in DIRECTIONS if trial.differentiated else (FORWARD,):
        entries = {name: Entry() for name in taking_part}
        calls: dict[str, measure.Call] = {}
        results: dict[str, Results] = {}
        broken: list[str] = []
        for name, contender in taking_part.items():
            try:
                _check_contender(contender, trial, direction)
                calls[name] = trial.call(contender, direction)
                if contender.compiles:
                    calls[name]()
                results[name], entries[name].memory = measure.peak_memory(calls[name])
            except BackendUnsupported:
                raise
            except RuntimeError as error:
                if name == TORCH:  # the law is stated against it
                    raise
                calls.pop(name, None)
                entries[name].unavailable = str(error).partition("\n")[0]
                if name == OURS:
                    broken.append(f"raised: {entries[name].unavailable}")
        expected = truth if direction == BOTH else {n: t for n, t in truth.items() if not n.startswith("grad_")}
        judged = Verdict({}, tuple(broken)) if broken else verdict(results, expected, part, case.dtype)
        results.clear()
        for name, errors in judged.errors.items():
            entries[name].errors = errors
        alone: dict[str, measure.Times] = {}
        if not judged.violations:
            _, clock = measure.clock_for(settings.threads)
            compared = [name for name in (OURS, TORCH) if settings.scaling and name in calls]
            on_one = {(name, 1): _on_one_thread(calls[name]) for name in compared}
            in_turn: dict[Any, measure.Call] = {**calls, **on_one}
            times = measure.interleave(in_turn, clock, settings.min_seconds, settings.min_samples)
            for name in calls:
                entries[name].times = times[name]
            alone = {name: times[name, 1] for name in compared}
        roof = _roof(case, direction, settings.threads)
        yield Row(case, direction, backend, roof, entries, judged.violations, allocator_in_use(), alone)


def _on_one_thread(call: measure.Call) -> measure.Call:
    """Changing the number takes microseconds, within the time of the call."""

    def run() -> Any:
        with measure.with_threads(1):
            return call()

    return run


def allocator_in_use() -> str:
    return TUNED if allocator.is_tuned() else DEFAULT


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(case: BenchCase) -> None:
    """ValueError for a workload whose tensors alone, gradients and results among them, this machine cannot hold."""
    needed = 3 * case.workload.bytes(case.dtype, backward=True)
    if needed > _physical_memory():
        raise ValueError(
            f"{case.suite.name} {case.workload.name} in {case.dtype_name} needs about {needed / 2**30:.0f} GiB, "
            f"the machine has {_physical_memory() / 2**30:.0f}"
        )


def _check_contender(contender: Contender, trial: Trial, direction: str) -> None:
    """RuntimeError, whose message is shown in the contender's place, when it cannot take part."""
    if direction == BOTH and not contender.backward:
        raise RuntimeError("has no backward")
    needed = contender.needs(trial.arguments)
    if needed > _physical_memory() / 2:
        raise RuntimeError(f"needs about {needed / 2**30:.0f} GiB")


def _roof(case: BenchCase, direction: str, threads: int) -> Roof | None:
    """None without the native module's ceilings."""
    both = direction == BOTH
    workload, dtype = case.workload, case.dtype
    flops = workload.flops() + (workload.flops(backward=True) if both else 0)
    size = workload.bytes(dtype) + (workload.bytes(dtype, backward=True) if both else 0)
    bandwidth: Callable[[int, int], float | None] = (
        ceilings.read_bandwidth if case.suite.reads else ceilings.copy_bandwidth
    )
    arithmetic, memory = ceilings.arithmetic(dtype, threads), bandwidth(size, threads)
    if arithmetic is None or memory is None:
        return None
    compute_seconds, memory_seconds = flops / arithmetic, size / memory
    bound = "compute" if compute_seconds >= memory_seconds else "memory"
    return Roof(max(compute_seconds, memory_seconds), bound, flops, size)


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive values, at least one."""
    return math.exp(sum(math.log(value) for value in values) / len(values))
