"""Cross entropy."""

from fastattn.ops.cross_entropy import cpu, reference, triton
from fastattn.ops.cross_entropy.op import OP, cross_entropy

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)
OP.implement("triton", triton.IMPLEMENTATION)

__all__ = ["OP", "cross_entropy"]
