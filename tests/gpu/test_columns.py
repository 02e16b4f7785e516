"""Sums of partial sums, in Triton's interpreter; how problems are cut into chunks."""

import pytest
import torch

from fastattn import testing
from fastattn.bench.launch_cost import launching_nothing
from fastattn.gpu import activations, norms
from fastattn.gpu.columns import column_sums, partial_sums


@pytest.mark.interpreted
@pytest.mark.parametrize("chunks", [1, 3, 4, 9])
@pytest.mark.parametrize("columns", [1, 37, 5000])
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.bfloat16, torch.float32)])
def test_sums_of_chunks(chunks, columns, dtypes):
    drawn = [
        partial_sums(len(dtypes), chunks, columns, torch.device("cpu")).normal_() for _ in range(200 // columns + 1)
    ]
    found = [[torch.full((columns,), torch.nan, dtype=dtype) for dtype in dtypes] for _ in drawn]
    for partials, results in zip(drawn, found, strict=True):
        column_sums("layer_norm", partials, *results)
    for i, dtype in enumerate(dtypes):  # a few elements would be measured against torch's luck
        parts = torch.cat([partials[i] for partials in drawn], -1)
        result = torch.cat([results[i] for results in found])
        testing.assert_lawful(result, parts.sum(0).to(dtype), parts.double().sum(0))


@pytest.mark.compiled
def test_no_columns_launch_nothing():
    with launching_nothing() as count:
        column_sums("layer_norm", partial_sums(1, 3, 0, torch.device("cpu")), torch.empty(0))
    assert count == [0]


@pytest.mark.parametrize("rows", [1, 7, 8, 1000, 2048, 10**6, 10**9])
@pytest.mark.parametrize("columns", [1, 5, 768, 4096, 8192, 16384, 10**6])
def test_chunks_leave_sums_that_are_little_beside_the_rows(rows, columns):
    resident = columns <= 16384
    for chunk in (norms.chunk_rows(rows, columns, resident), activations.chunk_rows(rows, columns)):
        assert chunk >= min(8, rows)
    if resident:
        assert -(-rows // norms.chunk_rows(rows, columns, True)) <= 512
