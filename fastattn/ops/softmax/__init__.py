"""softmax and log_softmax."""

from fastattn.ops.softmax import cpu, reference, triton
from fastattn.ops.softmax.op import OP, log_softmax, softmax

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)
OP.implement("triton", triton.IMPLEMENTATION)

__all__ = ["OP", "log_softmax", "softmax"]
