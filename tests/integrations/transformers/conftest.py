"""How this version of Transformers asks for masks, and what they are point by point."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install fastattn[test]")

from fastattn.integrations.transformers import masks  # noqa: E402

MAJOR = int(transformers.__version__.split(".")[0])


def asked(function, queries, keys, query_start=0, key_start=0, attention_mask=None, **options):
    """The arguments of a mask function of this version of Transformers."""
    given = {"batch_size": 2, "kv_length": keys, "kv_offset": key_start, "mask_function": function, **options}
    if MAJOR < 5:
        given["cache_position"] = torch.arange(queries) + query_start
    else:
        given |= {"q_length": queries, "q_offset": query_start, "device": torch.device("cpu")}
    return {**given, "attention_mask": attention_mask}


def matrix(arguments):
    """What the mask is, evaluated point by point."""
    return masks._SDPA_MASK(**{**arguments, "allow_is_causal_skip": False, "use_vmap": False})


@pytest.fixture(scope="session")
def ask():
    """Call with (function, queries, keys, query_start, key_start, attention_mask, **options): arguments for a mask."""
    return asked


@pytest.fixture(scope="session")
def evaluate():
    """Call with such arguments: the boolean matrix."""
    return matrix
