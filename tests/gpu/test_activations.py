"""GELU of the device against its definition, in Triton's interpreter."""

import math

import pytest
import torch

pytestmark = pytest.mark.interpreted

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from fastattn.gpu.activations import gelu, gelu_derivative  # noqa: E402


@triton.jit
def apply(x_ptr, y_ptr, slope_ptr, TANH: tl.constexpr, FINE: tl.constexpr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, gelu(x, TANH, FINE))
    tl.store(slope_ptr + i, gelu_derivative(x, TANH, FINE))


def truth(x, tanh):
    if tanh:
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    return x * torch.special.ndtr(x)


@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
@pytest.mark.parametrize(("fine", "bound"), [(True, 3e-7), (False, 1e-3)], ids=["fine", "bfloat16"])
def test_gelu_and_its_derivative(tanh, fine, bound):
    x = torch.linspace(-12, 12, 4096)
    y, slope = torch.empty_like(x), torch.empty_like(x)
    apply[(1,)](x, y, slope, TANH=tanh, FINE=fine, COUNT=4096)
    exact = x.double().requires_grad_()
    expected = truth(exact, tanh)
    (expected_slope,) = torch.autograd.grad(expected.sum(), exact)
    scale = x.double().abs().clamp_min(1e-2)
    assert ((y - expected).abs() / scale).max() < bound
    assert ((slope - expected_slope).abs() / scale.clamp_min(1.0)).max() < 2 * bound


@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
def test_far_out_it_is_the_identity_or_zero(tanh):
    x = torch.tensor([3e38, 1e20, 40.0, -40.0, -1e20, -3e38, math.nan, 0.0])
    y, slope = torch.empty_like(x), torch.empty_like(x)
    apply[(1,)](x, y, slope, TANH=tanh, FINE=True, COUNT=8)
    torch.testing.assert_close(y, x.clamp_min(0) + 0.0, equal_nan=True)
    torch.testing.assert_close(slope[:3], torch.ones(3))
    torch.testing.assert_close(slope[3:6], torch.zeros(3))
    assert slope[6].isnan() and slope[7] == 0.5
