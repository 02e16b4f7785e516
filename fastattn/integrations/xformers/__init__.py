"""xformers' memory_efficient_attention and its attn_bias classes, on CPUs too; and `import xformers` without xformers:

    import fastattn.integrations.xformers
    fastattn.integrations.xformers.install()     # before diffusers, ... are imported
    import xformers.ops                          # memory_efficient_attention, fmha, LowerTriangularMask, unbind

An xformers that is installed is left alone. Other parts of it raise ImportError as if they were not there.
"""

import importlib
from typing import Any

import torch

from fastattn.integrations.stand_in import StandIn, public
from fastattn.integrations.xformers import attn_bias
from fastattn.integrations.xformers.attention import (
    memory_efficient_attention,
    memory_efficient_attention_backward,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
    memory_efficient_attention_partial,
)
from fastattn.integrations.xformers.attn_bias import AttentionBias, LowerTriangularMask
from fastattn.integrations.xformers.merging import merge_attentions

__all__ = [
    "AttentionBias",
    "LowerTriangularMask",
    "attn_bias",
    "install",
    "memory_efficient_attention",
    "memory_efficient_attention_backward",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
    "memory_efficient_attention_partial",
    "merge_attentions",
    "uninstall",
]

#: What version checks of other libraries see: the release whose functions these are.
VERSION = "0.0.35"
_BIASES = tuple(
    name
    for name, member in vars(attn_bias).items()
    if isinstance(member, type) and issubclass(member, AttentionBias) and not name.startswith("_")
)
_LENGTHS = ("_SeqLenInfo", "_PaddedSeqLenInfo", "_GappySeqInfo")
_FUNCTIONS = {
    "memory_efficient_attention": memory_efficient_attention,
    "memory_efficient_attention_backward": memory_efficient_attention_backward,
    "memory_efficient_attention_forward": memory_efficient_attention_forward,
    "memory_efficient_attention_forward_requires_grad": memory_efficient_attention_forward_requires_grad,
}
_OF_PARTS = {
    "memory_efficient_attention_partial": memory_efficient_attention_partial,
    "merge_attentions": merge_attentions,
}


def _fmha() -> dict[str, Any]:
    biases = importlib.import_module("xformers.ops.fmha.attn_bias")
    return {**_FUNCTIONS, **_OF_PARTS, **public(attn_bias, *_BIASES), "attn_bias": biases}


def _ops() -> dict[str, Any]:
    return {
        **_FUNCTIONS,
        "AttentionBias": AttentionBias,
        "AttentionMask": AttentionBias,
        "LowerTriangularMask": LowerTriangularMask,
        "fmha": importlib.import_module("xformers.ops.fmha"),
        "unbind": torch.unbind,
    }


_STAND_IN = StandIn(
    "xformers",
    "xformers",
    VERSION,
    {
        "": dict,
        "ops": _ops,
        "ops.fmha": _fmha,
        "ops.fmha.attn_bias": lambda: public(attn_bias, *_BIASES, *_LENGTHS),
    },
)
install, uninstall = _STAND_IN.install, _STAND_IN.uninstall
