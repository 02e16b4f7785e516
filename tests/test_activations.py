"""GELU and SiLU where their numbers end."""

import pytest
import torch

import fastattn
from fastattn.backends import probe

BACKENDS = [name for name in ("reference", "cpu") if probe(name) is None]
CALLS = {
    "gelu": fastattn.gelu,
    "gelu tanh": lambda x, **call: fastattn.gelu(x, "tanh", **call),
    "gelu sigmoid": lambda x, **call: fastattn.gelu(x, "sigmoid", **call),
    "silu": fastattn.silu,
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_far_out_they_are_the_identity_or_zero(backend, name, dtype):
    """And no multiple of what is large overflows on the way there, forwards or backwards."""
    top = torch.finfo(dtype).max
    x = torch.tensor([top, top / 2, 1e4, -1e4, -top / 2, -top], dtype=dtype, requires_grad=True)
    y = CALLS[name](x, backend=backend)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, x.clamp_min(0.0))
    assert torch.equal(slope, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=dtype))
