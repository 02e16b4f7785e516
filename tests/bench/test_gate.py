"""The gate is red for wrong results, wherever in them the mistake is."""

import pytest
import torch

from fastattn.bench import cases, trial
from fastattn.bench.contenders import OURS, TORCH, Contender
from fastattn.bench.gate import verdict
from fastattn.bench.trial import BOTH, Trial


@pytest.fixture(scope="module")
def attention():
    suite = cases.suite_of("attention")
    (workload, _) = cases.parse_shape("attention", "1,4,40,16")
    return Trial(suite, workload, torch.float32)


@pytest.fixture
def results(attention):
    """Twice the right results, as two contenders', and the truth."""
    contender = Contender(TORCH, torch.nn.functional.scaled_dot_product_attention)
    call = attention.call(contender, BOTH)
    return {OURS: call(), TORCH: call()}, *attention.truth()


def red(results, truth, part=None, dtype=torch.float32):
    return verdict(results, truth, part, dtype).violations


def test_green_for_right_results(results):
    found, truth, part = results
    judged = verdict(found, truth, part, torch.float32)
    assert judged.violations == ()
    names = {"output", "grad_query", "grad_key", "grad_value"}
    assert set(judged.errors) == {OURS, TORCH}
    assert set(judged.errors[OURS]) == names
    assert all(0 < error.norm < 1e-6 for error in judged.errors[OURS].values())


@pytest.mark.parametrize("name", ["output", "grad_query", "grad_key", "grad_value"])
def test_red_for_a_result_that_is_slightly_off(results, name):
    found, truth, part = results
    found[OURS][name] = found[OURS][name] * 1.00001
    (violation,) = red(found, truth, part)
    assert violation.startswith(f"{name}: norm error")


def test_red_for_one_wrong_element(results):
    found, truth, part = results
    found[OURS]["output"][0, 3, 39, 15] += 2e-6
    (violation,) = red(found, truth, part)
    assert violation.startswith("output: largest element error")


def test_red_for_nan_missing_and_misshapen_results(results):
    found, truth, part = results
    found[OURS]["output"][0, 0, 0, 0] = torch.nan
    del found[OURS]["grad_query"]
    found[OURS]["grad_key"] = found[OURS]["grad_key"][..., :-1]
    assert red(found, truth, part) == (
        "output: infinite or NaN elsewhere than the truth",
        "grad_query: missing",
        "grad_key: shape (1, 4, 40, 15) instead of (1, 4, 40, 16)",
    )


def test_red_for_a_mistake_where_no_truth_was_computed(results, attention, monkeypatch):
    monkeypatch.setattr(trial, "TRUTH_FLOPS", 0)
    truth, part = attention.truth()
    assert truth["output"].shape[1] == 2
    found, _, _ = results
    assert red(found, truth, part) == ()
    found[OURS]["output"][0, 1] *= 1.001  # of heads 0 and 3 the truth is known
    (violation,) = red(found, truth, part)
    assert "away from torch's" in violation
