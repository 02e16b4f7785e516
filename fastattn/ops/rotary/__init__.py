"""Rotary position embedding."""

from fastattn.ops.rotary import cpu, reference, triton
from fastattn.ops.rotary.op import OP, apply_rotary_emb, define_in_place

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)
OP.implement("triton", triton.IMPLEMENTATION)
define_in_place("reference", reference.in_place)
define_in_place("cpu", None)
define_in_place("triton", triton.in_place)

__all__ = ["OP", "apply_rotary_emb"]
