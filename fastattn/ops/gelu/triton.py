"""GELU on the triton backend: fastattn/gpu/activations.py, which serves SiLU, too."""

from __future__ import annotations

from fastattn.dispatch import Implementation, takes_dtype
from fastattn.gpu.activations import GELU, GELU_SIGMOID, GELU_TANH, Activation

ACTIVATION = Activation("gelu", (GELU, GELU_TANH, GELU_SIGMOID))


IMPLEMENTATION = Implementation(takes_dtype, ACTIVATION.forward, ACTIVATION.backward)
