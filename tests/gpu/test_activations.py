"""Activations of the device against their definitions, in Triton's interpreter."""

import math

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.interpreted

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from fastattn.gpu.activation_kernels import activate, through_activation  # noqa: E402
from fastattn.testing import assert_lawful  # noqa: E402

#: By number: torch's functions, that by a sigmoid in other words.
KINDS = {
    1: F.gelu, 2: lambda x: F.gelu(x, approximate="tanh"), 3: F.relu, 4: lambda x: x * torch.sigmoid(1.702 * x),
    5: F.silu,
}  # fmt: skip


@triton.jit
def apply(x_ptr, y_ptr, slope_ptr, ACTIVATION: tl.constexpr, FINE: tl.constexpr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, activate(x, ACTIVATION, FINE))
    tl.store(slope_ptr + i, through_activation(tl.full((COUNT,), 1.0, tl.float32), x, ACTIVATION, FINE))


def torchs(x, kind):
    """The activation and its derivative."""
    x = x.clone().requires_grad_()
    y = KINDS[kind](x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reach", [12, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_and_their_derivatives(kind, reach, dtype):
    x = torch.linspace(-reach, reach, 4096).to(dtype)
    found = torch.empty_like(x), torch.empty_like(x)
    apply[(1,)](x.float(), *found, ACTIVATION=kind, FINE=dtype == torch.float32, COUNT=4096)
    for result, peer, truth in zip(found, torchs(x, kind), torchs(x.double(), kind), strict=True):
        assert_lawful(result, peer, truth)


@pytest.mark.parametrize("kind", [4, 5])
def test_what_a_sigmoid_leaves_far_below_zero_is_precise(kind):
    x = torch.linspace(-40, -10, 4096)
    found = torch.empty_like(x), torch.empty_like(x)
    apply[(1,)](x, *found, ACTIVATION=kind, FINE=True, COUNT=4096)
    for result, peer, truth in zip(found, torchs(x, kind), torchs(x.double(), kind), strict=True):
        assert_lawful((result / truth).float(), (peer / truth).float(), torch.ones_like(truth))


@pytest.mark.parametrize("kind", KINDS)
def test_far_out_it_is_the_identity_or_zero(kind):
    x = torch.tensor([3e38, 1e20, 1e4, -1e4, -1e20, -3e38, math.nan, 0.0])
    y, slope = torch.empty_like(x), torch.empty_like(x)
    apply[(1,)](x, y, slope, ACTIVATION=kind, FINE=True, COUNT=8)
    assert torch.equal(y[:6], x[:6].clamp_min(0.0)) and y[6].isnan() and y[7] == 0.0
    assert torch.equal(slope[:6], torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))
    if kind != 3:  # a gradient of 1 passes relu's NaN as it is, as torch's does
        assert slope[6].isnan() and slope[7] == 0.5
