"""Cross entropy on the cpu backend: csrc/cross_entropy."""

from __future__ import annotations

import torch

from fastattn.dispatch import native
from fastattn.ops.cross_entropy.op import OP, CrossEntropyProblem


def supports(problem: CrossEntropyProblem) -> str | None:
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {problem.dtype}: float32, bfloat16, float16"
    if problem.classes == 0 and problem.target_dtype != torch.int64:  # of classes by number there is none that fits
        return "has no kernel for rows of no classes"
    return None


IMPLEMENTATION = native(OP, supports)
