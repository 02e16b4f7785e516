"""Attention of a few queries over a cache of keys and values, and appending to the cache."""

from fastattn.ops.decode import append, cpu, reference, triton
from fastattn.ops.decode.op import OP, decode_attention

OP.implement("reference", reference.IMPLEMENTATION)
OP.implement("cpu", cpu.IMPLEMENTATION)
OP.implement("triton", triton.IMPLEMENTATION)
append.define("reference", reference.append)
append.define("cpu", None)
append.define("triton", triton.append)

__all__ = ["OP", "decode_attention"]
