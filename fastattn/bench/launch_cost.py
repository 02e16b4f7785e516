"""python -m fastattn.bench.launch_cost: what a call of the triton backend costs before Triton is asked to launch.

On any machine: the public functions run on small CPU tensors as on a GPU (fastattn/testing/recorded.py), Triton's
launcher does nothing, and what is left is ours and torch's own for allocating results and recording the graph.
Thread CPU time, median over batches of calls. "Ours" is the forward less its allocations and what Triton does before
its launcher, each at what one costs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.cases import Suite
from fastattn.gpu import devices
from fastattn.testing import suites
from fastattn.testing.problems import HollowSampler, op_of
from fastattn.testing.recorded import serving_cpu_tensors

CALLS, BATCHES = 50, 41
#: Microseconds of ours in a forward without gradients that are not to be exceeded; docs/gpu.md.
TARGET = 15.0
ALLOCATE = {"empty", "empty_like", "new_empty", "new_empty_strided"}


@dataclass(frozen=True)
class Cost:
    """Microseconds: forward of tensors without gradients; forward that records a graph; the backward of that alone.
    launches: of forward and of both. frames, allocations: Python functions entered, and tensors allocated, by the
    forward."""

    forward: float
    recorded: float
    backward: float
    launches: tuple[int, int]
    frames: int
    allocations: int


@contextlib.contextmanager
def launching_nothing(target: str = "sm_90") -> Iterator[list[int]]:
    """Within the block Triton's launcher does nothing, for any device, but count itself in the list's only number."""
    count = [0]
    with devices.assume(target), serving_cpu_tensors():
        function = importlib.import_module("triton.runtime.jit").JITFunction
        run = function.run

        def nothing(self: Any, *args: Any, grid: Any, warmup: Any, **named: Any) -> None:
            count[0] += 1

        function.run = nothing
        try:
            yield count
        finally:
            function.run = run


def _microseconds(call: Callable[[], Any], calls: int, batches: int) -> float:
    for _ in range(3):
        call()
    times = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(batches):
            began = time.thread_time_ns()
            for _ in range(calls):
                call()
            times.append((time.thread_time_ns() - began) / calls / 1e3)
    finally:
        gc.enable()
    return statistics.median(times)


def entered(call: Callable[[], Any]) -> tuple[int, int]:
    """(Python functions that a call enters, tensors that it allocates)."""
    frames = allocations = 0

    def seen(frame: Any, event: str, argument: Any) -> None:
        nonlocal frames, allocations
        frames += event == "call"
        allocations += event == "c_call" and argument.__name__ in ALLOCATE

    call()
    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(before)
    return frames, allocations


def measure(suite: Suite, count: list[int], calls: int = CALLS, batches: int = BATCHES) -> Cost:
    """Of a suite's first workload."""
    workload = suite.workloads[0]
    arguments = workload.build(HollowSampler(f"{suite.name}/{workload.name}", dtype=torch.bfloat16))
    names = [name for name in suite.differentiable if isinstance(arguments.get(name), Tensor)]
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}

    def run(given: dict[str, Any]) -> Any:
        return suite.function(**given, backend="triton")

    def forward() -> Any:
        return run(arguments)

    forward()
    before = count[0]
    forward()
    once = twice = count[0] - before
    recorded = backward = 0.0
    if leaves:
        with_leaves = {**arguments, **leaves}
        results = run(with_leaves)
        outputs = [t for t in (results if isinstance(results, tuple) else (results,)) if t.requires_grad]
        gradients = [torch.empty_like(output) for output in outputs]
        inputs = list(leaves.values())

        def backwards() -> Any:
            return torch.autograd.grad(outputs, inputs, gradients, retain_graph=True, allow_unused=True)

        before = count[0]
        backwards()
        twice += count[0] - before
        recorded = _microseconds(lambda: run(with_leaves), calls, batches)
        backward = _microseconds(backwards, calls, batches)
    return Cost(_microseconds(forward, calls, batches), recorded, backward, (once, twice), *entered(forward))


class _Nothing(torch.autograd.Function):
    """What torch takes for a function of one tensor that does nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.empty_like(grads[0])


def floor(calls: int = CALLS, batches: int = BATCHES) -> Cost:
    """An autograd.Function that allocates a result, and a gradient."""
    x = torch.empty(16, 16).requires_grad_()
    y = _Nothing.apply(x)
    gradient = torch.empty_like(x)

    def backwards() -> Any:
        return torch.autograd.grad(y, x, gradient, retain_graph=True)

    return Cost(
        _microseconds(lambda: torch.empty_like(x), calls, batches),
        _microseconds(lambda: _Nothing.apply(x), calls, batches),
        _microseconds(backwards, calls, batches),
        (0, 0),
        0,
        1,
    )


def launch_floor(calls: int = CALLS, batches: int = BATCHES) -> float:
    """Microseconds that Triton takes from a kernel to its launcher, where that does nothing."""
    kernel = importlib.import_module("fastattn.ops.swiglu.triton_kernels").forward
    return _microseconds(lambda: kernel[(1,)](1, 2, 3, COLUMNS=1, num_warps=4), calls, batches)


def chosen(names: list[str] | None) -> list[Suite]:
    """The suites that the triton backend serves and that have workloads."""
    found = [suite for suite in suites().values() if suite.workloads and "triton" in op_of(suite).bound]
    return [suite for suite in found if not names or suite.name in names]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastattn.bench.launch_cost", description=__doc__.split("\n\n")[0])
    parser.add_argument("--op", action="append", help="only this suite (repeatable)")
    parser.add_argument("--profile", action="store_true", help="show where the forward's time goes")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    least = floor()
    print("microseconds           forward     ours  recorded  backward  launches  frames")
    print(f"{'(torch, no kernel)':22} {least.forward:7.1f}            {least.recorded:7.1f}   {least.backward:7.1f}")
    with launching_nothing() as count:
        launch = launch_floor()
        print(f"{'(one launch)':22} {launch:7.1f}")
        for suite in chosen(options.op):
            cost = measure(suite, count)
            ours = cost.forward - cost.allocations * least.forward - cost.launches[0] * launch
            mark = "" if ours <= TARGET else f"  more than {TARGET:.0f}"
            print(f"{suite.name:22} {cost.forward:7.1f}  {ours:7.1f}   {cost.recorded:7.1f}   {cost.backward:7.1f}   "
                  f"{cost.launches[0]} + {cost.launches[1] - cost.launches[0]:<3}   {cost.frames:6}{mark}")  # fmt: skip
            if options.profile:
                _profile(suite)
    return 0


def _profile(suite: Suite) -> None:
    import cProfile
    import pstats

    workload = suite.workloads[0]
    arguments = workload.build(HollowSampler("profile", dtype=torch.bfloat16))
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(2000):
        suite.function(**arguments, backend="triton")
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    sys.exit(main())
