"""Ops called on hollow tensors."""

import torch

from fastattn.testing.problems import EVERY, Hollow, HollowSampler, problems


def test_large_arithmetic_is_left_out_and_shapes_stay():
    sampler = HollowSampler("x", dtype=torch.bfloat16)
    with Hollow():
        x = sampler.normal(2048, 4096)
        y = (x @ x.mT).float().softmax(-1)
        x.copy_(x * 2)
        x[3, 4] = 1.0
        counts = torch.tensor([2, 3]).cumsum(0)
    assert y.shape == (2048, 2048) and y.dtype == torch.float32 and y.is_contiguous()
    assert counts.tolist() == [2, 5]


def test_views_are_real():
    with Hollow():
        x = torch.empty(256, 512)
        assert x[:, 1:].data_ptr() == x.data_ptr() + 4 and x.view(-1).data_ptr() == x.data_ptr()


def test_integers_are_drawn_and_floats_are_not():
    sampler = HollowSampler("x", dtype=torch.float16)
    assert sampler.normal(3).dtype == torch.float16 and sampler.chance(4).dtype == torch.bool
    assert sampler.integers(1000, high=7).max() < 7


def test_every_suite_has_problems_for_every_target():
    by_suite = {}
    for problem in problems():
        by_suite.setdefault(problem.suite.name, set()).update(problem.targets)
    assert all(set(EVERY) == targets for name, targets in by_suite.items() if name != "attention_varlen")
