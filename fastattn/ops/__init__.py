"""The ops, with torch.nn.functional's names and arguments."""

from fastattn.ops.attention import scaled_dot_product_attention
from fastattn.ops.cross_entropy import cross_entropy
from fastattn.ops.gelu import gelu
from fastattn.ops.layer_norm import layer_norm
from fastattn.ops.linear import linear
from fastattn.ops.rms_norm import rms_norm
from fastattn.ops.softmax import log_softmax, softmax
from fastattn.ops.swiglu import swiglu

__all__ = [
    "cross_entropy",
    "gelu",
    "layer_norm",
    "linear",
    "log_softmax",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
    "swiglu",
]
