"""Decoding on the cpu backend: csrc/decode."""

from __future__ import annotations

from fastattn.dispatch import Implementation, NativeKernel, takes_dtype
from fastattn.ops.decode.op import DecodeProblem

MAX_HEAD_DIM = 512


def supports(problem: DecodeProblem) -> str | None:
    reason = takes_dtype(problem)
    if reason is not None:
        return reason
    if not 1 <= problem.head_dim <= MAX_HEAD_DIM or not 1 <= problem.value_dim <= MAX_HEAD_DIM:
        return f"head dims are 1 to {MAX_HEAD_DIM}, got {problem.head_dim} and {problem.value_dim}"
    return None


IMPLEMENTATION = Implementation(supports, NativeKernel("decode_forward", "cpu"), None)
