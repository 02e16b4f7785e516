"""RMSNorm, optionally with a residual added first."""

from fastattn.ops.rms_norm import cpu, reference
from fastattn.ops.rms_norm.op import OP, rms_norm

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)

__all__ = ["OP", "rms_norm"]
