"""torch.func sees through launches of Triton kernels, as through any other op."""

import pytest
import torch

from fastattn import swiglu
from fastattn.testing import assert_lawful

pytestmark = pytest.mark.interpreted


def loss(backend):
    return lambda gate, up: swiglu(gate, up, backend=backend).square().sum()


def rows(backend, gate, up):
    return torch.func.vmap(torch.func.grad(loss(backend)))(gate, up)


def second(backend, gate, up):
    return torch.func.jacrev(torch.func.grad(loss(backend)))(gate[0], up[0])


@pytest.mark.parametrize("derivative", [rows, second])
def test_vmap_grad_and_second_derivatives(derivative):
    torch.manual_seed(0)
    given = torch.randn(3, 4, 16), torch.randn(3, 4, 16)
    exact = derivative("reference", *(tensor.double() for tensor in given))
    assert_lawful(derivative("triton", *given), derivative("reference", *given), exact)
