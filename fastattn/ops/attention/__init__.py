"""Scaled-dot-product attention."""

from fastattn.ops.attention import cpu, reference
from fastattn.ops.attention.op import OP, scaled_dot_product_attention

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)

__all__ = ["OP", "scaled_dot_product_attention"]
