"""Linear layers."""

from fastattn.ops.linear import cpu, reference, triton
from fastattn.ops.linear.op import OP, linear

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)
OP.implement("triton", triton.IMPLEMENTATION)

__all__ = ["OP", "linear"]
