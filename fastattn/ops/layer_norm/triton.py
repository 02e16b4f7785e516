"""LayerNorm on the triton backend: fastattn/gpu/norms.py, which serves both norms."""

from __future__ import annotations

import torch

from fastattn.dispatch import Implementation
from fastattn.gpu.norms import Norm
from fastattn.norms import NormProblem

NORM = Norm("layer_norm", centred=True)


def supports(problem: NormProblem) -> str | None:
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {problem.dtype}: float32, bfloat16, float16"
    return None


IMPLEMENTATION = Implementation(supports, NORM.forward, NORM.backward)
ADD_IMPLEMENTATION = Implementation(supports, NORM.add_forward, NORM.add_backward)
