"""Rotary position embedding on the cpu backend: csrc/rotary."""

from __future__ import annotations

from fastattn.dispatch import native
from fastattn.ops.rotary.op import OP

IMPLEMENTATION = native(OP)
