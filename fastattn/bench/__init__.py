"""`fastattn bench`: the kernels beside torch's, right first and then fast.

cases (what is run) -> contenders (who runs) -> trial (the calls and the truth) -> gate (the accuracy law) ->
measure (times and memory) -> runner (rows) -> report (the table and the JSON); models: rows of whole models. See
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

ALL, TRAIN_STEP, TRANSFORMERS, BOTH_ALLOCATORS = "all", "train-step", "transformers", "both"
MODELS = (TRAIN_STEP, TRANSFORMERS)

QUICK_SECONDS, QUICK_SAMPLES = 0.25, 3
FULL_SECONDS, FULL_SAMPLES = 1.0, 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastattn bench`."""
    from fastattn.bench import cases, runner

    parser.add_argument(
        "op",
        choices=(*cases.suites(), ALL, *MODELS),
        help="what to time; all: every op; train-step: a GPT's whole step; transformers: models of Transformers",
    )
    parser.add_argument("--quick", action="store_true", help="a few workloads and short measurements")
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="SIZES",
        help="instead of the op's own workloads: BATCH,HEADS,LENGTH,DIM for attention, ROWS,COLUMNS for most others; "
        "repeatable",
    )
    parser.add_argument(
        "--workload",
        action="append",
        default=[],
        metavar="TEXT",
        help="only the workloads whose name contains this; repeatable",
    )
    parser.add_argument("--dtype", metavar="NAMES", help="fp32, bf16, fp16; several with commas (fp32,bf16)")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads (as many as torch would take)")
    parser.add_argument(
        "--scaling", action="store_true", help="ours and torch's also on one thread: how much N threads gain"
    )
    parser.add_argument(
        "--contenders",
        metavar="NAMES",
        help="with commas: eager (attention), compile, flex (attention, forward only); fastattn and torch always run",
    )
    parser.add_argument(
        "--min-time",
        type=float,
        metavar="SECONDS",
        help=f"time spent on every contender of every row, at least ({FULL_SECONDS}; quick: {QUICK_SECONDS})",
    )
    parser.add_argument(
        "--allocator",
        choices=(runner.TUNED, runner.DEFAULT, BOTH_ALLOCATORS),
        help="tuned: with fastattn.tune_allocator(); default: as the system has it; both: every row twice "
        "(both, but tuned with --quick, --shape, --workload)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="also write the JSON document to this file, or into this folder"
    )


def run(args: argparse.Namespace) -> int:
    """Prints tables as they are measured and the JSON document as the last line.

    Returns 0 when every result was within the accuracy law, else 1. ValueError for options that cannot be served.
    """
    import torch

    from fastattn import allocator
    from fastattn.bench import report, runner

    threads = torch.get_num_threads() if args.threads is None else args.threads
    if not 1 <= threads <= 1024:
        raise ValueError(f"--threads must be 1 to 1024, got {threads}")
    seconds = args.min_time if args.min_time is not None else QUICK_SECONDS if args.quick else FULL_SECONDS
    if not 0 <= seconds < math.inf:
        raise ValueError(f"--min-time must be a number of seconds, 0 or more, got {seconds}")
    if args.out is not None and not args.out.is_dir() and not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: a folder that exists, or a file in one, is needed")
    wanted = None if args.contenders is None else tuple(args.contenders.split(","))
    settings = runner.Settings(threads, seconds, QUICK_SAMPLES if args.quick else FULL_SAMPLES, wanted, args.scaling)
    if args.scaling and (threads == 1 or args.op in MODELS):
        raise ValueError("--scaling compares several threads with one, for ops: --threads 2 or more")
    allocators = _allocators(args)
    rows_of, block, as_json = _models(args, settings) if args.op in MODELS else _ops(args, settings, wanted)
    print(report.header(args.op, settings), flush=True)
    rows = []
    for wanted_allocator in allocators:
        if wanted_allocator == runner.TUNED:
            print(f"allocator: {allocator.tune_allocator()}", flush=True)
        for row in rows_of():
            rows.append(row)
            print(block(row), flush=True)
    print(report.closing(rows, settings), flush=True)
    text = report.to_json(report.document(args.op, rows, settings, as_json))
    if args.out is not None:
        out = args.out / report.file_name(args.op, threads) if args.out.is_dir() else args.out
        report.write_atomically(out, text + "\n")
    print(text)
    return 1 if any(row.violations for row in rows) else 0


def _ops(args: argparse.Namespace, settings: Any, wanted: tuple[str, ...] | None) -> Any:
    """(what yields rows, how a row is printed, how it is written) for an op, or for all."""
    from fastattn.bench import cases, contenders, report, runner

    if args.op == ALL and (args.shape or args.workload):
        raise ValueError("--shape and --workload are for one op")
    dtypes = args.dtype.split(",") if args.dtype else None
    selected = []
    for op in cases.suites() if args.op == ALL else (args.op,):
        contenders.names(cases.suite_of(op), wanted)
        selected += cases.select(op, quick=args.quick, shapes=args.shape, names=args.workload, dtypes=dtypes)
    for case in selected:
        runner.check_memory(case)
    return (
        lambda: runner.run_cases(selected, settings),
        lambda row: report.block(row, settings),
        report.as_json,
    )


def _models(args: argparse.Namespace, settings: Any) -> Any:
    """The same for whole models."""
    from fastattn.bench import models, train_step, transformers

    if args.shape or args.contenders:
        raise ValueError(f"--shape and --contenders are not for {args.op}; --workload chooses a model")
    section: Any = {TRAIN_STEP: train_step, TRANSFORMERS: transformers}[args.op]
    dtypes = args.dtype.split(",") if args.dtype else None
    selected = models.select(args.op, section.WORKLOADS, quick=args.quick, names=args.workload, dtypes=dtypes)
    return lambda: models.run(args.op, selected, settings, section.prepare), models.block, section.as_json


def _allocators(args: argparse.Namespace) -> tuple[str, ...]:
    """In the order in which they can be measured: malloc can be tuned, and not be untuned again."""
    from fastattn import allocator
    from fastattn.bench.runner import DEFAULT, TUNED

    tuned = allocator.is_tuned()
    chosen = args.allocator or (TUNED if args.quick or args.shape or args.workload or tuned else BOTH_ALLOCATORS)
    if tuned and chosen != TUNED:
        raise ValueError(f"--allocator {chosen}: this process's allocator is tuned already")
    return (DEFAULT, TUNED) if chosen == BOTH_ALLOCATORS else (chosen,)
