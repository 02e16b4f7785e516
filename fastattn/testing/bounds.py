"""python -m fastattn.testing.bounds: every case through the cpu kernels, inputs and outputs against inaccessible pages.

A kernel that reads or writes one element outside of its tensors ends the process; the last line printed names the
case. Results must have the bits that they have in ordinary memory, whatever the alignment.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

from fastattn import backends
from fastattn.cases import Case, Suite
from fastattn.dispatch import OPS
from fastattn.testing.conformance import same_bits, suites
from fastattn.testing.memory import GuardedOutputs, guarded
from fastattn.testing.opcheck import raw_forward, recorded_calls

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def run(suite: Suite, case: Case, dtype: torch.dtype) -> int:
    """Runs a case's forward and backward kernels fenced in; the number of outputs that were. AssertionError where
    alignment changes bits."""
    fenced = 0
    for op, args in recorded_calls(suite, case, "cpu", dtype):
        kernel = raw_forward(op) if op._schema.name.removeprefix("fastattn::") in OPS else op
        plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        expected = _tensors(kernel(*plain))
        for at_end in (True, False):
            mode = GuardedOutputs(at_end=at_end)
            inputs = tuple(guarded(a, at_end=at_end) if isinstance(a, Tensor) else a for a in plain)
            found = _tensors(mode.run(kernel, *inputs))
            fenced += mode.served
            for index, (a, b) in enumerate(zip(found, expected, strict=True)):
                assert same_bits(a, b), f"{kernel}: output {index} depends on where its memory is"
    return fenced


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastattn.testing.bounds", description=__doc__)
    parser.add_argument("--core", action="store_true", help="only the cases marked as core")
    options = parser.parse_args()
    print(f"isa {backends.cpu_isa()}", flush=True)
    fenced = 0
    for suite in suites().values():
        for case in suite.cases:
            if options.core and not case.core:
                continue
            for dtype in DTYPES:
                print(f"{suite.name}, case {case.name!r}, {dtype}", flush=True)
                fenced += run(suite, case, dtype)
    print(f"{fenced} outputs were fenced in")
    return 0


if __name__ == "__main__":
    sys.exit(main())
