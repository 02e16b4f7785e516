"""softmax and log_softmax on the cpu backend: csrc/softmax."""

from __future__ import annotations

from fastattn.dispatch import native
from fastattn.ops.softmax.op import OP

IMPLEMENTATION = native(OP)
