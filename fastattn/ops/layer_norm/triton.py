"""LayerNorm on the triton backend: fastattn/gpu/norms.py, which serves both norms."""

from __future__ import annotations

from fastattn.dispatch import Implementation, takes_dtype
from fastattn.gpu.norms import Norm

NORM = Norm("layer_norm", centred=True)


IMPLEMENTATION = Implementation(takes_dtype, NORM.forward, NORM.backward)
ADD_IMPLEMENTATION = Implementation(takes_dtype, NORM.add_forward, NORM.add_backward)
