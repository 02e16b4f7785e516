"""Tile sizes, warps and stages: looked up, never searched for inside a call.

Every op's room holds `tuning.json`:

    {"<kernel>": {"<target>": [{"dtype": "bfloat16", "dim": 128, "kind": "causal", "size": 4096, "options": {...}}]}}

A kernel's entry is the one of its dtype and kind (an entry without them fits all) whose `dim` is the nearest from
above and whose `size` is the nearest by ratio. A target without a table has that of the nearest older one of its
vendor. What `fastattn tune` measured on this machine (measured.py) comes first where it is for a size as near.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastattn.gpu import measured
from fastattn.gpu.devices import Target

OPS = Path(__file__).parents[1] / "ops"
Options = Mapping[str, int]


@functools.cache
def table(op: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The committed table of an op: kernel -> target -> entries."""
    document: dict[str, dict[str, list[dict[str, Any]]]] = json.loads((OPS / op / "tuning.json").read_text())
    return document


def _relative(name: str, known: Mapping[str, Any]) -> str:
    """The target whose entries serve `name`: itself, the nearest older one of its vendor, or else the oldest."""
    if name in known:
        return name
    family = "gfx" if name.startswith("gfx") else "sm_"
    members = sorted((_generation(other), other) for other in known if other.startswith(family))
    if not members:
        return next(iter(known))
    older = [other for generation, other in members if generation <= _generation(name)]
    return older[-1] if older else members[0][1]


def _generation(name: str) -> int:
    """A number that grows from one generation to the next; 0 for what is no GPU."""
    digits = name.removeprefix("sm_").removeprefix("gfx")
    try:
        return int(digits, 16)
    except ValueError:
        return 0


@functools.lru_cache(maxsize=65536)
def options(
    op: str, kernel: str, target: Target, dtype: torch.dtype | None = None, dim: int = 0, kind: str = "", size: int = 1
) -> Options:
    """What to launch a kernel with.

    dim: what a tile has to hold at least (a head dim, the columns of a row), 0 where nothing depends on it. kind: a
    class of problems ("causal"). size: what the work grows with (a length, a number of rows).
    """
    if target.forced and (op, kernel) in target.forced:
        return target.forced[op, kernel]
    known = table(op)[kernel]
    entries = known[_relative(target.name, known)]
    name = str(dtype).removeprefix("torch.")
    fitting = [e for e in entries if e.get("dtype", name) == name and e.get("kind", kind) == kind]
    if not fitting:
        raise LookupError(f"{op}/tuning.json has no entry of {kernel} on {target.name} for {name} {kind!r}")
    dims = sorted({e.get("dim", 0) for e in fitting})
    wanted = next((d for d in dims if d >= dim), dims[-1])
    fitting = [e for e in fitting if e.get("dim", 0) == wanted]
    if target.device:
        fitting = _measured(target.device, op, kernel, name, wanted, kind, fitting[0]["options"].keys()) + fitting
    best = min(fitting, key=lambda e: abs(math.log(e.get("size", 1) / max(size, 1))))
    chosen: Options = best["options"]
    return chosen


@functools.lru_cache(maxsize=65536)
def row_kernel(op: str, whole: str, parts: str, target: Target, columns: int) -> tuple[str, int, Options]:
    """(kernel, rows that a program takes, options): `whole` has rows of so many columns in registers, as many at a time
    as its entry says; `parts` takes a longer one tile after tile."""
    chosen = options(op, whole, target, dim=columns)
    if chosen["COLUMNS"] >= columns:
        return whole, chosen["ROWS"], chosen
    return parts, 1, options(op, parts, target)


def power_of_two(n: int) -> int:
    """The least one that is n or more: what a side of a tile can be."""
    return 1 << max(n - 1, 0).bit_length()


def _measured(
    device: str, op: str, kernel: str, dtype: str, dim: int, kind: str, constants: Collection[str]
) -> list[dict[str, Any]]:
    """Entries of this machine for the same tiles' dim; those made for another release's kernel do not count."""
    return [
        entry
        for entry in measured.entries(device, op, kernel)
        if (entry["dtype"] or dtype, entry["dim"], entry["kind"]) == (dtype, dim, kind)
        and entry["options"].keys() == constants
    ]


@dataclass(frozen=True)
class LookUp:
    """What was asked for, and what was found."""

    op: str
    kernel: str
    target: Target
    dtype: torch.dtype | None
    dim: int
    kind: str
    size: int
    options: Options

    @property
    def tile_dim(self) -> int:
        """The dim of the entries that serve it."""
        known = table(self.op)[self.kernel]
        dims = sorted({entry.get("dim", 0) for entry in known[_relative(self.target.name, known)]})
        return next((dim for dim in dims if dim >= self.dim), dims[-1])


@contextlib.contextmanager
def watched() -> Iterator[list[LookUp]]:
    """Within the block every look-up is put on the list; for those that ops have cached, assume a new target."""
    global options
    found: list[LookUp] = []
    look_up = options

    def watching(
        op: str, kernel: str, target: Target, dtype: torch.dtype | None = None, dim: int = 0, kind: str = "",
        size: int = 1,
    ) -> Options:  # fmt: skip
        chosen = look_up(op, kernel, target, dtype, dim, kind, size)
        found.append(LookUp(op, kernel, target, dtype, dim, kind, size, chosen))
        return chosen

    options = watching  # type: ignore[assignment]
    try:
        yield found
    finally:
        options = look_up


def forget() -> None:
    """Tables and measurements are read again when they are next asked for."""
    options.cache_clear()
    row_kernel.cache_clear()
    table.cache_clear()
    measured.forget()
