"""Linear on CPUs: the kernels are csrc/linear/, on the blocks of csrc/cpu/gemm.inl.h."""

from __future__ import annotations

import torch

from fastattn.dispatch import native
from fastattn.ops.linear.op import OP, LinearProblem


def supports(problem: LinearProblem) -> str | None:
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {problem.dtype}: float32, bfloat16, float16"
    return None


IMPLEMENTATION = native(OP, supports)
