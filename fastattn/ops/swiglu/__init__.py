"""SwiGLU."""

from fastattn.ops.swiglu import cpu, reference, triton
from fastattn.ops.swiglu.op import OP, swiglu

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)
OP.implement("triton", triton.IMPLEMENTATION)

__all__ = ["OP", "swiglu"]
