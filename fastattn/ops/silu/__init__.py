"""SiLU."""

from fastattn.ops.silu import cpu, reference, triton
from fastattn.ops.silu.op import OP, silu

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)
OP.implement("triton", triton.IMPLEMENTATION)

__all__ = ["OP", "silu"]
