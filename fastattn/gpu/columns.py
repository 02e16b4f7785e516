"""Sums over the rows of a matrix, as gradients of weights and biases are: kernels leave float32 sums of chunks of rows,
which are added here in an order that their number fixes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.gpu import devices, tuning
from fastattn.gpu.deferred import Deferred

KERNELS = Deferred("fastattn.gpu.column_kernels")


def partial_sums(parts: int, chunks: int, columns: int, device: torch.device) -> Tensor:
    """Room for the sums of one or two matrices, (parts, chunks, columns); a kernel writes every element."""
    return torch.empty((parts, chunks, columns), dtype=torch.float32, device=device)


def column_sums(op: str, partials: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """Adds the chunks of partials[0] into first and those of partials[1] into second: contiguous, one number for each
    column, rounded once to their dtype. Tile sizes are those of "column_sums" in the op's table."""
    parts, chunks, columns = partials.shape
    if columns == 0:
        return
    options = tuning.options(op, "column_sums", devices.target_of(partials.device), size=chunks)
    with devices.on(partials):
        KERNELS.column_sums[-(-columns // options["COLUMNS"]), parts](
            first, second, partials, chunks, columns, **options
        )
