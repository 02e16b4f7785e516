"""Linear layers."""

from fastattn.ops.linear import cpu, reference
from fastattn.ops.linear.op import OP, linear

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)

__all__ = ["OP", "linear"]
