"""GELU on the cpu backend: csrc/activation, which serves SiLU, too."""

from __future__ import annotations

from fastattn.dispatch import native
from fastattn.ops.gelu.op import OP

IMPLEMENTATION = native(OP)
