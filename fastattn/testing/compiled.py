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
import math
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastattn.gpu import devices, tuning
from fastattn.testing import assembly
from fastattn.testing.problems import EVERY, ONE, Problem, op_of, problems
from fastattn.testing.recorded import Launch, recording

TABLE = Path(__file__).parents[2] / "tests" / "testing" / "compiled.json"
#: More would take longer than anybody waits.
MOST = 412

#: What a row may have some of where laws leave it to the table.
MAY_NOT_GROW = ("spills", "waits")

Row = dict[str, Any]
Key = tuple[str, str, str]

#: Accesses that are narrow by nature, and why.
NARROW = {
    ("column_kernels/column_sums", "stores"): "a program's share of one row of parameters",
    ("linear/through", "stores"): "a share of one row of the bias' gradient, where that is all there is to do",
    ("attention/delta", "stores"): "one number of a row",
    ("attention/backward_key", "loads"): "two numbers of a row, and masks, in the lanes that need them",
    ("decode/combine", "stores"): "one row of the result",
    ("decode/attend", "stores"): "few rows, as tensor cores leave them",
    ("cross_entropy/forward_rows", "stores"): "two numbers of a row",
    ("cross_entropy/forward_long", "stores"): "two numbers of a row",
    ("cross_entropy/reduce", "loads"): "one number of a row",
    ("cross_entropy/reduce", "stores"): "two numbers in all",
}


@dataclass(frozen=True)
class Job:
    """A launch to compile. aligned: its problem wants 16-byte accesses. dim: the problem's largest head dim, or 0.
    suite: of the problem. entries: of the tuning tables, by identity, that it uses."""

    launch: Launch
    aligned: bool
    dim: int
    suite: str = ""
    entries: frozenset[int] = frozenset()

    @property
    def spills(self) -> bool:
        """Whether the table, which may not grow, decides about spills: of head dims beyond what registers hold, and of
        tensors whose strides are odd, which are read in single elements."""
        return not self.aligned or assembly.wide_heads(self.launch.target, self.dim)

    @property
    def waits(self) -> bool:
        """Whether the table, which may not grow, decides about asynchronous products that wait for each other: they
        hide nothing behind each other where a head fills the registers, and odd strides are read element by element."""
        return not self.aligned or self.dim > 128

    @property
    def key(self) -> Key:
        return self.launch.name, self.launch.target, self.launch.variant

    def __str__(self) -> str:
        return f"{self.launch.name} on {self.launch.target} ({self.launch.problem}; {self.launch.variant})"


@dataclass
class Recorded:
    """What the problems launch, and what raised."""

    jobs: dict[Launch, Job] = field(default_factory=dict)
    raised: list[str] = field(default_factory=list)


def record(chosen: Iterable[Problem], *, quick: bool = False, most: int = MOST) -> Recorded:
    """Runs the problems' host code for all targets and keeps the launches that are worth compiling.

    First come, on a problem's own targets, those that have what no other one has (`_Seen`); then, as long as there are
    no more than `most`, those that use an entry which a target's tuning table has for itself, the largest tiles first:
    where registers are short.
    """
    found = Recorded()
    extra: list[tuple[float, Job]] = []
    sizes: set[str] = set()
    chosen = list(chosen)
    for target in EVERY:
        seen, own = _Seen(sizes, everything=target in ONE), _own_entries(target)
        with recording(target) as launches:
            for problem in chosen:
                wanted = target in (problem.quick if quick else problem.targets)
                if quick and not wanted:
                    continue
                before = len(launches)
                launches.problem = problem.title
                try:
                    with devices.assume(target), tuning.watched() as looked_up:
                        dim = problem.run()
                except Exception as error:  # whatever host code raises is the finding
                    found.raised.append(f"{problem.title} on {target}: {type(error).__name__}: {error}")
                    continue
                picked = [look_up.options for look_up in looked_up]
                sizes.update(*picked)
                for launch in list(launches)[before:]:
                    used = {id(entry): entry for entry in picked if launch.uses(entry)}
                    job = Job(launch, problem.aligned, dim, problem.suite.name, frozenset(used))
                    if wanted and seen.is_new(launch, problem):
                        found.jobs[launch] = job
                    elif used.keys() & own or (used and target in ONE):
                        extra.append((max(_elements(entry) for entry in used.values()), job))
    covered = {(job.launch.types, entry) for job in found.jobs.values() for entry in job.entries}
    for _, job in sorted(extra, key=lambda pair: -pair[0]):
        uses = {(job.launch.types, entry) for entry in job.entries}
        if not quick and not uses <= covered and len(found.jobs) < most:
            covered |= uses
            found.jobs.setdefault(job.launch, job)
    return found


def _elements(options: tuning.Options) -> float:
    """Of a tile, for every warp."""
    sizes = [value for name, value in options.items() if name.isupper() and not isinstance(value, bool)]
    return math.prod(sizes) / options.get("num_warps", 4)


def _own_entries(target: str) -> set[int]:
    """The entries, by identity, that tuning tables have for a target itself."""
    return {
        id(entry["options"])
        for path in tuning.OPS.glob("*/tuning.json")
        for known in tuning.table(path.parent.name).values()
        for entry in known.get(target, ())
    }


class _Seen:
    """What has been chosen for a target. sizes: names of constants that tuning tables decide. everything: features and
    alignment are compiled for this target."""

    def __init__(self, sizes: set[str], *, everything: bool) -> None:
        self._everything = everything
        self._sizes = sizes
        self._seen: set[Any] = set()

    def is_new(self, launch: Launch, problem: Problem) -> bool:
        """Whether it has what none before had: types; a feature, or an argument of unknown alignment, where everything
        is compiled; all features and tile sizes together, where the problem asks for that."""
        features = launch.asks(self._sizes) | {(launch.kernel, "not by 16: " in launch.variant)}
        together = (launch.kernel, launch.signature, launch.features, launch.options)
        marks = {launch.types}
        marks |= features if self._everything else set()
        marks |= {together} if problem.features else set()
        new = not marks <= self._seen
        if new:
            self._seen |= {*features, launch.types, together}
        return new


def never_used(recorded: Recorded) -> list[str]:
    """Entries of the tuning tables for GPUs that nothing compiled uses, nor the same options of a number as wide."""
    used = {entry for job in recorded.jobs.values() for entry in job.entries}
    found: dict[str, tuple[Any, ...]] = {}
    covered = set()
    for path in sorted(tuning.OPS.glob("*/tuning.json")):
        for kernel, targets in tuning.table(path.parent.name).items():
            for target, entries in targets.items():
                for entry in entries if target != "interpreter" else ():
                    wide = entry.get("dtype") == "float32"
                    same = (path.parent.name, kernel, target, wide, *sorted(entry["options"].items()))
                    found[f"{path.parent.name}/{kernel} on {target}: {json.dumps(entry)}"] = same
                    if id(entry["options"]) in used:
                        covered.add(same)
    return [line for line, same in found.items() if same not in covered]


def examine(job: Job) -> tuple[Row, list[str]]:
    """The row of a launch and what is wrong with it; compiles it."""
    row: Row = dict(zip(("kernel", "target", "variant"), job.key, strict=True))
    row["problem"] = job.launch.problem
    try:
        kernel = job.launch.compile()
        seen = assembly.facts(kernel)
        wrong = assembly.complaints(job.launch, kernel, seen, spills=job.spills, waits=job.waits)
    except Exception as error:  # whatever a compiler raises is the finding
        return row, [f"does not compile: {type(error).__name__}: {str(error).strip()[:1000]}"]
    if job.aligned and job.launch.aligned:
        wrong += [what for kind, what in assembly.narrow_accesses(seen) if not _by_nature(job.launch, seen, kind)]
    return {**row, **seen.row()}, wrong


def _by_nature(launch: Launch, seen: assembly.Facts, kind: str) -> bool:
    """Whether accesses may be narrow. AMD's matrix cores leave four numbers of a row to a lane: 8 bytes are stored."""
    if kind == "stores" and launch.target.startswith("gfx") and seen.matrix:
        return True
    return (launch.name, kind) in NARROW


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
                    try:
                        flying[pool.submit(examine, queue[0])] = queue[0]
                    except BrokenProcessPool:  # before a result told of it
                        broken = True
                        break
                    queue.pop(0)
                for future in wait(flying, return_when=FIRST_COMPLETED).done if flying else ():
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
    """What there may be some of may not become more."""
    return [
        f"{what} grew from {old.get(what, 0)} to {new[what]}"
        for what in MAY_NOT_GROW
        if new.get(what, 0) > old.get(what, 0)
    ]


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
            some = [f", {row[what]} {what}" for what in MAY_NOT_GROW if row.get(what)]
            verdict.differences.append(f"{line}: not in the table{''.join(some)}")
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
    parser.add_argument("--most", type=int, default=MOST, metavar="N", help=f"launches to compile at most ({MOST})")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="worker processes (2)")
    parser.add_argument("--table", type=Path, default=TABLE, metavar="PATH", help="the committed table")
    options = parser.parse_args(argv)
    began = time.monotonic()

    recorded = record(
        (p for p in problems() if "triton" in op_of(p.suite).bound), quick=options.quick, most=options.most
    )
    jobs = [
        job
        for job in recorded.jobs.values()
        if (not options.op or job.suite in options.op) and (not options.target or job.launch.target in options.target)
    ]
    for line in recorded.raised:
        print(f"wrong: {line}")
    print(f"{len(jobs)} kernels, recorded in {time.monotonic() - began:.0f} s", flush=True)
    if options.list:
        for job in jobs:
            print(f"{job.launch.name:32} {job.launch.target:8} {job.launch.problem}: {job.launch.variant}")
        for line in [] if options.quick else never_used(recorded):
            print(f"not compiled: {line}")
        return 0
    if len(jobs) > options.most:
        print(f"more than {options.most}: choose fewer problems in fastattn/testing/problems.py")
        return 1
    unused = [] if options.quick else never_used(recorded)
    if unused:
        print(f"{len(unused)} entries of tuning tables are beyond {options.most} launches; --list names them")
    if not jobs or len({job.key for job in jobs}) < len(jobs):
        print("two launches have one name in the table" if jobs else "nothing to compile: that is no success")
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
    full = not (options.quick or options.op or options.target) and options.most == MOST
    recorded_keys = {job.key for job in jobs}
    gone = [row for row in document["rows"] if full and key_of(row) not in recorded_keys]
    verdict.differences += [f"{row['kernel']} on {row['target']} ({row['variant']}): gone" for row in gone]
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
    stale = (
        bool(verdict.differences)
        and not options.update
        and not options.quick
        and options.most == MOST
        and document["triton"] == version
    )
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


if __name__ == "__main__":
    sys.exit(main())
