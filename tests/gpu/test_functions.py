"""Device functions against their definitions, in Triton's interpreter."""

import pytest
import torch

from fastattn import philox

pytestmark = pytest.mark.interpreted

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from fastattn.gpu.functions import keep_tile, tanh  # noqa: E402


@triton.jit
def apply_tanh(x_ptr, y_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(y_ptr + i, tanh(tl.load(x_ptr + i)))


@triton.jit
def write_mask(
    mask_ptr, state_ptr, lane, first_row, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = first_row + tl.arange(0, ROWS)
    seed, offset = tl.load(state_ptr), tl.load(state_ptr + 1)
    kept = keep_tile(seed, offset, lane, rows, first_column, threshold, COLUMNS)
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(mask_ptr + place, kept.to(tl.int8))


def test_tanh_is_exact_to_two_units_in_the_last_place():
    x = torch.cat([torch.linspace(-12, 12, 3000), torch.linspace(-0.5, 0.5, 1000), torch.logspace(-30, 1, 96)])
    y = torch.empty_like(x)
    apply_tanh[(1,)](x, y, COUNT=4096)
    truth = x.double().tanh()
    assert ((y - truth).abs() / truth.abs().clamp_min(1e-38)).max() < 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("state", [(0, 0), (1234, 0), (2**62 + 5, 2**40 + 3), (2**63 - 1, 7)])
@pytest.mark.parametrize(("first_row", "first_column"), [(0, 0), (5, 12)])
def test_dropout_keeps_what_philox_keeps(state, first_row, first_column):
    seed = torch.tensor(state, dtype=torch.int64)
    kept = torch.empty(16, 32, dtype=torch.int8)
    write_mask[(1,)](kept, seed, 3, first_row, first_column, philox.threshold(0.3), ROWS=16, COLUMNS=32)
    expected = philox.keep_mask(seed, 0.3, 2, 2, 21, 44)[1, 1]
    assert torch.equal(kept.bool(), expected[first_row : first_row + 16, first_column : first_column + 32])
