"""Threads: the same bits whatever their number, changed at any time, on a machine that has fewer cores than threads."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fastattn import testing

SUITES = testing.suites()
COUNTS = (1, 2, 3, 5)

PROBLEMS = []
for suite in SUITES.values():
    # The smallest workload is work enough for several threads; ops without workloads have their core cases.
    smallest = sorted(suite.workloads, key=lambda workload: workload.forward_elements)[:1]
    chosen = smallest or [case for case in suite.cases if case.core]
    PROBLEMS += [pytest.param(suite, one, id=f"{suite.name}-{one.name.replace(' ', '_')}") for one in chosen]


@pytest.fixture(autouse=True)
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(suite, problem, dtype, forward_threads, backward_threads):
    arguments = suite.arguments(problem, "cpu", dtype)

    def cotangents(name, output):
        torch.set_num_threads(backward_threads)
        return torch.full_like(output, 0.5)

    torch.set_num_threads(forward_threads)
    differentiated = suite.differentiated(problem, arguments)
    function = suite.function
    return testing.evaluate(
        lambda **call: function(**call, backend="cpu"), arguments, differentiated, suite.results, cotangents
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("suite", "problem"), PROBLEMS)
def test_bits_do_not_depend_on_threads(suite, problem, dtype, skip_without_native):
    """Forward and all gradients; the number may change between calls and between forward and backward."""
    expected = run(suite, problem, dtype, 1, 1)
    for forward_threads, backward_threads in [*zip(COUNTS[1:], COUNTS[1:], strict=True), (5, 1), (1, 2), (2, 3)]:
        found = run(suite, problem, dtype, forward_threads, backward_threads)
        assert found.keys() == expected.keys()
        for name in expected:
            assert testing.same_bits(found[name], expected[name]), (name, forward_threads, backward_threads)


CROWD = """
import json, multiprocessing, os, time, torch, fastattn

def busy(stop):
    while not stop.is_set():
        for _ in range(10**6):
            pass

def median(threads, function):
    torch.set_num_threads(threads)
    times = []
    for _ in range(60):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return sorted(times)[30]

if __name__ == "__main__":
    cores = len(os.sched_getaffinity(0))
    stop = multiprocessing.get_context("fork").Event()
    crowd = [multiprocessing.get_context("fork").Process(target=busy, args=(stop,)) for _ in range(cores)]
    q = torch.randn(1, 4, 256, 64)
    attend = lambda: fastattn.scaled_dot_product_attention(q, q, q, is_causal=True)
    for process in crowd:
        process.start()
    one, many = (min(median(n, attend) for _ in range(3)) for n in (1, 4 * cores))
    stop.set()
    for process in crowd:
        process.join()
    print(json.dumps({"one": one, "many": many}))
"""


@pytest.mark.slow
def test_no_collapse_with_more_threads_than_cores_on_a_busy_machine(tmp_path, skip_without_native):
    """Every core has a neighbour, and four threads to itself: calls may take longer, not ten times as long."""
    script = tmp_path / "crowd.py"
    script.write_text(CROWD)
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["many"] < 10 * found["one"], found
