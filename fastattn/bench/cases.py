"""What is run: workloads of fastattn/ops/*/cases.py, or shapes that the user gives, in each dtype."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

import fastattn.ops
from fastattn import testing
from fastattn.cases import Suite, Workload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_DTYPES = ("fp32", "bf16")
LARGEST = 2**40


class Selectable(Protocol):
    """What --workload and --quick ask for. quick: part of --quick."""

    @property
    def name(self) -> str: ...
    @property
    def quick(self) -> bool: ...


S = TypeVar("S", bound=Selectable)


@dataclass(frozen=True)
class BenchCase:
    suite: Suite
    workload: Workload
    dtype_name: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]


@functools.cache
def suites() -> dict[str, Suite]:
    """Every suite of fastattn/ops/*/cases.py that has workloads, by name: an op is in the bench by existing."""
    return {name: suite for name, suite in testing.suites().items() if suite.workloads}


def suite_of(op: str) -> Suite:
    return suites()[op]


@dataclass(frozen=True)
class Shape:
    """How --shape reads for an op, and the workloads that it stands for."""

    names: tuple[str, ...]
    workloads: Callable[..., list[Workload]]

    def __str__(self) -> str:
        return ",".join(self.names)


def shape_of(op: str) -> Shape | None:
    """From <op>_workload() or workload() in the op's cases.py: its positional parameters are the sizes, and with a
    parameter `causal` a shape stands for two workloads. None where there is neither."""
    for path in pkgutil.iter_modules(fastattn.ops.__path__):
        module = importlib.import_module(f"fastattn.ops.{path.name}.cases")
        if any(suite.name == op for suite in module.SUITES):
            break
    make = getattr(module, f"{op}_workload", getattr(module, "workload", None))
    if make is None:
        return None
    parameters = inspect.signature(make).parameters
    names = tuple(name.upper() for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)
    if "causal" in parameters:
        return Shape(names, lambda *sizes: [make(*sizes, causal=causal) for causal in (True, False)])
    return Shape(names, lambda *sizes: [make(*sizes)])


def parse_shape(op: str, text: str) -> list[Workload]:
    """The workloads of one --shape; ValueError when it does not read as the op's shape."""
    shape = shape_of(op)
    if shape is None:
        raise ValueError(f"--shape: {op} has workloads of its own only")
    fields = text.split(",")
    if len(fields) != len(shape.names) or not all(f.strip().isdecimal() for f in fields):
        raise ValueError(f"--shape of {op} is {shape} in whole numbers, got {text!r}")
    sizes = [int(f) for f in fields]
    if min(sizes) < 1 or math.prod(sizes) > LARGEST:
        raise ValueError(f"--shape {text}: sizes are 1 or more and their product at most 2**40")
    return shape.workloads(*sizes)


def named(op: str, workloads: Sequence[S], quick: bool, names: Sequence[str]) -> list[S]:
    """Workloads whose names contain one of `names`, quick or not; without names all, or the quick ones; ValueError for
    names that there are not."""
    found = [w for w in workloads if (any(name in w.name for name in names) if names else w.quick or not quick)]
    if not found:
        raise ValueError(f"--workload: {op} has {', '.join(w.name for w in workloads)}")
    return found


def select(
    op: str, *, quick: bool, shapes: Sequence[str], dtypes: Sequence[str] | None, names: Sequence[str] = ()
) -> list[BenchCase]:
    """Workloads of an op (see `named`), or the given shapes, in dtypes by name, DEFAULT_DTYPES by default; ValueError
    for what cannot be read."""
    for name in dtypes or ():
        if name not in DTYPES:
            raise ValueError(f"--dtype {name}: there are {', '.join(DTYPES)}")
    suite = suite_of(op)
    if shapes:
        workloads = [workload for text in shapes for workload in parse_shape(op, text)]
    else:
        workloads = named(op, suite.workloads, quick, names)
    return [BenchCase(suite, workload, name) for workload in workloads for name in dtypes or DEFAULT_DTYPES]
