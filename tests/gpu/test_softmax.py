"""What cases of softmax do not reach of its Triton kernels: long rows with features, masks of many dimensions."""

import pytest
import torch

from fastattn import log_softmax, softmax

pytestmark = pytest.mark.interpreted


def both(function, input, **call):
    """Results and gradients of the triton backend and of the reference."""
    found = []
    for backend in ("triton", "reference"):
        x = input.clone().requires_grad_()
        y = function(x, -1, backend=backend, **call)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        found.append((y, *torch.autograd.grad((y.masked_fill(y == -torch.inf, 0.0) * weights).sum(), x)))
    return found


@pytest.mark.parametrize("function", [softmax, log_softmax])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_long_causal_rows_under_a_mask(function, alignment):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 9001, generator=generator)
    mask = torch.rand(3, 9001, generator=generator) < 0.7
    mask[1] = False
    for call in ({"mask": mask}, {"mask": torch.randn(2, 1, 9001, generator=generator), "scale": -0.5}, {}):
        ours, theirs = both(function, x, is_causal=True, causal_alignment=alignment, **call)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 1, 3, 1, 2, 1, 3, 5), (1, 3, 1, 2, 1, 3, 1, 1), (2, 3, 1, 2, 2, 1, 3, 5)])
def test_masks_that_repeat_every_other_dimension(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 3, 2, 2, 3, 3, 5, generator=generator)
    ours, theirs = both(softmax, x, mask=torch.randn(shape, generator=generator))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
