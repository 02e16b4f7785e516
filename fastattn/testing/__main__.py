"""python -m fastattn.testing: the conformance suites on one backend and the instruction set in use.

The last line is JSON: {"backend", "isa", "checked", "skipped", "failures", "ratios"}.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from fastattn import backends
from fastattn.cases import Case, Suite
from fastattn.dispatch import explain
from fastattn.numerics import GEOMETRIC_MEAN
from fastattn.testing.conformance import Report, examine, geometric_mean_ratio, suites
from fastattn.testing.memory import poisoned_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def run(suite: Suite, cases: list[Case], backend: str, dtype: torch.dtype) -> tuple[dict[str, Report], dict[str, str]]:
    """(reports by case, the backend's reasons against the other cases)."""
    reports, skipped = {}, {}
    for case in cases:
        reason = explain(suite.function, **suite.arguments(case, "cpu", dtype), backend=backend).reasons[backend]
        if reason is not None:
            skipped[case.name] = reason
            continue
        reports[case.name] = examine(
            lambda **kwargs: suite.function(**kwargs, backend=backend), suite, case, dtype=dtype
        )
    return reports, skipped


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastattn.testing", description=__doc__)
    parser.add_argument("--backend", default="cpu", choices=list(backends.BACKENDS))
    parser.add_argument("--suite", action="append", choices=list(suites()), help="only this one (repeatable)")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="only this one (repeatable)")
    parser.add_argument("--core", action="store_true", help="only the cases marked as core")
    options = parser.parse_args()
    checked = 0
    skipped: dict[str, str] = {}
    failures: list[str] = []
    ratios: dict[str, float] = {}
    with poisoned_memory():
        for name in options.suite or list(suites()):
            suite = suites()[name]
            cases = [case for case in suite.cases if case.core or not options.core]
            for dtype in options.dtype or ["float32", "bfloat16", "float16"]:
                reports, reasons = run(suite, cases, options.backend, DTYPES[dtype])
                checked += len(reports)
                skipped |= {f"{name} {dtype} {case}": reason for case, reason in reasons.items()}
                failures += [
                    f"{name} {dtype} {case}: {wrong}" for case, report in reports.items() for wrong in report.violations
                ]
                ratios[f"{name} {dtype}"] = round(geometric_mean_ratio(reports.values(), DTYPES[dtype]), 3)
                print(f"{name:16}{dtype:10}{len(reports):5} cases, {ratios[f'{name} {dtype}']:.3f} x torch's error")
    if not options.core:
        failures += [
            f"{which}: geometric mean {ratio} > {GEOMETRIC_MEAN}"
            for which, ratio in ratios.items()
            if ratio > GEOMETRIC_MEAN and "float64" not in which
        ]
    isa = backends.cpu_isa() if options.backend == "cpu" else None
    summary = {"backend": options.backend, "isa": isa, "checked": checked, "skipped": skipped}
    print(json.dumps({**summary, "failures": failures, "ratios": ratios}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
