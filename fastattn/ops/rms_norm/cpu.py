"""RMSNorm on the cpu backend: csrc/layer_norm, which serves both norms."""

from __future__ import annotations

import torch

from fastattn.dispatch import native
from fastattn.norms import NormProblem
from fastattn.ops.rms_norm.op import ADD_OP, OP


def supports(problem: NormProblem) -> str | None:
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {problem.dtype}: float32, bfloat16, float16"
    return None


IMPLEMENTATION = native(OP, supports)
ADD_IMPLEMENTATION = native(ADD_OP, supports)
