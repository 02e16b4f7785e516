"""SwiGLU."""

from fastattn.ops.swiglu import cpu, reference
from fastattn.ops.swiglu.op import OP, swiglu

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)

__all__ = ["OP", "swiglu"]
