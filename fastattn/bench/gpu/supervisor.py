"""Starts sections in processes of their own, within a budget of seconds, and writes the document after every row."""

from __future__ import annotations

import argparse
import json
import math
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastattn import documents, machine, numerics
from fastattn.bench.gpu.sections import SECTIONS
from fastattn.bench.gpu.worker import DEVICE_LOST
from fastattn.bench.report import write_atomically

SCHEMA = "fastattn-gpu-1"
FILE = "gpu.json"
#: Seconds kept back at the end for what is running to be ended and written.
RESERVE = 5.0
#: The document is written after every row, but not more often than this many seconds.
WRITE_EVERY = 0.25
#: A job that says nothing for this long hangs.
SILENCE = 240.0
#: How often a section's process is started again after a crash: each crash costs one row.
RESTARTS = 20

#: What runs a section, after the interpreter's name.
WORKER = ("-m", "fastattn.bench.gpu.worker")

#: Processes that share the work of the correctness section: compiling takes longer than running.
CORRECTNESS_WORKERS = 12


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastattn.bench.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=520.0, metavar="SECONDS", help="all in all (520)")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help=f"where {FILE} is written (.)")
    parser.add_argument("--only", metavar="SECTIONS", help=f"some of {','.join(SECTIONS)}, with commas")
    parser.add_argument(
        "--skip-done", action="store_true", help=f"leave out what the {FILE} in DIR has a row of, and add to it"
    )
    parser.add_argument(
        "--workers", type=int, default=CORRECTNESS_WORKERS, metavar="N",
        help=f"processes of the correctness section ({CORRECTNESS_WORKERS})",
    )  # fmt: skip
    parser.add_argument("--filter", default="", metavar="TEXT", help="only the rows whose names contain this")
    parser.add_argument("--sweep", metavar="OP[/KERNEL]", help="instead: time the options that kernels could have")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that everything runs")
    return parser


class Document:
    """Everything known so far, in one file that is always whole."""

    def __init__(self, path: Path, known: dict[str, Any] | None) -> None:
        self.path, self.written = path, 0.0
        self.content: dict[str, Any] = known or {
            "schema": SCHEMA,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": machine.commit(),
            "versions": machine.versions(),
            "machine": machine.hardware(),
            "device": None,
            "sections": {},
            "rows": [],
        }

    @property
    def done(self) -> set[str]:
        return {row["name"] for row in self.content["rows"]}

    def add(self, row: dict[str, Any]) -> None:
        """Thousands of small rows are not written one by one."""
        self.content["rows"].append(row)
        if time.monotonic() - self.written > WRITE_EVERY:
            self.write()

    def write(self) -> None:
        write_atomically(self.path, json.dumps(self.content, indent=1) + "\n")
        self.written = time.monotonic()


def read(path: Path) -> dict[str, Any]:
    """A document that an earlier run wrote; ValueError for anything else."""
    try:
        return documents.read(path, SCHEMA)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be continued: {error}") from error


class _Worker:
    """A process that runs one share of a section; it reports in lines of JSON."""

    def __init__(self, section: str, shard: tuple[int, int], options: argparse.Namespace, done: Path) -> None:
        command = [
            sys.executable, *WORKER, section,
            "--shard", f"{shard[0]}/{shard[1]}", "--done", str(done), "--filter", options.filter,
            *(["--tiny"] if options.tiny else []), *(["--sweep", options.sweep] if options.sweep else []),
        ]  # fmt: skip
        self.shard, self.heard = shard, time.monotonic()
        self.current: str | None = None
        self.rest = b""
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.pipe = self.process.stdout

    def lines(self) -> list[str] | None:
        """What it has said since; None when it has ended."""
        self.heard = time.monotonic()
        data = os.read(self.pipe.fileno(), 1 << 16)
        if not data:
            return None
        *whole, self.rest = (self.rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in whole]


class _Section:
    """One section while it runs."""

    def __init__(self, name: str, document: Document, options: argparse.Namespace, deadline: float) -> None:
        self.name, self.document, self.options, self.deadline = name, document, options, deadline
        self.done = document.path.with_suffix(".done")
        self.selector = selectors.DefaultSelector()
        self.crashes = 0

    def run(self) -> str:
        """done, cut off (by the budget) or failed (it crashed too often)."""
        shards = self.options.workers if self.name == "correctness" else 1
        for i in range(shards):
            self._start((i, shards))
        state = "done"
        while self.selector.get_map():
            for key, _ in self.selector.select(timeout=0.5):
                state = self._hear(key.data) or state
            now = time.monotonic()
            for key in list(self.selector.get_map().values()):
                worker: _Worker = key.data
                if now > self.deadline:
                    self._end(worker)
                    state = "cut off"
                elif now - worker.heard > SILENCE:
                    worker.process.kill()  # seen as a crash when its pipe ends
        return state

    def _start(self, shard: tuple[int, int]) -> None:
        self.done.write_text("\n".join(sorted(self.document.done)))
        worker = _Worker(self.name, shard, self.options, self.done)
        self.selector.register(worker.pipe, selectors.EVENT_READ, worker)

    def _end(self, worker: _Worker) -> int:
        self.selector.unregister(worker.pipe)
        worker.process.kill()
        code = worker.process.wait()
        worker.pipe.close()
        return code

    def _hear(self, worker: _Worker) -> str | None:
        """Takes what a worker says; the section's state when it is lost."""
        lines = worker.lines()
        if lines is not None:
            for line in lines:
                self._take(worker, line)
            return None
        code = worker.process.wait()
        self._end(worker)
        if code == 0:
            return None
        if code != DEVICE_LOST:  # otherwise its row has been written
            lost = worker.current or f"{self.name} {worker.shard[0]}/{worker.shard[1]} at its start"
            self.document.add({"name": lost, "section": self.name, "error": f"its process ended with code {code}"})
            print(f"{lost}: FAILED: its process ended with code {code}", flush=True)
            if worker.current is None:
                return "failed"
        self.crashes += 1
        if self.crashes > RESTARTS or time.monotonic() > self.deadline:
            return "failed"
        self._start(worker.shard)
        return None

    def _take(self, worker: _Worker, line: str) -> None:
        try:
            message = json.loads(line)
        except json.JSONDecodeError:
            print(line, flush=True)  # something that a library wrote
            return
        if "start" in message:
            worker.current = message["start"]
        elif "device" in message:
            self.document.content["device"] = message["device"]
            self.document.write()
        else:
            worker.current = None
            self.document.add({**message, "section": self.name})
            print(f"{message['name']}: {message.get('text', '')}", flush=True)


def _selected(options: argparse.Namespace) -> list[str]:
    if options.sweep:
        return ["sweep"]
    names = list(SECTIONS) if options.only is None else options.only.split(",")
    for name in names:
        if name not in SECTIONS:
            raise ValueError(f"--only {name}: there are {', '.join(SECTIONS)}")
    return names


def mean_ratios(document: dict[str, Any]) -> dict[tuple[str, str], float]:
    """(suite, dtype) -> geometric mean over its cases of our error over torch's."""
    logarithms: dict[tuple[str, str], list[float]] = {}
    for row in document["rows"]:
        if row.get("mean_ratio"):
            logarithms.setdefault((row["suite"], row["dtype"]), []).append(math.log(row["mean_ratio"]))
    return {key: math.exp(sum(values) / len(values)) for key, values in logarithms.items()}


def failures(document: dict[str, Any]) -> list[str]:
    """What is not as it must be, a line each: rows with errors or violations, sections that failed."""
    found = [
        f"{row['name']}: {row.get('error') or '; '.join(row['violations'])}"
        for row in document["rows"]
        if row.get("error") or row.get("violations")
    ]
    found += [
        f"{suite} {dtype}: errors are {mean:.2f} times torch's in the mean, more than {numerics.GEOMETRIC_MEAN}"
        for (suite, dtype), mean in mean_ratios(document).items()
        if mean > numerics.GEOMETRIC_MEAN
    ]
    found += [f"section {name}: {s['state']}" for name, s in document["sections"].items() if s["state"] == "failed"]
    return found


def main(arguments: Sequence[str]) -> int:
    """0: every result was right; 1: some were not; 2: it cannot be done, one line says why."""
    options = parser().parse_args(arguments)
    try:
        sections = _selected(options)
        if not options.out.is_dir():
            raise ValueError(f"--out {options.out}: a folder that exists is needed")
        path = options.out / FILE
        document = Document(path, read(path) if options.skip_done and path.exists() else None)
    except ValueError as error:
        print(f"fastattn.bench.gpu: {error}", file=sys.stderr)
        return 2
    began = time.monotonic()
    deadline = began + options.budget - RESERVE
    document.write()
    for name in sections:
        if time.monotonic() > deadline:
            document.content["sections"][name] = {"state": "cut off", "seconds": 0.0}
            continue
        start = time.monotonic()
        state = _Section(name, document, options, deadline).run()
        document.content["sections"][name] = {"state": state, "seconds": round(time.monotonic() - start, 1)}
        document.write()
        print(f"section {name}: {state} after {time.monotonic() - start:.0f} s", flush=True)
    document.write()
    path.with_suffix(".done").unlink(missing_ok=True)
    wrong = failures(document.content)
    print("\n".join(["", *wrong, f"{len(document.content['rows'])} rows, {len(wrong)} wrong; {path}"]), flush=True)
    return 1 if wrong else 0
