"""linear_cross_entropy on CPUs: csrc/bindings/linear_cross_entropy.cpp runs the kernels of linear and cross_entropy."""

from __future__ import annotations

from fastattn.dispatch import native
from fastattn.ops.linear_cross_entropy.op import OP

IMPLEMENTATION = native(OP)
