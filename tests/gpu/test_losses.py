"""What cases of cross_entropy and linear_cross_entropy do not reach of their Triton kernels: long rows of 16 bits with
features, many rows, targets that are no class on a GPU."""

import importlib
import itertools

import pytest
import torch

from fastattn import cross_entropy, linear_cross_entropy

pytestmark = pytest.mark.interpreted

INDICES = torch.tensor([1, 2, -100])
WEIGHT = torch.rand(5000, generator=torch.Generator().manual_seed(1))
WEIGHT[::3] = 0.0


def both(logits, **call):
    """(loss, gradient) of the triton backend and of the reference."""
    found = []
    for backend in ("triton", "reference"):
        x = logits.clone().requires_grad_()
        loss = cross_entropy(x, backend=backend, **call)
        found.append((loss, *torch.autograd.grad(loss.sum(), x)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "call",
    [
        {"target": INDICES, "weight": WEIGHT, "label_smoothing": 0.2, "z_loss": 0.1},
        {"target": torch.tensor([0, 3, -100]), "weight": WEIGHT, "softcap": 5.0, "reduction": "sum"},
        {"target": torch.tensor([0, 3, -100]), "weight": WEIGHT},  # 0 / 0, and no gradient
        {"target": torch.softmax(torch.randn(3, 5000), -1), "weight": WEIGHT, "label_smoothing": 0.1, "softcap": 3.0},
    ],
    ids=lambda call: " ".join(call),
)
def test_long_rows(call, dtype):
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = both(x, **call)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_lse_too_large_to_be_trusted(dtype):
    x = (torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * 2 + 3000).to(dtype)
    ours, theirs = both(x, target=INDICES)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_are_summed_up_in_chunks(reduction, monkeypatch):
    monkeypatch.setattr(importlib.import_module("fastattn.ops.cross_entropy.triton"), "CHUNK", 1000)
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(20001, 5, generator=generator), torch.randint(5, (20001,), generator=generator)
    ours, theirs = both(x, target=target, weight=WEIGHT[:5], ignore_index=3, reduction=reduction)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [40, 5000])
def test_targets_that_are_no_class_are_not_followed_on_a_gpu(columns, monkeypatch):
    """Their rows are NaN, the others are as without them."""
    for op in ("cross_entropy", "linear_cross_entropy"):
        monkeypatch.setattr(importlib.import_module(f"fastattn.ops.{op}.triton"), "INTERPRETING", False)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 8, generator=generator), torch.randn(columns, 8, generator=generator)
    wrong, right = torch.tensor([3, 2**40, -1, -100]), torch.tensor([3, 0, 0, -100])
    functions = (
        lambda x, target: cross_entropy(x @ weight.t(), target, reduction="none", backend="triton"),
        lambda x, target: linear_cross_entropy(x, weight, target, reduction="none", backend="triton"),
    )
    for function, (target, strange) in itertools.product(functions, ((right, False), (wrong, True))):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, target)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        for result in (loss, gradient):
            assert result[[1, 2]].isnan().all() == strange
            assert result[[0, 3]].isfinite().all()
