"""GELU on the cpu backend: csrc/activation, which serves SiLU, too."""

from __future__ import annotations

import torch

from fastattn.dispatch import native
from fastattn.ops.gelu.op import OP, GeluProblem


def supports(problem: GeluProblem) -> str | None:
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {problem.dtype}: float32, bfloat16, float16"
    return None


IMPLEMENTATION = native(OP, supports)
