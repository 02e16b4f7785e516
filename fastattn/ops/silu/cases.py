"""Sample problems and workloads of SiLU; torch's own function in float64 is its truth."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from fastattn.activation_cases import activation_cases, activation_workload
from fastattn.cases import Suite, Workload
from fastattn.ops.silu.op import silu


def peer(input: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """torch's silu after torch's addition, in the input's dtype."""
    return F.silu(input if bias is None else input + bias.to(input.dtype))


def workload(rows: int, columns: int, *, quick: bool = False) -> Workload:
    """Of a convolution's or an embedding's output, where no product with another tensor follows."""
    return activation_workload("", rows, columns, quick=quick)


WORKLOADS = (
    workload(1024, 3072, quick=True),
    workload(4096, 3072),
    workload(4096, 4096, quick=True),
)

SUITES = (
    Suite(
        name="silu",
        function=silu,
        truth=peer,
        peer=peer,
        differentiable=("input", "bias"),
        results=("output",),
        cases=tuple(replace(case, draws=max(case.draws, 8)) for case in activation_cases()),
        workloads=WORKLOADS,
    ),
)
