"""SwiGLU on the cpu backend: csrc/swiglu."""

from __future__ import annotations

from fastattn.dispatch import native
from fastattn.ops.swiglu.op import OP

IMPLEMENTATION = native(OP)
