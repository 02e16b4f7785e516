"""GELU of the device against its definition, in Triton's interpreter."""

import math

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.interpreted

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from fastattn.gpu.activations import gelu, gelu_derivative  # noqa: E402
from fastattn.testing import assert_lawful  # noqa: E402


@triton.jit
def apply(x_ptr, y_ptr, slope_ptr, TANH: tl.constexpr, FINE: tl.constexpr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, gelu(x, TANH, FINE))
    tl.store(slope_ptr + i, gelu_derivative(x, TANH, FINE))


def torchs(x, form):
    """GELU and its derivative."""
    x = x.clone().requires_grad_()
    y = F.gelu(x, approximate=form)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


@pytest.mark.parametrize("form", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_and_its_derivative(form, dtype):
    x = torch.linspace(-12, 12, 4096).to(dtype)
    found = torch.empty_like(x), torch.empty_like(x)
    apply[(1,)](x.float(), *found, TANH=form == "tanh", FINE=dtype == torch.float32, COUNT=4096)
    for result, peer, truth in zip(found, torchs(x, form), torchs(x.double(), form), strict=True):
        assert_lawful(result, peer, truth)


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_far_out_it_is_the_identity_or_zero(form):
    x = torch.tensor([3e38, 1e20, 40.0, -40.0, -1e20, -3e38, math.nan, 0.0])
    y, slope = torch.empty_like(x), torch.empty_like(x)
    apply[(1,)](x, y, slope, TANH=form == "tanh", FINE=True, COUNT=8)
    assert torch.equal(y[:6], x[:6].clamp_min(0.0)) and y[6].isnan() and y[7] == 0.0
    assert torch.equal(slope[:6], torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))
    assert slope[6].isnan() and slope[7] == 0.5
