"""Modules with torch.nn's names, arguments and state_dict, on our kernels. Each is a subclass of torch's."""

from torch.nn import TransformerDecoder, TransformerEncoder

from fastattn.nn.activations import GELU, LogSoftmax, SiLU, Softmax
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.linear import Linear
from fastattn.nn.losses import CrossEntropyLoss
from fastattn.nn.norms import LayerNorm, RMSNorm
from fastattn.nn.transformer import Transformer, TransformerDecoderLayer, TransformerEncoderLayer

# Encoder and decoder only call their layers: torch's do.
__all__ = [
    "GELU",
    "CrossEntropyLoss",
    "LayerNorm",
    "Linear",
    "LogSoftmax",
    "MultiheadAttention",
    "RMSNorm",
    "SiLU",
    "Softmax",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
