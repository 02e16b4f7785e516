"""pytest-benchmark over the workloads of fastattn/ops/<op>/cases.py: what every bench_<op>.py is made of.

    python -m pytest benchmarks/bench_attention.py --benchmark-enable --benchmark-group-by=group -k "1024 and bf16"

Results outside the accuracy law fail their test before anything is timed. pytest-benchmark runs one contender after the
other: for ratios use `fastattn bench`, which runs them in turn.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads must not spin

import pytest
import torch

from fastattn.bench import cases, contenders
from fastattn.bench.gate import verdict
from fastattn.bench.trial import BOTH, DIRECTIONS, Trial

DTYPES = ("fp32", "bf16")


def pytest_generate_tests(metafunc):
    """A file's OP makes its parameters: contender, direction, workload, dtype."""
    if "bench_case" not in metafunc.fixturenames:
        return
    op = metafunc.module.OP
    selected = cases.select(op, quick=False, shapes=(), dtypes=DTYPES)
    names = [f"{case.workload.name}-{case.dtype_name}" for case in selected]
    metafunc.parametrize("bench_case", selected, ids=names, scope="module")
    metafunc.parametrize("direction", DIRECTIONS, scope="module")
    metafunc.parametrize("contender", contenders.names(cases.suite_of(op), None), scope="module")


@pytest.fixture(scope="module")
def trial(bench_case):
    """The tensors of a case, shared by all contenders."""
    return Trial(bench_case.suite, bench_case.workload, bench_case.dtype)


@pytest.fixture
def call(benchmark, bench_case, trial, contender, direction):
    """What is timed; ours has been through the gate."""
    torch._dynamo.reset()
    makers = contenders.choices(bench_case.suite)
    timed = trial.call(makers[contender](), direction)
    if contender == contenders.OURS:
        truth, part = trial.truth()
        if direction != BOTH:
            truth = {name: t for name, t in truth.items() if not name.startswith("grad_")}
        results = {contender: timed(), contenders.TORCH: trial.call(makers[contenders.TORCH](), direction)()}
        assert verdict(results, truth, part, bench_case.dtype).violations == ()
    benchmark.group = f"{bench_case.workload.name} {bench_case.dtype_name} {direction}"
    workload, backward = bench_case.workload, direction == BOTH
    benchmark.extra_info["flops"] = workload.flops() + (workload.flops(backward=True) if backward else 0)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    return timed
