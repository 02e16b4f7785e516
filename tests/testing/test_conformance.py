"""The kit finds what it is there to find: functions with one fault each."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastattn.testing import ConformanceError, check, examine, suites
from fastattn.testing.opcheck import SAMPLED

SOFTMAX = suites()["softmax"]
CASE = next(case for case in SOFTMAX.cases if case.name == "33 columns")


def fault(change):
    """torch's softmax with its result changed."""
    return lambda input, dim, dtype=None: change(F.softmax(input, dim, dtype=dtype))


def test_another_librarys_function_passes():
    assert check(F.softmax, SOFTMAX, CASE).violations == ()
    assert check(F.softmax, SOFTMAX, CASE, dtype=torch.bfloat16).measurements[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fault(lambda y: y * (1 + 1e-4)), "output: norm error"),
        (fault(lambda y: y.double()), "output is torch.float64"),
        (fault(lambda y: y[:-1]), "output is torch.float32 \\(6, 33\\), torch's is torch.float32 \\(7, 33\\)"),
        (fault(lambda y: torch.where(y == y.max(), torch.nan, y)), "not NaN and infinite exactly where the truth is"),
        (fault(lambda y: y + 0 * torch.rand_like(y) + torch.rand_like(y) * 1e-7), "other bits in a second run"),
        (fault(lambda y: y.detach()), "gradient of input is missing"),
        (fault(lambda y: y.detach() + 0.5 * (y - y.detach())), "gradient of input: norm error"),
        (lambda input, dim: F.softmax(input.data.add_(1), dim) + 0 * input, "input was modified"),
    ],
)
def test_faults_are_found(function, message):
    with pytest.raises(ConformanceError, match=message):
        check(function, SOFTMAX, CASE)


def test_one_wrong_element_is_found():
    def wrong(input, dim, dtype=None):
        y = F.softmax(input, dim, dtype=dtype).clone()
        y[2, 7] += 1e-6
        return y

    many = next(case for case in SOFTMAX.cases if case.name == "many rows")
    assert any("largest element" in v for v in examine(wrong, SOFTMAX, many).violations)


def test_draws_are_judged_together():
    drawn = dataclasses.replace(CASE, draws=3)
    assert examine(F.softmax, SOFTMAX, drawn).violations == ()
    first, second = (SOFTMAX.arguments(drawn, "cpu", torch.float32, draw)["input"] for draw in (0, 1))
    assert not torch.equal(first, second)


def test_every_op_has_a_suite_and_every_sampled_case_exists():
    assert set(suites()) >= {"attention", "layer_norm", "rms_norm", "softmax", "log_softmax", "cross_entropy"}
    for name, cases in SAMPLED.items():
        assert set(cases) <= {case.name for case in suites()[name].cases}


def test_suites_differentiate_something_and_have_core_cases():
    for suite in suites().values():
        assert any(case.core for case in suite.cases)
        arguments = suite.arguments(suite.cases[0], "cpu", torch.float32)
        assert suite.differentiated(suite.cases[0], arguments) or suite.differentiable == ()


@pytest.mark.parametrize("suite", suites().values(), ids=suites())
def test_workloads_count_what_they_say(suite):
    for workload in suite.workloads:
        assert workload.flops() > 0
        assert workload.flops() < 10 * workload.flops(backward=True) or suite.differentiable == ()
        assert workload.bytes(torch.float32) == 2 * workload.bytes(torch.bfloat16) > 0
    assert any(workload.quick for workload in suite.workloads)


def test_the_command_line_ends_in_json():
    result = subprocess.run(
        [sys.executable, "-m", "fastattn.testing", "--backend", "reference", "--suite", "softmax", "--core"],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    summary = json.loads(result.stdout.splitlines()[-1])
    assert result.returncode == 0, result.stderr
    assert summary["backend"] == "reference" and summary["failures"] == [] and summary["checked"] > 20
