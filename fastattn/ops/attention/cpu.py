"""Attention on the cpu backend: csrc/attention, C++ SIMD kernels for float32, bfloat16 and float16."""

from __future__ import annotations

from fastattn.dispatch import native, takes_dtype
from fastattn.ops.attention.op import OP, AttentionProblem
from fastattn.ops.attention.varlen import OP as VARLEN_OP
from fastattn.ops.attention.varlen import VarlenProblem

MAX_HEAD_DIM = 512


def supports(problem: AttentionProblem | VarlenProblem) -> str | None:
    reason = takes_dtype(problem)
    if reason is not None:
        return reason
    if not 1 <= problem.head_dim <= MAX_HEAD_DIM or not 1 <= problem.value_dim <= MAX_HEAD_DIM:
        return f"head dims are 1 to {MAX_HEAD_DIM}, got {problem.head_dim} and {problem.value_dim}"
    return None


IMPLEMENTATION = native(OP, supports)
VARLEN = native(VARLEN_OP, supports)
