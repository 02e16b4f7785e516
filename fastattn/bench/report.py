"""What people read while it runs, and the one JSON document at the end.

Schema of the document: docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastattn import backends, ceilings, machine
from fastattn.bench import measure
from fastattn.bench.contenders import OURS
from fastattn.bench.runner import Entry, Row, Settings, geometric_mean
from fastattn.numerics import Error

SCHEMA = "fastattn-bench-1"
MIB = 2**20
#: Below this share of its threads' cores a wall time tells of the neighbours, too.
QUIET = 0.9


def header(op: str, settings: Settings) -> str:
    """What is measured, on what, against which ceilings."""
    hardware, versions, commit = machine.hardware(), machine.versions(), machine.commit()
    clock = measure.clock_for(settings.threads)[0].replace("_", " ")
    threads = f"{settings.threads} thread" + ("s" if settings.threads > 1 else "")
    lines = [
        f"{op} on {hardware['cpu']}, {hardware['cores']} cores, load {hardware['load_average'][0]:.2f}; "
        f"{threads}, {clock} time; torch {versions['torch']}, fastattn {versions['fastattn']}"
        + (f" at {commit}" if commit else ""),
    ]
    ceiling = ceilings.summary(settings.threads)
    if ceiling is None:
        lines.append(f"no ceilings and no cpu backend: {backends.probe('cpu')}")
    else:
        dot = "" if ceiling["dot"] is None else f", bf16 dot {ceiling['dot'] / 1e9:.0f} GF/s"
        copy = ", ".join(f"{level} {rate / 1e9:.0f}" for level, rate in ceiling["copy"].items())
        lines.append(
            f"ceilings of {ceiling['isa']}: fp32 multiply-add {ceiling['fma'] / 1e9:.0f} GF/s{dot}; copy {copy} GB/s"
        )
        validity = ceilings.validity(settings.threads)
        assert validity is not None
        lines.append(validity.remark)
    return "\n".join(lines)


def block(row: Row, settings: Settings) -> str:
    """A row as a small table, one line for each contender."""
    case = row.case
    bound = "" if row.roof is None else f", bound by {row.roof.bound} at {_speed(row, row.roof.seconds)}"
    lines = [
        "",
        f"{case.suite.name} {case.workload.name} {case.dtype_name} {row.direction} "
        f"(backend {row.backend}{bound}, {row.allocator} allocator)",
    ]
    if row.violations:
        lines += [f"  FAILED {violation}" for violation in row.violations]
        return "\n".join(lines)
    lines.append(
        f"  {'':10}{'median ms':>11}{'p20':>10}{'p80':>10}{'n':>6}{'x ours':>8}{'ceiling':>9}{'faults':>8}"
        f"{'extra MiB':>11}  error"
    )
    lines += [f"  {name:10}" + _line(row, name, entry) for name, entry in row.entries.items()]
    if row.roof is not None:
        speeds = [f"{name} {_speed(row, e.times.median)}" for name, e in row.entries.items() if e.times is not None]
        lines.append(f"  {', '.join(speeds)}")
    if row.speedup is not None:
        lines.append(
            f"  {'ahead of' if row.ahead else 'behind'} {row.best_peer}: {row.speedup:.2f} x{_busy(row, settings)}"
        )
    shown = [(name, row.scaling(name)) for name in row.alone]
    if shown:
        factors = ", ".join(f"{name} {factor:.2f} x" for name, factor in shown if factor is not None)
        lines.append(f"  {settings.threads} threads over one: {factors}{_busy(row, settings)}")
    return "\n".join(lines)


def _speed(row: Row, seconds: float) -> str:
    """Of a row's work, in the unit of what bounds it."""
    assert row.roof is not None
    compute = row.roof.bound == "compute"
    return f"{(row.roof.flops if compute else row.roof.bytes) / seconds / 1e9:.3g} {'GF' if compute else 'GB'}/s"


def _busy(row: Row, settings: Settings) -> str:
    times = row.entries[OURS].times
    if times is None or times.cores_busy >= QUIET * settings.threads:
        return ""
    return f" (busy machine: our calls had {times.cores_busy:.2f} of {settings.threads} cores)"


def _line(row: Row, name: str, entry: Entry) -> str:
    times, ours = entry.times, row.entries[OURS].times
    if times is None or ours is None:
        return f" {entry.unavailable}"
    share = row.share(name)
    low, high = (measure.quantile(times.seconds, q) for q in (0.2, 0.8))
    return (
        f"{1e3 * times.median:11.3f}{1e3 * low:10.3f}{1e3 * high:10.3f}{len(times.seconds):6}"
        f"{times.median / ours.median:8.2f}"
        + (f"{'-':>9}" if share is None else f"{100 * share:8.1f}%")
        + f"{times.faults / len(times.seconds):8.0f}"
        + (f"{'-':>11}" if entry.memory is None else f"{entry.memory / MIB:11.1f}")
        + f"  {_errors(entry.errors)}"
    )


def _errors(errors: dict[str, Error]) -> str:
    """Norm errors: of the outputs, and the largest one of the gradients."""
    gradients = [error.norm for name, error in errors.items() if name.startswith("grad_")]
    outputs = [error.norm for name, error in errors.items() if not name.startswith("grad_")]
    text = f"{max(outputs, default=0.0):.1e}"
    return f"{text}, gradients {max(gradients):.1e}" if gradients else text


def summary(rows: Sequence[Any]) -> dict[str, Any]:
    """How many rows are ahead, by how much at least and on average, and where the gate was red.

    rows: of runner.py or models.py.
    """
    timed = [(row, row.speedup) for row in rows if row.speedup is not None]
    behind = [row.name for row, _ in timed if not row.ahead]
    busy = [times.cores_busy for row in rows if (times := row.entries[OURS].times) is not None]
    return {
        "rows": len(rows),
        "failed": [row.name for row in rows if row.violations],
        "ahead": len(timed) - len(behind),
        "behind": behind,
        "least_speedup": min((s for _, s in timed), default=None),
        "mean_speedup": geometric_mean([s for _, s in timed]) if timed else None,
        "cores_busy": sum(busy) / len(busy) if busy else None,
    }


def closing(rows: Sequence[Any], settings: Settings) -> str:
    """The summary in words."""
    found = summary(rows)
    lines = [""]
    if found["least_speedup"] is not None:
        timed = found["ahead"] + len(found["behind"])
        lines.append(
            f"ahead of the best peer in {found['ahead']} of {timed} rows: {found['least_speedup']:.2f} x at least, "
            f"{found['mean_speedup']:.2f} x in the geometric mean"
        )
        lines += [f"  behind: {name}" for name in found["behind"]]
    lines.append(
        f"accuracy: {len(rows) - len(found['failed'])} of {len(rows)} rows within the law"
        + "".join(f"\n  FAILED: {name}" for name in found["failed"])
    )
    if found["cores_busy"] is not None and settings.threads > 1 and found["cores_busy"] < QUIET * settings.threads:
        lines.append(
            f"the machine was busy: our calls had {found['cores_busy']:.2f} of {settings.threads} cores, so these wall "
            "times are the neighbours' as well; --threads 1 counts one thread's CPU time instead"
        )
    return "\n".join(lines)


def document(op: str, rows: Sequence[Any], settings: Settings, as_json: Callable[[Any], Any]) -> dict[str, Any]:
    """Everything, for machines. as_json: of one row."""
    return {
        "schema": SCHEMA,
        "op": op,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "machine": {**machine.hardware(), "threads": settings.threads},
        "allocator": machine.allocator(),
        "environment": machine.environment(),
        "clock": measure.clock_for(settings.threads)[0],
        "ceilings": ceilings.summary(settings.threads),
        "validity": None if (validity := ceilings.validity(settings.threads)) is None else asdict(validity),
        "summary": summary(rows),
        "rows": [as_json(row) for row in rows],
    }


def as_json(row: Row) -> dict[str, Any]:
    """A row of the document."""
    return {
        "op": row.case.suite.name,
        "workload": row.case.workload.name,
        "dtype": row.case.dtype_name,
        "direction": row.direction,
        "allocator": row.allocator,
        "backend": row.backend,
        "violations": list(row.violations),
        "roof": None if row.roof is None else asdict(row.roof),
        "best_peer": row.best_peer,
        "speedup": row.speedup,
        "ahead": row.ahead,
        "contenders": {name: _entry(row, name, entry) for name, entry in row.entries.items()},
    }


def _entry(row: Row, name: str, entry: Entry) -> dict[str, Any]:
    if entry.unavailable is not None:
        return {"unavailable": entry.unavailable}
    found: dict[str, Any] = {
        "errors": {result: {"norm": e.norm, "largest": e.largest} for result, e in entry.errors.items()}
    }
    if entry.times is not None:
        found |= {**entry.times.summary(), "ceiling_share": row.share(name), "extra_bytes": entry.memory}
        if name in row.alone:
            found |= {"one_thread_s": row.alone[name].median, "scaling": row.scaling(name)}
    return found


def rounded(value: Any) -> Any:
    """The document with floats to six digits; what is not a number becomes null, so that every parser reads it."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if value - value == 0 else None
    return value


def file_name(what: str, threads: int) -> str:
    """As in benchmarks/results: processor, what was run, threads, date."""
    vendor, family, model = machine.cpu_identity()
    design = machine.cpu_design(vendor, family, model)
    numbers = f"{vendor} {family}.{model}" if vendor else ""
    words = f"{machine.cpu_name()} {design.replace(' ', '') if design else numbers}"
    cpu = "-".join("".join(c if c.isalnum() or c == "." else " " for c in words.lower()).split())
    date = datetime.now(timezone.utc).date().isoformat()
    return f"{cpu}-{what.replace('_', '-')}-{threads}-thread{'s' if threads > 1 else ''}-{date}.json"


def write_atomically(path: Path, text: str) -> None:
    """Readers see the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def to_json(found: dict[str, Any]) -> str:
    """On one line."""
    return json.dumps(rounded(found), allow_nan=False)
