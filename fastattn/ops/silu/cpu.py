"""SiLU on the cpu backend: csrc/activation, which serves GELU, too."""

from __future__ import annotations

from fastattn.dispatch import native
from fastattn.ops.silu.op import OP

IMPLEMENTATION = native(OP)
