"""GELU on the triton backend: fastattn/gpu/activations.py, which serves SiLU, too."""

from __future__ import annotations

import torch

from fastattn.dispatch import Implementation
from fastattn.gpu.activations import GELU, GELU_SIGMOID, GELU_TANH, Activation
from fastattn.ops.gelu.op import GeluProblem

ACTIVATION = Activation("gelu", (GELU, GELU_TANH, GELU_SIGMOID))


def supports(problem: GeluProblem) -> str | None:
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {problem.dtype}: float32, bfloat16, float16"
    return None


IMPLEMENTATION = Implementation(supports, ACTIVATION.forward, ACTIVATION.backward)
