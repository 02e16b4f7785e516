"""The ops, with torch.nn.functional's names and arguments."""

from fastattn.ops.attention import attention_varlen, scaled_dot_product_attention
from fastattn.ops.cross_entropy import cross_entropy
from fastattn.ops.decode import decode_attention
from fastattn.ops.gelu import gelu
from fastattn.ops.layer_norm import add_layer_norm, layer_norm
from fastattn.ops.linear import linear
from fastattn.ops.linear_cross_entropy import linear_cross_entropy
from fastattn.ops.rms_norm import add_rms_norm, rms_norm
from fastattn.ops.rotary import apply_rotary_emb
from fastattn.ops.silu import silu
from fastattn.ops.softmax import log_softmax, softmax
from fastattn.ops.swiglu import swiglu

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "apply_rotary_emb",
    "attention_varlen",
    "cross_entropy",
    "decode_attention",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "rms_norm",
    "scaled_dot_product_attention",
    "silu",
    "softmax",
    "swiglu",
]
