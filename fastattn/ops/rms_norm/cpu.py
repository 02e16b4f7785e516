"""RMSNorm on the cpu backend: csrc/layer_norm, which serves both norms."""

from __future__ import annotations

from fastattn.dispatch import native
from fastattn.ops.rms_norm.op import ADD_OP, OP

IMPLEMENTATION = native(OP)
ADD_IMPLEMENTATION = native(ADD_OP)
