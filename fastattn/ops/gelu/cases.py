"""Sample problems and workloads of GELU, its definition in plain torch, and torch's peer."""

from __future__ import annotations

import math
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from fastattn.activation_cases import activation_cases, activation_workload
from fastattn.cases import Suite, Workload
from fastattn.ops.gelu.op import gelu


def definition(input: Tensor, approximate: str = "none", *, bias: Tensor | None = None) -> Tensor:
    """GELU written down, in the dtype of its inputs."""
    x = input if bias is None else input + bias
    if approximate == "tanh":
        return 0.5 * x * (1.0 + (math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))).tanh())
    if approximate == "sigmoid":
        return x * (1.702 * x).sigmoid()
    return 0.5 * x * (1.0 + (x / math.sqrt(2.0)).erf())


def peer(input: Tensor, approximate: str = "none", *, bias: Tensor | None = None) -> Tensor:
    """torch's gelu after torch's addition, in the input's dtype; by a sigmoid torch has none."""
    x = input if bias is None else input + bias.to(input.dtype)
    return definition(x, approximate) if approximate == "sigmoid" else F.gelu(x, approximate=approximate)


def workload(rows: int, columns: int, *, approximate: str = "tanh", quick: bool = False) -> Workload:
    """Bias and GELU, as after the first product of a feed-forward layer."""
    return activation_workload(approximate, rows, columns, quick=quick, bias=True, approximate=approximate)


WORKLOADS = (
    workload(1024, 3072, quick=True),
    workload(4096, 3072, approximate="none"),
    workload(4096, 4096, quick=True),
    workload(4096, 4096, approximate="none"),
    workload(4096, 4096, approximate="sigmoid"),
)

SUITES = (
    Suite(
        name="gelu",
        function=gelu,
        truth=definition,
        peer=peer,
        differentiable=("input", "bias"),
        results=("output",),
        cases=tuple(
            replace(case, draws=max(case.draws, 8))
            for form in ("none", "tanh", "sigmoid")
            # torch's own cube of huge values overflows, or the formula's products, and its gradient is NaN.
            for case in activation_cases(form, huge_gradients=False, approximate=form)
        ),
        workloads=WORKLOADS,
    ),
)
