"""Tensors as rows."""

import pytest
import torch

from fastattn.gpu.rows import as_rows, row_stride


@pytest.mark.parametrize(
    ("tensor", "dims", "stride"),
    [
        (torch.empty(3, 5), 1, 5),
        (torch.empty(3, 5)[:, 1:4], 1, 5),
        (torch.empty(5, 3).T, 1, None),
        (torch.empty(1, 5).expand(3, 5), 1, 0),
        (torch.empty(2, 3, 4, 5), 1, 5),
        (torch.empty(2, 3, 4, 5), 2, 20),
        (torch.empty(2, 3, 4, 5).transpose(1, 2), 1, None),
        (torch.empty(2, 3, 4, 5)[:, 0], 1, None),
        (torch.empty(2, 3, 4, 5)[:, :1, 0], 1, 60),
        (torch.empty(5), 1, 5),
        (torch.empty(()), 1, 1),
        (torch.empty(4, 1), 1, 1),
        (torch.empty(3, 1).expand(3, 5), 1, None),
    ],
)
def test_row_stride(tensor, dims, stride):
    assert row_stride(tensor, dims) == stride


def test_what_has_no_rows_is_copied_and_what_has_is_not():
    x = torch.randn(4, 6)
    same, stride = as_rows(x[:, 1:3])
    assert same.data_ptr() == x[:, 1:3].data_ptr() and stride == 6
    copy, stride = as_rows(x.T)
    assert torch.equal(copy, x.T) and copy.is_contiguous() and stride == 4
