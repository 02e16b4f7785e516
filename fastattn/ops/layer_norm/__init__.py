"""LayerNorm, optionally with a residual added first."""

from fastattn.ops.layer_norm import cpu, reference
from fastattn.ops.layer_norm.op import OP, layer_norm

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)

__all__ = ["OP", "layer_norm"]
