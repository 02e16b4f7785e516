"""`import flash_attn` for code that wants flash-attention where it is not installed, as on CPUs:

    import fastattn.integrations.flash_attn
    fastattn.integrations.flash_attn.install()      # before transformers, diffusers, ... are imported
    from flash_attn import flash_attn_func          # fastattn.flash_attn's

A flash_attn that is installed is left alone. What is there: flash_attn, .flash_attn_interface (the forward and backward
passes with underscores too), .bert_padding, .layers.rotary and .ops.triton.rotary, as in 2.8. Other parts of
flash-attention raise ModuleNotFoundError as if they were not installed.
"""

from __future__ import annotations

from typing import Any

from fastattn import flash_attn
from fastattn.flash_attn import padding, passes, rotary
from fastattn.integrations.stand_in import StandIn, public

#: What version checks of other libraries see: the release whose functions these are.
VERSION = "2.8.4"
_FUNCTIONS = tuple(name for name in flash_attn.__all__ if name.startswith("flash_attn_"))
_PASSES = tuple(
    f"_{wrapped}flash_attn_{kind}{direction}"
    for wrapped in ("", "wrapped_")
    for kind in ("", "varlen_")
    for direction in ("forward", "backward")
)


def _interface() -> dict[str, Any]:
    return {**public(flash_attn, *_FUNCTIONS), **public(passes, *_PASSES)}


def _rotary() -> dict[str, Any]:
    return {**public(rotary, *rotary.__all__), "apply_rotary_emb_func": rotary.apply_rotary_emb}


_STAND_IN = StandIn(
    "flash_attn",
    "flash-attn",
    VERSION,
    {
        "": lambda: public(flash_attn, *_FUNCTIONS),
        "flash_attn_interface": _interface,
        "bert_padding": lambda: public(padding, *padding.__all__),
        "layers.rotary": _rotary,
        "ops.triton.rotary": lambda: public(rotary, "apply_rotary"),
    },
)
install, uninstall = _STAND_IN.install, _STAND_IN.uninstall
