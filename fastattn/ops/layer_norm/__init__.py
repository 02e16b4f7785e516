"""LayerNorm, and LayerNorm of a sum."""

from fastattn.ops.layer_norm import cpu, reference, triton
from fastattn.ops.layer_norm.op import ADD_OP, OP, add_layer_norm, layer_norm

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)
OP.implement("triton", triton.IMPLEMENTATION)
ADD_OP.implement("reference", reference.ADD_IMPLEMENTATION)
ADD_OP.implement("cpu", cpu.ADD_IMPLEMENTATION)
ADD_OP.implement("triton", triton.ADD_IMPLEMENTATION)

__all__ = ["ADD_OP", "OP", "add_layer_norm", "layer_norm"]
