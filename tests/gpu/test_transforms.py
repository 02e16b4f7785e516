"""torch.func sees through launches of Triton kernels, as through any other op."""

import pytest
import torch

from fastattn import swiglu

pytestmark = pytest.mark.interpreted


def loss(backend):
    return lambda gate, up: swiglu(gate, up, backend=backend).square().sum()


def test_vmap_grad_and_second_derivatives():
    gate, up = torch.randn(3, 4, 16), torch.randn(3, 4, 16)
    ours, plain = loss("triton"), loss("reference")
    rows = torch.func.vmap(torch.func.grad(ours))(gate, up)
    torch.testing.assert_close(rows, torch.func.vmap(torch.func.grad(plain))(gate, up))
    second = torch.func.jacrev(torch.func.grad(ours))(gate[0], up[0])
    torch.testing.assert_close(second, torch.func.jacrev(torch.func.grad(plain))(gate[0], up[0]))
