"""python -m fastattn.testing.compiled: every kernel, compiled for every GPU ahead of time, without one.

The ops' real host code runs on hollow tensors (problems.py) and its launches are recorded (recorded.py). Each distinct
one is compiled for its target, what became of it is read (assembly.py), held to laws and compared with the committed
table, one row for each, so that a regression shows in review. --update writes the table.

Two worker processes compile; Triton's cache (TRITON_CACHE_DIR) remembers what has been compiled, so a run that was
stopped continues where it was.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastattn.gpu import tuning
from fastattn.testing import assembly
from fastattn.testing.problems import EVERY, ONE, Problem, op_of, problems
from fastattn.testing.recorded import Launch, recording

TABLE = Path(__file__).parents[2] / "tests" / "testing" / "compiled.json"
#: More would take longer than anybody waits.
MOST = 400

Row = dict[str, Any]
Key = tuple[str, str, str]

#: Kernels whose accesses are narrow by nature.
NARROW: dict[str, str] = {}


@dataclass(frozen=True)
class Job:
    """A launch to compile. aligned: its problem wants 16-byte accesses. dim: the problem's largest head dim, or 0."""

    launch: Launch
    aligned: bool
    dim: int

    @property
    def key(self) -> Key:
        return self.launch.name, self.launch.target, self.launch.variant

    def __str__(self) -> str:
        return f"{self.launch.name} on {self.launch.target} ({self.launch.problem}; {self.launch.variant})"


@dataclass
class Recorded:
    """What the problems launch, which entries of the tuning tables they picked, by identity, and what raised."""

    jobs: dict[Launch, Job] = field(default_factory=dict)
    picked: set[int] = field(default_factory=set)
    raised: list[str] = field(default_factory=list)


def record(chosen: Iterable[Problem], targets: Iterable[str], *, quick: bool = False) -> Recorded:
    """Runs the problems' host code for the targets and keeps the launches that are worth compiling.

    On a problem's own targets these are all that no other one has (`_Seen`); on others those of problems that pick an
    entry which that target's table has for itself.
    """
    found = Recorded()
    look_up = tuning.options
    picked: set[int] = set()
    sizes: set[str] = set()

    def observed(*args: Any, **named: Any) -> tuning.Options:
        options = look_up(*args, **named)
        picked.add(id(options))
        sizes.update(options)
        return options

    chosen = list(chosen)
    tuning.options = observed  # type: ignore[assignment]
    try:
        for target in targets:
            seen, own = _Seen(target, sizes), _own_entries(target)
            with recording(target) as launches:
                for problem in chosen:
                    wanted = target in (problem.quick if quick else problem.targets)
                    if quick and not wanted:
                        continue
                    before = len(launches)
                    launches.problem = problem.title
                    picked.clear()
                    try:
                        dim = problem.run()
                    except Exception as error:  # whatever host code raises is the finding
                        found.raised.append(f"{problem.title} on {target}: {type(error).__name__}: {error}")
                        continue
                    fresh = bool((picked if target in ONE else picked & own) - found.picked)
                    if wanted or fresh:
                        new = seen.new(
                            list(launches)[before:],
                            sizes=fresh or problem.aligned,
                            features=wanted and target in ONE,
                            together=problem.features,
                        )
                        found.jobs |= {launch: Job(launch, problem.aligned, dim) for launch in new}
                        found.picked |= picked
    finally:
        tuning.options = look_up
    return found


def _own_entries(target: str) -> set[int]:
    """The entries, by identity, that tuning tables have for a target itself."""
    return {
        id(entry["options"])
        for path in tuning.OPS.glob("*/tuning.json")
        for known in tuning.table(path.parent.name).values()
        for entry in known.get(target, ())
    }


class _Seen:
    """What has been chosen for a target. sizes: names of constants that tuning tables decide."""

    def __init__(self, target: str, sizes: set[str]) -> None:
        self._alignments = target in ONE
        self._sizes = sizes
        self._seen: set[Any] = set()

    def new(self, launches: list[Launch], *, sizes: bool, features: bool, together: bool) -> list[Launch]:
        """Of launches those that have types or tile sizes that none before had (sizes), or ask for features that none
        before did (features), or for features of these tile sizes (together); and where alignment counts, the first of
        every kernel that knows nothing of its arguments."""
        chosen = []
        for launch in launches:
            tiles, asks = launch.tiles(self._sizes), launch.asks(self._sizes)
            both = (launch.kernel, launch.target, launch.features, launch.options, tiles)
            alignment = (launch.kernel, "not by 16: " in launch.variant)
            wishes = [(sizes, tiles), (features, asks), (together, both), (self._alignments, alignment)]
            if any(wish and mark not in self._seen for wish, mark in wishes):
                chosen.append(launch)
                self._seen |= {tiles, asks, both, alignment}
        return chosen


def never_picked(recorded: Recorded, ops: Iterable[str]) -> list[str]:
    """Entries of the tuning tables for GPUs that no problem picked."""
    lines = []
    for op in ops:
        for kernel, targets in tuning.table(op).items():
            for target, entries in targets.items():
                for entry in entries:
                    if target != "interpreter" and id(entry["options"]) not in recorded.picked:
                        lines.append(f"{op}/{kernel} on {target}: {json.dumps(entry)}")
    return lines


def examine(job: Job) -> tuple[Row, list[str]]:
    """The row of a launch and what is wrong with it; compiles it."""
    row: Row = dict(zip(("kernel", "target", "variant"), job.key, strict=True))
    row["problem"] = job.launch.problem
    try:
        kernel = job.launch.compile()
        seen = assembly.facts(kernel)
        wrong = assembly.complaints(job.launch, job.dim, kernel, seen)
    except Exception as error:  # whatever a compiler raises is the finding
        return row, [f"does not compile: {type(error).__name__}: {str(error).strip()[:1000]}"]
    if job.aligned and job.launch.aligned and job.launch.name not in NARROW:
        wrong += assembly.narrow_accesses(seen)
    return {**row, **seen.row()}, wrong


def compile_all(jobs: list[Job], workers: int) -> Iterator[tuple[Job, Row, list[str]]]:
    """`examine` of all, in worker processes; one that dies takes nothing but its own launch with it."""
    left = list(jobs)
    context = multiprocessing.get_context("spawn")
    suspects: list[Job] = []
    while left or suspects:
        alone = bool(suspects)
        queue, count = (suspects, 1) if alone else (left, workers)
        with ProcessPoolExecutor(count, mp_context=context) as pool:
            flying: dict[Future[tuple[Row, list[str]]], Job] = {}
            broken = False
            while (queue or flying) and not broken:
                while queue and len(flying) < (1 if alone else count + 1):
                    job = queue.pop(0)
                    flying[pool.submit(examine, job)] = job
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    job = flying.pop(future)
                    try:
                        yield job, *future.result()
                    except BrokenProcessPool:
                        broken = True
                        if alone:
                            row = dict(zip(("kernel", "target", "variant"), job.key, strict=True))
                            yield job, row, ["the compiler died"]
                        else:
                            suspects.append(job)
            if broken:
                suspects += flying.values()


def read(path: Path) -> dict[str, Any]:
    """The table; an empty one where there is none yet."""
    if not path.exists():
        return {"triton": None, "rows": []}
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def write(path: Path, document: dict[str, Any]) -> None:
    """One line for each row, in order, so that a diff shows what changed."""
    rows = sorted(document["rows"], key=lambda row: (row["kernel"], row["target"], row["variant"]))
    lines = ",\n".join("  " + json.dumps(row, sort_keys=False) for row in rows)
    path.write_text(f'{{\n "triton": {json.dumps(document["triton"])},\n "rows": [\n{lines}\n ]\n}}\n')


def key_of(row: Row) -> Key:
    """What a row is known by."""
    return row["kernel"], row["target"], row["variant"]


def grown(old: Row, new: Row) -> list[str]:
    """Spills, where there may be some, may not become more."""
    if new.get("spills", 0) > old.get("spills", 0):
        return [f"spills grew from {old.get('spills', 0)} to {new['spills']}"]
    return []


def changes(old: Row, new: Row) -> list[str]:
    """What is different between two rows of one launch."""
    return [
        f"{name} {old.get(name)} -> {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if name != "problem" and old.get(name) != new.get(name)
    ]


@dataclass
class Verdict:
    """failures: laws broken. differences: from the table."""

    failures: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def judge(results: Iterable[tuple[Job, Row, list[str]]], table: list[Row], *, same_compiler: bool) -> Verdict:
    """Laws always; the table where it was made by the same compiler."""
    known = {key_of(row): row for row in table}
    verdict = Verdict()
    for job, row, wrong in results:
        line, old = str(job), known.get(job.key)
        if old is None:
            spilled = f", {row['spills']} spills" if row.get("spills") else ""
            verdict.differences.append(f"{line}: not in the table{spilled}")
        elif same_compiler:
            wrong = [*wrong, *grown(old, row)]
            different = changes(old, row)
            if different:
                verdict.differences.append(f"{line}: {', '.join(different)}")
        if wrong:
            verdict.failures.append("\n    ".join([line, *wrong]))
    return verdict


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastattn.testing.compiled", description=__doc__.split("\n\n")[0])
    parser.add_argument("--op", action="append", help="only this suite's kernels (repeatable)")
    parser.add_argument("--target", action="append", choices=EVERY, help="only this target (repeatable)")
    parser.add_argument("--quick", action="store_true", help="the subset of `make test`; differences are no failure")
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--list", action="store_true", help="show what would be compiled")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="worker processes (2)")
    parser.add_argument("--table", type=Path, default=TABLE, metavar="PATH", help="the committed table")
    options = parser.parse_args(argv)
    began = time.monotonic()

    implemented = [p for p in problems() if _implemented(p)]
    chosen = [p for p in implemented if not options.op or p.suite.name in options.op]
    recorded = record(chosen, options.target or EVERY, quick=options.quick)
    jobs = list(recorded.jobs.values())
    for line in recorded.raised:
        print(f"wrong: {line}")
    print(f"{len(jobs)} kernels, recorded in {time.monotonic() - began:.0f} s", flush=True)
    if options.list:
        for job in jobs:
            print(f"{job.launch.name:32} {job.launch.target:8} {job.launch.problem}: {job.launch.variant}")
        return 0
    if len(jobs) > MOST:
        print(f"more than {MOST}: choose fewer problems in fastattn/testing/problems.py")
        return 1
    if not jobs:
        print("nothing to compile: that is no success")
        return 1

    document = read(options.table)
    version = importlib.import_module("triton").__version__
    results = []
    for number, (job, row, wrong) in enumerate(compile_all(jobs, options.jobs), 1):
        results.append((job, row, wrong))
        if wrong or number % 20 == 0:
            print(f"{number}/{len(jobs)} {time.monotonic() - began:.0f} s {job.launch.name} on {job.launch.target}: "
                  + ("; ".join(wrong) or "right"), flush=True)  # fmt: skip
    verdict = judge(results, document["rows"], same_compiler=document["triton"] == version)
    full = not (options.quick or options.op or options.target)
    recorded_keys = {job.key for job in jobs}
    gone = [row for row in document["rows"] if full and key_of(row) not in recorded_keys]
    verdict.differences += [f"{row['kernel']} on {row['target']} ({row['variant']}): gone" for row in gone]
    if full:
        ops = {p.suite.function.__module__.split(".")[-2] for p in implemented}
        verdict.failures += [f"no problem picks {line}" for line in never_picked(recorded, sorted(ops))]

    for title, lines in (("unlike the table", verdict.differences), ("wrong", verdict.failures)):
        shown = lines if title == "wrong" or not (options.update or options.quick) else lines[:5]
        for line in shown:
            print(f"{title}: {line}")
        if len(shown) < len(lines):
            print(f"{title}: {len(lines) - len(shown)} more")
    if options.update:
        kept = [] if full else [row for row in document["rows"] if not _replaced(row, options, recorded_keys)]
        made = [row for _, row, _ in results if "registers" in row]
        write(options.table, {"triton": version, "rows": kept + made})
        print(f"written to {options.table}")
    stale = bool(verdict.differences) and not options.update and not options.quick and document["triton"] == version
    verdict.failures += recorded.raised
    print(f"{len(jobs)} kernels, {len(verdict.failures)} wrong, {len(verdict.differences)} unlike the table, "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    return 1 if verdict.failures or stale else 0


def _replaced(row: Row, options: argparse.Namespace, keys: set[Key]) -> bool:
    """Whether a partial run speaks for a row of the table."""
    if options.quick:
        return key_of(row) in keys
    ours = not options.op or row["problem"].split(",")[0] in options.op
    return ours and (not options.target or row["target"] in options.target)


def _implemented(problem: Problem) -> bool:
    return "triton" in op_of(problem.suite).bound


if __name__ == "__main__":
    sys.exit(main())
