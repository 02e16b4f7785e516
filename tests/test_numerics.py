"""The accuracy law's own arithmetic."""

import math

import pytest
import torch

from fastattn import numerics
from fastattn.cases import Case, Sampler, Suite
from fastattn.numerics import Error


def test_error_is_measured_against_the_truth():
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert numerics.error(torch.tensor([3.0, 4.5]), truth) == Error(norm=0.1, largest=0.5, scale=4.0)


def test_error_of_nothing_and_of_zero():
    empty = torch.zeros(0, dtype=torch.float64)
    assert numerics.error(torch.zeros(0), empty) == Error(0.0, 0.0, 0.0)
    assert numerics.error(torch.full((4,), 0.5), torch.zeros(4, dtype=torch.float64)).norm == 1.0  # absolute then


def test_error_leaves_out_what_is_not_finite_and_same_nonfinite_does_not():
    truth = torch.tensor([1.0, math.inf, math.nan, -math.inf], dtype=torch.float64)
    assert numerics.error(truth.float(), truth).norm == 0.0
    assert numerics.same_nonfinite(truth.float(), truth)
    for wrong in ([1.0, -math.inf, math.nan, -math.inf], [1.0, 2.0, math.nan, -math.inf], [math.nan] * 4):
        assert not numerics.same_nonfinite(torch.tensor(wrong), truth)


def test_error_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"shape \(2,\) cannot be compared with \(3,\)"):
        numerics.error(torch.zeros(2), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding_is_what_rounding_costs(dtype):
    truth = torch.randn(100_000, dtype=torch.float64)
    rounded = numerics.error(truth.to(dtype), truth)
    exact = Error(0.0, 0.0, rounded.scale)
    assert rounded.norm <= numerics.rounding(dtype)
    assert numerics.violation(rounded, exact, dtype) is None
    twice = Error(3 * numerics.rounding(dtype), rounded.largest, rounded.scale)
    assert "norm error" in numerics.violation(twice, exact, dtype)


def test_violations_name_the_bound_that_is_broken():
    torchs = Error(norm=1e-5, largest=1e-4, scale=1.0)
    assert numerics.violation(Error(1.9e-5, 2.9e-4, 1.0), torchs, torch.float32) is None
    assert "norm error 2.100e-05" in numerics.violation(Error(2.1e-5, 0.0, 1.0), torchs, torch.float32)
    assert "largest element error 3.100e-04" in numerics.violation(Error(0.0, 3.1e-4, 1.0), torchs, torch.float32)
    assert numerics.violation(Error(math.nan, 0.0, 1.0), torchs, torch.float32) is not None
    assert numerics.violation(Error(0.0, math.nan, 1.0), torchs, torch.float32) is not None
    # A case may grant more.
    assert numerics.violation(Error(2.9e-5, 0.0, 1.0), torchs, torch.float32, norm_factor=3.0) is None
    assert numerics.violation(Error(0.0, 3.9e-4, 1.0), torchs, torch.float32, element_factor=4.0) is None
    exact = Error(0.0, 0.0, 1.0)
    assert numerics.violation(Error(2e-7, 0.0, 1.0), exact, torch.float32) is not None
    assert numerics.violation(Error(2e-7, 0.0, 1.0), exact, torch.float32, roundings=4.0) is None


def test_float64_agrees_with_the_formula():
    exact = Error(0.0, 0.0, 1.0)
    assert numerics.violation(Error(1e-15, 1e-15, 1.0), exact, torch.float64) is None
    assert "float64 formula" in numerics.violation(Error(1e-8, 1e-8, 1.0), exact, torch.float64)


def test_geometric_mean():
    def pair(ours, torchs):
        return Error(ours, 0.0, 1.0), Error(torchs, 0.0, 1.0)

    mean = numerics.geometric_mean
    assert mean([], torch.float32) == 1.0
    assert mean([pair(2e-5, 1e-5), pair(1e-5, 2e-5)], torch.float32) == pytest.approx(1.0)
    assert mean([pair(4e-5, 1e-5), pair(1e-5, 1e-5)], torch.float32) == pytest.approx(2.0)
    assert mean([pair(0.0, 0.0)], torch.float32) == 1.0  # exact on both sides decides nothing
    assert mean([pair(1e-5, math.inf), pair(1e-5, 1e-5)], torch.float32) == 1.0


def test_a_case_that_bends_the_law_says_why():
    with pytest.raises(ValueError, match="bends the accuracy law without a reason"):
        Case("lenient", lambda sampler: {}, norm_factor=3.0)
    assert Case("lenient", lambda sampler: {}, norm_factor=3.0, reason="an example").norm_factor == 3.0


def test_samples_are_the_same_on_every_call_and_in_every_dtype():
    a, b = Sampler("name"), Sampler("name", dtype=torch.bfloat16)
    assert torch.equal(a.normal(5).bfloat16(), b.normal(5))
    assert torch.equal(a.integers(9, high=7), b.integers(9, high=7))
    assert not torch.equal(Sampler("other").normal(5), Sampler("name").normal(5))


def test_a_suite_has_no_two_cases_of_one_name():
    case = Case("twice", lambda sampler: {})
    with pytest.raises(ValueError, match="two cases named twice"):
        Suite("suite", print, print, print, (), (), (case, case))
