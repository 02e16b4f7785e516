"""SiLU on the triton backend: fastattn/gpu/activations.py, which serves GELU, too."""

from __future__ import annotations

from fastattn.dispatch import Implementation, takes_dtype
from fastattn.gpu.activations import SILU, Activation

ACTIVATION = Activation("silu", (SILU,))


IMPLEMENTATION = Implementation(takes_dtype, ACTIVATION.forward, ACTIVATION.backward)
