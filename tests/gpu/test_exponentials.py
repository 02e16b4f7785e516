"""Exponentials of device functions and their online sums, in Triton's interpreter."""

import pytest
import torch

pytestmark = pytest.mark.interpreted

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from fastattn.gpu.functions import LOWEST, add_exponentials, combine_exponentials, exp, fast_exp  # noqa: E402
from fastattn.testing import assert_lawful  # noqa: E402


@triton.jit
def apply_exp(x_ptr, y_ptr, COUNT: tl.constexpr, FAST: tl.constexpr):
    i = tl.arange(0, COUNT)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, fast_exp(x) if FAST else exp(x))


@triton.jit
def sum_up(x_ptr, top_ptr, total_ptr, columns, PARTS: tl.constexpr, LANES: tl.constexpr):
    top = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, columns, PARTS * LANES):
        place = start + tl.arange(0, PARTS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        top, total = add_exponentials(top, total, tl.load(x_ptr + place, mask=place < columns, other=float("-inf")))
    highest, whole = combine_exponentials(top, total)
    tl.store(top_ptr, highest)
    tl.store(total_ptr, whole)


def test_exp_is_exact_to_a_unit_in_the_last_place():
    x = torch.cat([torch.linspace(-86, 80, 3000), torch.linspace(-1, 1, 1000), torch.linspace(-0.01, 0.01, 96)])
    y = torch.empty_like(x)
    apply_exp[(1,)](x, y, COUNT=4096, FAST=False)
    truth = x.double().exp()
    assert ((y - truth).abs() / truth).max() < torch.finfo(torch.float32).eps


@pytest.mark.parametrize("fast", [False, True])
def test_exponentials_of_what_is_not_finite(fast):
    x = torch.tensor([-torch.inf, torch.nan, -200.0, 0.0])
    y = torch.empty_like(x)
    apply_exp[(1,)](x, y, COUNT=4, FAST=fast)
    assert torch.equal(y[[0, 3]], torch.tensor([0.0, 1.0]))
    assert y[1].isnan()
    assert 0.0 <= y[2] < 1e-37


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("mean", [0.0, -1e4, 3e38])
def test_online_sums(columns, mean):
    drawn = torch.randn(32, columns, generator=torch.Generator().manual_seed(columns)) * 3 + mean
    drawn[:, columns // 2 + 1 :: 3] = -torch.inf
    tops, totals = torch.empty(32), torch.empty(32)
    for x, top, total in zip(drawn, tops, totals, strict=True):
        sum_up[(1,)](x, top, total, columns, PARTS=4, LANES=16)
    highest = drawn.amax(1, keepdim=True)
    assert torch.equal(tops, highest.squeeze(1))
    assert_lawful(totals, (drawn - highest).exp().sum(1), (drawn.double() - highest).exp().sum(1))


def test_online_sums_of_nothing_and_of_nan():
    top, total = torch.empty(()), torch.empty(())
    sum_up[(1,)](torch.full((5,), -torch.inf), top, total, 5, PARTS=4, LANES=16)
    assert total == 0.0
    for strange in (torch.nan, torch.inf):
        sum_up[(1,)](torch.tensor([1.0, strange, 2.0]), top, total, 3, PARTS=4, LANES=16)
        assert total.isnan()
