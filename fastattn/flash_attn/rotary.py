"""flash_attn.layers.rotary: rotary embedding of packed projections, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.rotary import apply_rotary_emb

__all__ = ["apply_rotary_emb", "apply_rotary_emb_kv_", "apply_rotary_emb_qkv_"]


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Turns the queries and keys of a packed projection **in place** by their positions, and returns it.

    Args:
        qkv: (B, S, 3, H, D), or (B, S, H + 2 * Hkv, D) with num_heads_q = H. It may need a gradient, unless it is a
            leaf: what is written is part of the graph.
        cos, sin: (positions, rotary_dim / 2), of queries and keys; cos_k, sin_k: of keys, both or neither.
        interleaved, seqlen_offsets, backend: as for apply_rotary_emb.

    Raises ValueError for shapes, dtypes or strides that do not fit, RuntimeError as apply_rotary_emb.
    """
    name = "apply_rotary_emb_qkv_"
    if (cos_k is None) != (sin_k is None):
        raise ValueError(f"{name}: cos_k and sin_k are given together or not at all")
    if qkv.ndim == 5 and qkv.shape[2] == 3:
        both, q, k = qkv[:, :, :2].flatten(2, 3) if qkv.is_contiguous() else None, qkv[:, :, 0], qkv[:, :, 1]
    elif qkv.ndim == 4 and num_heads_q is not None:
        keys, odd = divmod(qkv.shape[2] - num_heads_q, 2)
        if keys < 1 or odd:
            raise ValueError(
                f"{name}: qkv must have num_heads_q + 2 * Hkv heads, got {qkv.shape[2]} with num_heads_q {num_heads_q}"
            )
        both = qkv[:, :, : num_heads_q + keys]
        q, k = both[:, :, :num_heads_q], both[:, :, num_heads_q:]
    else:
        raise ValueError(
            f"{name}: qkv must be (B, S, 3, H, D), or (B, S, H + 2 * Hkv, D) with num_heads_q, got {tuple(qkv.shape)}"
            f" with num_heads_q {num_heads_q}"
        )
    if cos_k is None and both is not None:
        parts = [(both, cos, sin)]
    else:
        parts = [(q, cos, sin), (k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)]
    return _turned_in_place(qkv, parts, interleaved, seqlen_offsets, backend)


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Turns the keys of kv, (B, S, 2, Hkv, D), **in place**, and returns it. Others as for apply_rotary_emb_qkv_."""
    if kv.ndim != 5 or kv.shape[2] != 2:
        raise ValueError(f"apply_rotary_emb_kv_: kv must be (B, S, 2, Hkv, D), got {tuple(kv.shape)}")
    return _turned_in_place(kv, [(kv[:, :, 0], cos, sin)], interleaved, seqlen_offsets, backend)


def _turned_in_place(
    packed: Tensor, parts: list[tuple[Tensor, Tensor, Tensor]], interleaved: bool, offsets: int | Tensor,
    backend: str | None,
) -> Tensor:  # fmt: skip
    """`packed` after its views `parts` were turned. Where a graph is recorded the turned ones are copied into their
    places, which autograd knows how to undo; the rotation itself keeps nothing that is overwritten."""
    recorded = packed.requires_grad and torch.is_grad_enabled()
    for part, cos, sin in parts:
        turned = apply_rotary_emb(part, cos, sin, interleaved, not recorded, offsets, backend=backend)
        if recorded:
            part.copy_(turned)
    return packed
