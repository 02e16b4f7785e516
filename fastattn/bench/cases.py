"""What is run: workloads of fastattn/ops/<op>/cases.py, or shapes that the user gives, in each dtype."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.cases import Suite, Workload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_DTYPES = ("fp32", "bf16")
LARGEST = 2**40


@dataclass(frozen=True)
class BenchCase:
    suite: Suite
    workload: Workload
    dtype_name: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]


@dataclass(frozen=True)
class Shape:
    """How --shape reads for an op, and the workloads that it stands for."""

    letters: str
    workloads: Callable[..., list[Workload]]


def _cases_of(op: str) -> Any:
    # By name: fastattn.ops.softmax, the attribute, is the function.
    return importlib.import_module(f"fastattn.ops.{'softmax' if op == 'log_softmax' else op}.cases")


def suite_of(op: str) -> Suite:
    return next(suite for suite in _cases_of(op).SUITES if suite.name == op)


def shape_of(op: str) -> Shape:
    workload = _cases_of(op).workload
    if op == "attention":
        return Shape("B,H,S,D", lambda *sizes: [workload(*sizes, causal=causal) for causal in (True, False)])
    return Shape("ROWS,COLUMNS", lambda *sizes: [workload(*sizes)])


def parse_shape(op: str, text: str) -> list[Workload]:
    """The workloads of one --shape; ValueError when it does not read as the op's shape."""
    shape = shape_of(op)
    fields = text.split(",")
    if len(fields) != len(shape.letters.split(",")) or not all(f.strip().isdecimal() for f in fields):
        raise ValueError(f"--shape of {op} is {shape.letters} in whole numbers, got {text!r}")
    sizes = [int(f) for f in fields]
    if min(sizes) < 1 or math.prod(sizes) > LARGEST:
        raise ValueError(f"--shape {text}: sizes are 1 or more and their product at most 2**40")
    return shape.workloads(*sizes)


def select(op: str, *, quick: bool, shapes: Sequence[str], dtypes: Sequence[str] | None) -> list[BenchCase]:
    """All workloads of an op, or its quick ones, or the given shapes; ValueError for what cannot be read.

    dtypes: names of DTYPES; fp32 and bf16 by default.
    """
    for name in dtypes or ():
        if name not in DTYPES:
            raise ValueError(f"--dtype {name}: there are {', '.join(DTYPES)}")
    suite = suite_of(op)
    if shapes:
        workloads = [workload for text in shapes for workload in parse_shape(op, text)]
    else:
        workloads = [workload for workload in suite.workloads if workload.quick or not quick]
    return [BenchCase(suite, workload, name) for workload in workloads for name in dtypes or DEFAULT_DTYPES]
