"""Sums of partial sums, in Triton's interpreter; how problems are cut into chunks."""

import pytest
import torch

from fastattn import backends, env
from fastattn.gpu import norms
from fastattn.gpu.columns import column_sums, partial_sums
from fastattn.ops.gelu import triton as gelu

interpreted = pytest.mark.skipif(
    not env.interpreting() or backends.probe("triton") is not None, reason="runs under TRITON_INTERPRET=1"
)


@interpreted
@pytest.mark.parametrize("chunks", [1, 3, 4, 9])
@pytest.mark.parametrize("columns", [1, 37, 5000])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.bfloat16, torch.float32)])
def test_sums_of_chunks(chunks, columns, dtypes):
    partials = partial_sums(len(dtypes), chunks, columns, torch.device("cpu")).normal_()
    results = [torch.full((columns,), torch.nan, dtype=dtype) for dtype in dtypes]
    column_sums("layer_norm", partials, *results)
    for found, part in zip(results, partials, strict=True):
        torch.testing.assert_close(found, part.double().sum(0).to(found.dtype))


@interpreted
def test_no_columns_launch_nothing():
    column_sums("layer_norm", partial_sums(1, 3, 0, torch.device("cpu")), torch.empty(0))


@pytest.mark.parametrize("rows", [1, 7, 8, 1000, 2048, 10**6, 10**9])
@pytest.mark.parametrize("columns", [1, 5, 768, 4096, 8192, 16384, 10**6])
def test_chunks_leave_sums_that_are_little_beside_the_rows(rows, columns):
    resident = columns <= 16384
    for chunk in (norms.chunk_rows(rows, columns, resident), gelu.chunk_rows(rows, columns)):
        assert chunk >= min(8, rows)
    if resident:
        assert -(-rows // norms.chunk_rows(rows, columns, True)) <= 512
