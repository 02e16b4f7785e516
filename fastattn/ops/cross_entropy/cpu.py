"""Cross entropy on the cpu backend: csrc/cross_entropy."""

from __future__ import annotations

import torch

from fastattn.dispatch import native, takes_dtype
from fastattn.ops.cross_entropy.op import OP, CrossEntropyProblem


def supports(problem: CrossEntropyProblem) -> str | None:
    reason = takes_dtype(problem)
    if reason is not None:
        return reason
    if problem.classes == 0 and problem.target_dtype != torch.int64:  # of classes by number there is none that fits
        return "has no kernel for rows of no classes"
    return None


IMPLEMENTATION = native(OP, supports)
