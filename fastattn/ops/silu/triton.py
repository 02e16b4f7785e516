"""SiLU on the triton backend: fastattn/gpu/activations.py, which serves GELU, too."""

from __future__ import annotations

import torch

from fastattn.activations import ActivationProblem
from fastattn.dispatch import Implementation
from fastattn.gpu.activations import SILU, Activation

ACTIVATION = Activation("silu", (SILU,))


def supports(problem: ActivationProblem) -> str | None:
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {problem.dtype}: float32, bfloat16, float16"
    return None


IMPLEMENTATION = Implementation(supports, ACTIVATION.forward, ACTIVATION.backward)
