"""fastattn: fused transformer kernels for CPUs and GPUs behind one op contract."""

from fastattn import nn
from fastattn.allocator import AllocatorTuning, tune_allocator
from fastattn.dispatch import BackendUnsupported, use_backend
from fastattn.integrations import sdpa as _registered_with_torch  # noqa: F401
from fastattn.integrations.explanation import explain
from fastattn.integrations.functional import accelerate
from fastattn.integrations.patching import PatchReport, patch, unpatch
from fastattn.ops import (
    add_layer_norm,
    add_rms_norm,
    apply_rotary_emb,
    attention_varlen,
    cross_entropy,
    decode_attention,
    gelu,
    layer_norm,
    linear,
    linear_cross_entropy,
    log_softmax,
    rms_norm,
    scaled_dot_product_attention,
    silu,
    softmax,
    swiglu,
)
from fastattn.version import __version__

__all__ = [
    "AllocatorTuning",
    "BackendUnsupported",
    "PatchReport",
    "__version__",
    "accelerate",
    "add_layer_norm",
    "add_rms_norm",
    "apply_rotary_emb",
    "attention_varlen",
    "cross_entropy",
    "decode_attention",
    "explain",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "nn",
    "patch",
    "rms_norm",
    "scaled_dot_product_attention",
    "silu",
    "softmax",
    "swiglu",
    "tune_allocator",
    "unpatch",
    "use_backend",
]
