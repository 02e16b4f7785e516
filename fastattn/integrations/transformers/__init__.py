"""Hugging Face Transformers on fastattn's attention: `register()`, then attn_implementation="fastattn".

    from fastattn.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastattn")
    model.set_attn_implementation("fastattn")                    # or one that is there already

Every model that takes attention implementations then runs on `scaled_dot_product_attention`, and on
`decode_attention` where one query meets a cache. docs/drop-in.md says what reaches the kernels as what.
"""

from __future__ import annotations

OLDEST = (4, 53)

try:
    import transformers
except ImportError as error:
    raise ImportError(
        f"fastattn.integrations.transformers needs transformers >= {OLDEST[0]}.{OLDEST[1]}: pip install transformers"
    ) from error
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"fastattn.integrations.transformers needs transformers >= {OLDEST[0]}.{OLDEST[1]}, where models ask for their"
        f" masks through an interface; {transformers.__version__} is installed, in which padding would be ignored"
    )

from transformers.masking_utils import AttentionMaskInterface  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402

from fastattn.integrations.transformers.attention import fastattn_attention  # noqa: E402
from fastattn.integrations.transformers.masks import BandMask, Mask, PackedMask, RangeMask, fastattn_mask  # noqa: E402
from fastattn.integrations.transformers.packing import keep_padding, skip_padding  # noqa: E402

__all__ = [
    "BandMask",
    "Mask",
    "PackedMask",
    "RangeMask",
    "fastattn_attention",
    "fastattn_mask",
    "keep_padding",
    "register",
    "skip_padding",
    "unregister",
]

NAME = "fastattn"


def register() -> None:
    """Makes attn_implementation="fastattn" known to Transformers: its attention and its masks. Twice is harmless.

    Raises:
        RuntimeError: something else has been registered by that name.
    """
    for interface, function in ((AttentionInterface, fastattn_attention), (AttentionMaskInterface, fastattn_mask)):
        known = interface._global_mapping.get(NAME, function)
        if known is not function:
            raise RuntimeError(f'fastattn: {interface.__name__} knows another "{NAME}": {known!r}')
        interface.register(NAME, function)


def unregister() -> None:
    """Undoes register(). Models that are set to "fastattn" must be given another implementation to run again."""
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(NAME, None)
