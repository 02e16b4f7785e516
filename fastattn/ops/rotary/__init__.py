"""Rotary position embedding."""

from fastattn.ops.rotary import cpu, reference
from fastattn.ops.rotary.op import OP, apply_rotary_emb, define_in_place

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)
define_in_place("reference", reference.in_place)
define_in_place("cpu", None)

__all__ = ["OP", "apply_rotary_emb"]
