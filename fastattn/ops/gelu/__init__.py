"""GELU."""

from fastattn.ops.gelu import cpu, reference
from fastattn.ops.gelu.op import OP, gelu

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)

__all__ = ["OP", "gelu"]
