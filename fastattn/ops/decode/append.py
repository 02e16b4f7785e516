"""New keys and values into the cache, in place: the one op of the library that changes its arguments.

The torch ops are fastattn::cache_append.<backend>; the schema says that both caches are written, so that compiled
graphs keep the order of writes and reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import LIBRARY

SCHEMA = (
    "(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key, Tensor value, Tensor? cache_seqlens,"
    " Tensor? cache_leftpad, Tensor? cache_batch_idx, Tensor? block_table) -> ()"
)


def _fake(*args: Any) -> None:
    """Nothing comes back."""


def define(backend: str, kernel: Callable[..., None] | None) -> None:
    """Registers a backend's op; without a kernel it is fastattn._C that has it."""
    name = f"cache_append.{backend}"
    LIBRARY.define(f"{name}{SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
    if kernel is not None:
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{name}", _fake, lib=LIBRARY)


def append_to_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    cache_seqlens: Tensor,
    cache_leftpad: Tensor | None,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
    *,
    backend: str,
) -> None:
    """Writes key and value (B, new, Hkv, ...) to slots cache_seqlens, cache_seqlens + 1, ... of every sequence.

    RuntimeError when indices reach outside of the cache, sequences would write to the same place, or one has no room;
    nothing is written then. On a GPU nobody waits to look: what reaches outside of the cache is not written.
    """
    overload = getattr(torch.ops.fastattn.cache_append, backend)
    overload(key_cache, value_cache, key, value, cache_seqlens, cache_leftpad, cache_batch_idx, block_table)
