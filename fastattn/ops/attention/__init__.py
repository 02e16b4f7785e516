"""Scaled-dot-product attention."""

from fastattn.ops.attention import cpu, reference, triton, varlen_reference
from fastattn.ops.attention.op import OP, scaled_dot_product_attention
from fastattn.ops.attention.varlen import OP as VARLEN_OP
from fastattn.ops.attention.varlen import attention_varlen

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)
OP.implement("triton", triton.IMPLEMENTATION)
VARLEN_OP.implement("reference", varlen_reference.IMPLEMENTATION)
VARLEN_OP.implement("cpu", cpu.VARLEN)
VARLEN_OP.implement("triton", triton.VARLEN)

__all__ = ["OP", "VARLEN_OP", "attention_varlen", "scaled_dot_product_attention"]
