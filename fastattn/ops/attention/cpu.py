"""Attention on the cpu backend: csrc/attention, C++ SIMD kernels for float32, bfloat16 and float16."""

from __future__ import annotations

import torch

from fastattn.dispatch import native
from fastattn.ops.attention.op import OP, AttentionProblem
from fastattn.ops.attention.varlen import OP as VARLEN_OP
from fastattn.ops.attention.varlen import VarlenProblem

MAX_HEAD_DIM = 512


def supports(problem: AttentionProblem | VarlenProblem) -> str | None:
    if problem.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernel for {problem.dtype}: float32, bfloat16, float16"
    if not 1 <= problem.head_dim <= MAX_HEAD_DIM or not 1 <= problem.value_dim <= MAX_HEAD_DIM:
        return f"head dims are 1 to {MAX_HEAD_DIM}, got {problem.head_dim} and {problem.value_dim}"
    return None


IMPLEMENTATION = native(OP, supports)
VARLEN = native(VARLEN_OP, supports)
