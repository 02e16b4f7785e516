"""Linear on CPUs: the kernels are csrc/linear/, on the blocks of csrc/cpu/gemm.inl.h."""

from __future__ import annotations

from fastattn.dispatch import native
from fastattn.ops.linear.op import OP

IMPLEMENTATION = native(OP)
