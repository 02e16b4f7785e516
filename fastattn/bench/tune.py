"""`fastattn tune`: which tile sizes this machine's GPU likes best (tune_gpu.py); without one, or with `--device cpu`,
which backend is the faster one, for the ops whose kernels are not so everywhere.

Runs the workloads of every op with preferences (fastattn/preference.py) on every backend that can serve them, forward
and forward with backward, prints what it finds and writes the file that dispatch reads from then on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch

from fastattn import backends, env, preference
from fastattn.bench import measure, tune_gpu
from fastattn.bench.cases import DTYPES
from fastattn.bench.contenders import Contender
from fastattn.bench.trial import DIRECTIONS, Trial
from fastattn.cases import Suite, Workload
from fastattn.dispatch import Op
from fastattn.testing import suites

#: Another backend must be this much faster than torch's own kernels to be preferred: less is within the noise.
MARGIN = 1.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastattn tune`."""
    parser.add_argument("--quick", action="store_true", help="a few workloads and short measurements")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what to measure (cuda where there is a GPU)")
    parser.add_argument("--op", action="append", metavar="NAME", help="cuda: only this op's kernels (repeatable)")
    parser.add_argument("--minutes", type=float, metavar="M", help="cuda: begin no kernel after this long")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads (as many as torch would take)")


def _on(function: Callable[..., Any], backend: str) -> Contender:
    return Contender(backend, lambda **arguments: function(**arguments, backend=backend))


def _measure(
    suite: Suite, workload: Workload, dtype: torch.dtype, names: list[str], seconds: float
) -> dict[str, float]:
    """Seconds of each backend: geometric mean over the directions."""
    trial = Trial(suite, workload, dtype)
    _, clock = measure.clock_for(torch.get_num_threads())
    logarithms = dict.fromkeys(names, 0.0)
    for direction in DIRECTIONS:
        calls = {name: trial.call(_on(suite.function, name), direction) for name in names}
        for name, times in measure.interleave(calls, clock, seconds).items():
            logarithms[name] += math.log(times.median) / len(DIRECTIONS)
    return {name: math.exp(value) for name, value in logarithms.items()}


def _classes(suite: Suite, quick: bool) -> dict[str, list[tuple[Workload, torch.dtype, list[str]]]]:
    """The workloads of a suite by the class of their problems, with the backends that can serve them."""
    found: dict[str, list[tuple[Workload, torch.dtype, list[str]]]] = {}
    prepare: Callable[..., tuple[Op, Any]] | None = getattr(suite.function, "prepare", None)
    if prepare is None:
        return found
    for workload in suite.workloads:
        if quick and not workload.quick:
            continue
        for dtype in DTYPES.values():
            op, problem = prepare(**suite.arguments(workload, "cpu", dtype))
            if op.preference_class is None:
                return {}
            able = [name for name, reason in op.reasons(problem).items() if reason is None]
            found.setdefault(op.preference_class(problem), []).append((workload, dtype, able))
    return found


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes; 0. ValueError for options, or a file in the way, that cannot be served."""
    if (args.device or ("cuda" if tune_gpu.reason_against() is None else "cpu")) == "cuda":
        return tune_gpu.run(args.op, args.quick, args.minutes)
    if args.threads is not None:
        if not 1 <= args.threads <= 1024:
            raise ValueError(f"--threads must be 1 to 1024, got {args.threads}")
        torch.set_num_threads(args.threads)
    reason = backends.probe("cpu")
    if reason is not None:
        raise ValueError(f"there is nothing to choose from: the cpu backend is {reason}")
    path = env.tune_file()
    if path.exists():
        preference.read(path)  # before the minutes, not after them
    print(f"{preference.machine_key()}, {torch.get_num_threads()} threads")
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    for suite in suites().values():
        for name, problems in _classes(suite, args.quick).items():
            totals: dict[str, float] = {}
            for workload, dtype, able in problems:
                seconds = _measure(suite, workload, dtype, able, 0.1 if args.quick else 0.5)
                for backend, value in seconds.items():
                    totals[backend] = totals.get(backend, 0.0) + math.log(value) / len(problems)
            means = {backend: math.exp(value) for backend, value in totals.items()}
            best = min(means, key=lambda backend: means[backend] * (1.0 if backend == "reference" else MARGIN))
            measured.setdefault(suite.name, {})[name] = {"backend": best, "seconds": means}
            times = ", ".join(f"{backend} {value * 1e6:.0f} us" for backend, value in means.items())
            print(f"{suite.name}: {name}: {best} ({times})", flush=True)
    preference.write(path, measured)
    print(f"written to {path}")
    return 0
