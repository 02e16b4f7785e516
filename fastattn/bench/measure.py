"""Taking times and memory of calls: contenders in turn within one process, so that what disturbs one disturbs all."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
K = TypeVar("K")
Call = Callable[[], Any]

#: A contender's turn lasts at least this long, and shorter calls are repeated within it.
TURN_SECONDS = 5e-3
#: Calls shorter than this feel what the one before left in the caches: a turn then begins with one that does not count.
COLD_SECONDS = 20e-3
MOST_SAMPLES = 2000
#: Who takes this many times as long as the fastest is not in the race, and this many samples are enough.
HOPELESS, HOPELESS_SAMPLES = 2.0, 2


@dataclass
class Samples:
    """Seconds of every call of one contender."""

    seconds: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.seconds)

    @property
    def median(self) -> float:
        return quantile(self.seconds, 0.5)

    def summary(self) -> dict[str, float | int]:
        """For reports: median, 20th and 80th percentile, least (seconds), samples."""
        return {
            "median_s": self.median,
            "p20_s": quantile(self.seconds, 0.2),
            "p80_s": quantile(self.seconds, 0.8),
            "min_s": min(self.seconds),
            "n": len(self.seconds),
        }


@dataclass
class Times(Samples):
    """On the clock that `interleave` was given.

    wall, cpu: of all its calls together, on the wall and over all threads of the process. faults: pages that the
    system had to map for them.
    """

    wall: float = 0.0
    cpu: float = 0.0
    faults: int = 0

    def add(self, other: Times) -> None:
        self.seconds += other.seconds
        self.wall += other.wall
        self.cpu += other.cpu
        self.faults += other.faults

    @property
    def cores_busy(self) -> float:
        """CPU time of all threads over wall time: below the number of threads when others wanted the cores."""
        return self.cpu / self.wall

    def summary(self) -> dict[str, float | int]:
        """Of `Samples`, and mean cores busy, faults per call."""
        return {
            **super().summary(),
            "cores_busy": self.cores_busy,
            "page_faults": self.faults / len(self.seconds),
        }


def quantile(values: Sequence[float], q: float) -> float:
    """With linear interpolation; of at least one value."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@contextlib.contextmanager
def with_threads(count: int) -> Iterator[None]:
    """Within the block torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def clock_for(threads: int) -> tuple[str, Callable[[], float]]:
    """One thread: the CPU time of this thread, which others on the machine do not lengthen. More: the wall clock.

    torch runs a CPU backward on the thread that asked for it, so with one thread nothing is missed.
    """
    return ("thread_cpu", time.thread_time) if threads == 1 else ("wall", time.perf_counter)


def interleave(
    calls: Mapping[K, Call], clock: Callable[[], float], min_seconds: float, min_samples: int = 3
) -> dict[K, Times]:
    """Calls every contender in turn until each has `min_samples` samples (HOPELESS ones fewer) and `min_seconds`.

    Who goes first changes from round to round. Results are dropped before the next call and outside the times, so
    every call makes its outputs anew, from whatever the allocator has, as users' calls do. A contender that has
    enough drops out; the first one stays until the last round. Calls must have run before (compiled, warm).
    """
    names = list(calls)
    times = {name: Times() for name in names}

    def enough(name: K) -> bool:
        t = times[name]
        if not t.seconds or len(t.seconds) >= MOST_SAMPLES:
            return bool(t.seconds)
        fastest = min(min(other.seconds, default=math.inf) for other in times.values())
        samples = HOPELESS_SAMPLES if min(t.seconds) > HOPELESS * fastest else min_samples
        return len(t.seconds) >= samples and t.total >= min_seconds

    gc.collect()
    gc.disable()
    try:
        rounds = 0
        while active := [name for name in names if not enough(name)]:
            if names[0] not in active:
                active.insert(0, names[0])
            first = rounds % len(active)
            for name in active[first:] + active[:first]:
                _turn(calls[name], clock, times[name])
            rounds += 1
    finally:
        gc.enable()
    return times


def _turn(call: Call, clock: Callable[[], float], times: Times) -> None:
    first = Times()
    _sample(call, clock, first)
    if first.total >= COLD_SECONDS:
        times.add(first)
        return
    until = time.perf_counter() + TURN_SECONDS
    while True:
        _sample(call, clock, times)
        if time.perf_counter() >= until:
            return


def _sample(call: Call, clock: Callable[[], float], times: Times) -> None:
    faults, wall, cpu = _faults(), time.perf_counter(), time.process_time()
    began = clock()
    result = call()
    times.seconds.append(clock() - began)
    times.cpu += time.process_time() - cpu
    times.wall += time.perf_counter() - wall
    times.faults += _faults() - faults
    del result


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(call: Callable[[], T]) -> tuple[T, int | None]:
    """The result of a call, and the bytes by which resident memory rose at most during it, the result included.

    Counts everything that the process touches, whoever allocated it. Memory that the allocator holds is returned to
    the system first. None where the system cannot tell (needs Linux's /proc).
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    try:
        CLEAR_REFS.write_text("5")  # resets the high-water mark
    except OSError:
        return call(), None
    before = _resident("VmRSS")
    result = call()
    return result, max(_resident("VmHWM") - before, 0)


def _resident(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {name}")
