"""What cases of cross_entropy and linear_cross_entropy do not reach of their Triton kernels: rows in more than one
chunk, targets that are no class on a GPU."""

import functools
import importlib
import itertools

import pytest
import torch

from fastattn import cross_entropy, linear_cross_entropy, testing
from fastattn.cases import Case
from fastattn.gpu import devices

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_are_summed_up_in_chunks(reduction, monkeypatch):
    monkeypatch.setattr(importlib.import_module("fastattn.ops.cross_entropy.triton"), "CHUNK", 1000)

    def build(s):
        weight = s.uniform(5)
        return {
            "input": s.normal(20001, 5), "target": s.integers(20001, high=5), "weight": weight, "ignore_index": 3,
            "reduction": reduction,
        }  # fmt: skip

    suite = testing.suites()["cross_entropy"]
    testing.check(functools.partial(cross_entropy, backend="triton"), suite, Case("chunks", build, draws=8))


@pytest.mark.parametrize("columns", [40, 5000])
def test_targets_that_are_no_class_are_not_followed_on_a_gpu(columns):
    """Their rows are NaN, the others are as without them."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 8, generator=generator), torch.randn(columns, 8, generator=generator)
    wrong, right = torch.tensor([3, 2**40, -1, -100]), torch.tensor([3, 0, 0, -100])
    functions = (
        lambda x, target: cross_entropy(x @ weight.t(), target, reduction="none", backend="triton"),
        lambda x, target: linear_cross_entropy(x, weight, target, reduction="none", backend="triton"),
    )
    for function, (target, strange) in itertools.product(functions, ((right, False), (wrong, True))):
        leaf = x.clone().requires_grad_()
        with devices.assume("sm_90"):
            loss = function(leaf, target)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        for result in (loss, gradient):
            assert result[[1, 2]].isnan().all() == strange
            assert result[[0, 3]].isfinite().all()
