"""`fastattn tune --device cuda`: which tile sizes, warps and stages are fastest on this GPU.

For every workload the look-ups of its forward and its backward are watched; each kernel's options are then varied, one
at a time, beginning with the committed ones, and the whole call is timed. What is faster by more than the noise is
written to a file that look-ups read from then on (fastattn/gpu/measured.py). Nothing is ever timed inside a call.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn import env
from fastattn.bench.gpu.timing import DeviceClock, WallClock, interleave
from fastattn.bench.measure import Call
from fastattn.cases import Suite, Workload
from fastattn.dispatch import explain
from fastattn.gpu import devices, measured, tuning
from fastattn.testing import suites

#: Other options than the committed ones must be this much faster: less is within the noise.
MARGIN = 1.03
#: How often a kernel's options may be changed, one after the other.
ROUNDS = 3
#: A change of tiles changes the order of sums: how far results may be from those of the committed options.
CLOSE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}

Options = Mapping[str, int]
#: Seconds of each of these options; inf for what does not run, or not rightly.
Timer = Callable[[Sequence[Options]], list[float]]


def neighbours(options: Options, warps: Sequence[int] = (1, 2, 4, 8, 16, 32)) -> list[Options]:
    """Options with one thing changed: a tile half or twice as long, fewer or more warps, a stage less or more. What is
    a switch stays."""
    found: list[Options] = []
    for name, value in options.items():
        if isinstance(value, bool):
            continue
        if name == "num_warps":
            values = [value // 2, value * 2]
            values = [v for v in values if v in warps]
        elif name in ("num_stages", "STAGES"):
            values = [v for v in (value - 1, value + 1) if 1 <= v <= 6]
        elif name.isupper() and value > 0 and value & (value - 1) == 0:
            values = [v for v in (value // 2, value * 2) if v >= 1]
        else:
            continue
        found += [{**options, name: v} for v in values]
    return found


@dataclass(frozen=True)
class Found:
    """The fastest options, their seconds and those of the options that the search began with; tried: how many."""

    options: Options
    seconds: float
    began: float
    tried: int

    @property
    def faster(self) -> bool:
        """By more than the noise."""
        return self.began > self.seconds * MARGIN


def search(start: Options, timer: Timer, rounds: int = ROUNDS) -> Found:
    """From the options given to a neighbour that is faster by more than the noise, and on from there."""
    seen: dict[tuple[tuple[str, int], ...], float] = {}

    def key(options: Options) -> tuple[tuple[str, int], ...]:
        return tuple(sorted(options.items()))

    best = start
    began = math.inf
    for turn in range(rounds):
        candidates = [options for options in neighbours(best) if key(options) not in seen]
        # What is best so far is timed again beside those that are to beat it.
        times = timer([best, *candidates])
        seen |= {key(options): seconds for options, seconds in zip([best, *candidates], times, strict=True)}
        if turn == 0:
            began = times[0]
        fastest = min(range(len(times)), key=times.__getitem__)
        if not times[0] > times[fastest] * MARGIN:
            return Found(best, times[0], began, len(seen))
        best = candidates[fastest - 1]
    return Found(best, seen[key(best)], began, len(seen))


@dataclass
class Trial:
    """A call to be timed with other options: forward or backward of a workload."""

    suite: Suite
    workload: Workload
    dtype: torch.dtype
    call: Call
    target: devices.Target

    def with_options(self, look_up: tuning.LookUp, options: Options) -> Call:
        """The call with these options in place of those that were looked up."""
        target = replace(self.target, forced={(look_up.op, look_up.kernel): dict(options)})

        def run() -> Any:
            with devices.assume(target):
                return self.call()

        return run

    def look_ups(self) -> list[tuning.LookUp]:
        """What the call looks up, each once."""
        with devices.assume(replace(self.target)), tuning.watched() as found:
            self.call()
        return list({(one.op, one.kernel): one for one in found}.values())


def timer_for(trial: Trial, look_up: tuning.LookUp, clock: DeviceClock | WallClock, seconds: float) -> Timer:
    """Times the trial's call with options in turn; the first ones say what is right."""

    def timer(candidates: Sequence[Options]) -> list[float]:
        calls: dict[str, Call] = {}
        expected: list[Tensor] | None = None
        for number, options in enumerate(candidates):
            call = trial.with_options(look_up, options)
            try:
                result = _tensors(call())
            except Exception:  # too much shared memory, too many registers, a compiler's refusal
                if number == 0:
                    raise
                continue
            if expected is None:
                expected = result
            if all(map(_close, result, expected)):
                calls[str(number)] = call
        taken = interleave(calls, clock, seconds)
        return [taken[str(i)].median if str(i) in taken else math.inf for i in range(len(candidates))]

    return timer


def _tensors(result: Any) -> list[Tensor]:
    results = result if isinstance(result, tuple) else (result,)
    return [tensor for tensor in results if isinstance(tensor, Tensor)]


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    error = (a.double() - b.double()).norm()
    return bool(error <= CLOSE.get(a.dtype, 1e-9) * b.double().norm())


def trials(suite: Suite, workload: Workload, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Trial]]:
    """("forward" or "backward", trial)."""
    arguments = suite.arguments(workload, device, dtype)
    names = [name for name in suite.differentiable if isinstance(arguments.get(name), Tensor)]
    target = devices.target_of(torch.device(device, 0) if device == "cuda" else torch.device(device))

    def run(given: dict[str, Any]) -> Any:
        return suite.function(**given, backend="triton")

    yield "forward", Trial(suite, workload, dtype, lambda: run(arguments), target)
    if names:
        leaves = {name: arguments[name].detach().requires_grad_() for name in names}
        outputs = [t for t in _tensors(run({**arguments, **leaves})) if t.requires_grad]
        gradients = [torch.randn_like(output) for output in outputs]
        inputs = list(leaves.values())

        def backward() -> Any:
            return torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)

        yield "backward", Trial(suite, workload, dtype, backward, target)


def entry_for(look_up: tuning.LookUp, found: Found) -> measured.Entry:
    """As it stands in the file."""
    return {
        "dtype": None if look_up.dtype is None else str(look_up.dtype).removeprefix("torch."),
        "dim": look_up.tile_dim,
        "kind": look_up.kind,
        "size": look_up.size,
        "options": dict(found.options),
        "seconds": found.seconds,
        "committed_seconds": found.began,
    }


def tune(
    chosen: Sequence[tuple[Suite, Workload, torch.dtype]],
    device: str,
    clock: DeviceClock | WallClock,
    *,
    seconds: float,
    budget: float = math.inf,
) -> dict[str, dict[str, list[measured.Entry]]]:
    """What is faster than the committed options, by op and kernel; begins no kernel when `budget` seconds are over.

    A kernel is searched once for each dtype, dim, kind and size that is looked up, and its first workload decides.
    """
    began = time.monotonic()
    done: set[tuple[Any, ...]] = set()
    tables: dict[str, dict[str, list[measured.Entry]]] = {}
    for suite, workload, dtype in chosen:
        for direction, trial in trials(suite, workload, dtype, device):
            for look_up in trial.look_ups():
                problem = (look_up.op, look_up.kernel, look_up.dtype, look_up.tile_dim, look_up.kind, look_up.size)
                if problem in done:
                    continue
                if time.monotonic() - began > budget:
                    print("the time is over: what is measured so far counts")
                    return tables
                done.add(problem)
                found = search(look_up.options, timer_for(trial, look_up, clock, seconds))
                name = f"{look_up.op}/{look_up.kernel} in {suite.name} {workload.name} {direction}, {dtype}"
                if found.faster:
                    kernels = tables.setdefault(look_up.op, {})
                    kernels.setdefault(look_up.kernel, []).append(entry_for(look_up, found))
                    print(f"{name}: {found.began * 1e6:.1f} -> {found.seconds * 1e6:.1f} us, {dict(found.options)}")
                else:
                    print(f"{name}: {found.began * 1e6:.1f} us stays, {found.tried} tried", flush=True)
    return tables


def workloads(names: Sequence[str] | None, quick: bool, device: str) -> list[tuple[Suite, Workload, torch.dtype]]:
    """bfloat16 workloads that the backend serves."""
    found = []
    for suite in suites().values():
        if names and suite.name not in names:
            continue
        for workload in suite.workloads:
            if quick and not workload.quick:
                continue
            arguments = suite.arguments(workload, device, torch.bfloat16)
            if explain(suite.function, **arguments, backend="triton").backend == "triton":
                found.append((suite, workload, torch.bfloat16))
    return found


def reason_against() -> str | None:
    """Why there is no GPU here to tune for; None when there is one."""
    return "kernels are interpreted" if env.interpreting() else devices.probe()


def run(names: Sequence[str] | None, quick: bool, minutes: float | None) -> int:
    """Measures, prints, writes; 0. ValueError where there is no GPU for it, or for a file in the way."""
    reason = reason_against()
    if reason is not None:
        raise ValueError(f"there is no GPU to tune for: {reason}")
    target = devices.target_of(torch.device("cuda", 0))
    path = measured.path()
    if path.exists():
        measured.read(path)  # before the minutes, not after them
    print(measured.device_key(target.device))
    budget = math.inf if minutes is None else minutes * 60.0
    tables = tune(
        workloads(names, quick, "cuda"), "cuda", DeviceClock(), seconds=0.02 if quick else 0.06, budget=budget
    )
    measured.write(path, target.device, tables)
    tuning.forget()
    print(f"written to {path}")
    return 0
