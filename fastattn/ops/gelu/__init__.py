"""GELU."""

from fastattn.ops.gelu import cpu, reference, triton
from fastattn.ops.gelu.op import OP, gelu

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)
OP.implement("triton", triton.IMPLEMENTATION)

__all__ = ["OP", "gelu"]
