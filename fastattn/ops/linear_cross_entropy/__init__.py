"""Linear layer and cross entropy without the logits of all rows."""

from fastattn.ops.linear_cross_entropy import cpu, reference, triton
from fastattn.ops.linear_cross_entropy.op import OP, linear_cross_entropy

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)
OP.implement("triton", triton.IMPLEMENTATION)

__all__ = ["OP", "linear_cross_entropy"]
