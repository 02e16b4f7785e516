"""Times of calls on a device, contenders in turn, with cold caches; wall time where kernels are interpreted."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping

import torch

from fastattn.bench.measure import Call, Samples

#: Written between calls: more than the last cache of any GPU, and long enough to launch the next call behind.
FLUSH_BYTES = 256 * 2**20
#: A long call needs few samples, a short one is not measured thousands of times.
FEWEST, MOST = 5, 200


class DeviceClock:
    """Seconds between events around a call. Launching is hidden behind the flush before it, as in a busy stream."""

    def __init__(self) -> None:
        self.flushed = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def seconds(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3


class WallClock:
    """For the interpreter: shows that the path works, and nothing about speed."""

    def seconds(self, call: Call) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began


def interleave(calls: Mapping[str, Call], clock: DeviceClock | WallClock, seconds: float) -> dict[str, Samples]:
    """Every contender in turn, until each has FEWEST samples and `seconds` of them; who begins changes every round.

    Calls must have run before: compiled, warm.
    """
    taken = {name: Samples() for name in calls}
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        for turn in range(MOST):
            active = [n for n in names if len(taken[n].seconds) < FEWEST or taken[n].total < seconds]
            if not active:
                break
            first = turn % len(active)
            for name in active[first:] + active[:first]:
                taken[name].seconds.append(clock.seconds(calls[name]))
    finally:
        gc.enable()
    return taken
