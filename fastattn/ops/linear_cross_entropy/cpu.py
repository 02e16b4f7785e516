"""linear_cross_entropy on CPUs: csrc/bindings/linear_cross_entropy.cpp runs the kernels of linear and cross_entropy."""

from __future__ import annotations

import torch

from fastattn.dispatch import native
from fastattn.ops.linear_cross_entropy.op import OP, LinearCrossEntropyProblem


def supports(problem: LinearCrossEntropyProblem) -> str | None:
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {problem.dtype}: float32, bfloat16, float16"
    return None


IMPLEMENTATION = native(OP, supports)
