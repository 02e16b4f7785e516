"""install(): `import flash_attn` is ours where there is none, as other libraries look for it."""

import importlib
import importlib.metadata
import importlib.util

import pytest
import torch

from fastattn import flash_attn as ours
from fastattn.integrations import flash_attn as integration

pytestmark = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")


@pytest.fixture(autouse=True)
def installed():
    assert integration.install()
    yield
    integration.uninstall()
    assert importlib.util.find_spec("flash_attn") is None


def test_functions_are_ours():
    import flash_attn
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
    from flash_attn.flash_attn_interface import flash_attn_varlen_func
    from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb, apply_rotary_emb_func, apply_rotary_emb_qkv_
    from flash_attn.ops.triton.rotary import apply_rotary

    for name in flash_attn.__all__:
        assert getattr(flash_attn, name) is getattr(ours, name)
    assert flash_attn_varlen_func is ours.flash_attn_varlen_func and apply_rotary_emb is ours.apply_rotary_emb
    assert (index_first_axis, pad_input, unpad_input) == (ours.index_first_axis, ours.pad_input, ours.unpad_input)
    assert apply_rotary_emb_func is ours.apply_rotary_emb and apply_rotary_emb_qkv_ is ours.apply_rotary_emb_qkv_
    assert callable(apply_rotary) and issubclass(RotaryEmbedding, torch.nn.Module)


def test_as_libraries_look():
    """find_spec, the version, and which distribution the package is from: flash-attn, not the one of version 4."""
    assert importlib.util.find_spec("flash_attn") is not None
    assert importlib.metadata.version("flash_attn") == importlib.metadata.version("flash-attn") == integration.VERSION
    assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
    import flash_attn

    assert flash_attn.__version__ == integration.VERSION
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn.cute")


def test_transformers_sees_it():
    import_utils = pytest.importorskip("transformers.utils.import_utils")
    assert import_utils._is_package_available("flash_attn", return_version=True) == (True, integration.VERSION)


def test_what_context_parallelism_imports():
    """As diffusers does: the passes alone."""
    from flash_attn.flash_attn_interface import _wrapped_flash_attn_backward, _wrapped_flash_attn_forward

    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    out, lse, _, state = _wrapped_flash_attn_forward(q, k, v, 0.0, 0.3, True, -1, -1, 0.0, None, False)
    places = [torch.empty_like(t) for t in (q, k, v)]
    _wrapped_flash_attn_backward(
        torch.ones_like(out), q, k, v, out, lse, *places, 0.0, 0.3, True, -1, -1, 0.0, None, False, rng_state=state
    )
    assert all(place.isfinite().all() for place in places)
