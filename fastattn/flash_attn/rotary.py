"""flash_attn.layers.rotary: rotary embedding of packed projections, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.ops.rotary import apply_rotary_emb

__all__ = ["RotaryEmbedding", "apply_rotary", "apply_rotary_emb", "apply_rotary_emb_kv_", "apply_rotary_emb_qkv_"]


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


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """flash_attn.ops.triton.rotary.apply_rotary: apply_rotary_emb, or, with conjugate, its inverse."""
    return apply_rotary_emb(x, cos, -sin if conjugate else sin, interleaved, inplace, seqlen_offsets, cu_seqlens,
                            max_seqlen)  # fmt: skip


class RotaryEmbedding(nn.Module):
    """Rotary position embedding with tables of its own (Su et al. 2021); turns what it is given **in place**.

    dim: how many columns are turned. base, interleaved: the angles are base ** (-2i / dim), of columns 2i and 2i + 1
    (interleaved) or i and i + dim / 2. scale_base: also scale queries and keys by their position (XPos, Sun et al.
    2022), (0.4 dim + 2i) / (1.4 dim) to the power of (position - length / 2) / scale_base, keys by the inverse.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        columns = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        self.inv_freq: Tensor
        self.scale: Tensor | None
        self.register_buffer("inv_freq", self.base ** (-columns / dim), persistent=False)
        scale = None if scale_base is None else (columns + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._made_for: Any = None
        self._tables: tuple[Tensor | None, ...] = ()

    def tables(self, length: int, like: Tensor) -> tuple[Tensor | None, ...]:
        """cos and sin of queries, then of keys (None: the same), (length or more, dim / 2), in the dtype of `like`."""
        made_for = (like.device, like.dtype, torch.is_inference_mode_enabled())
        if self._made_for != made_for or self._tables[0] is None or self._tables[0].shape[0] < length:
            with torch.autocast(like.device.type, enabled=False):
                self._tables, self._made_for = self._computed(length, like), made_for
        return self._tables

    def _computed(self, length: int, like: Tensor) -> tuple[Tensor | None, ...]:
        positions = torch.arange(length, device=like.device, dtype=torch.float32)
        # Angles of large positions need float32, whatever the module was cast to.
        columns = torch.arange(0, self.dim, 2, device=like.device, dtype=torch.float32)
        angles = positions[:, None] * self.base ** (-columns / self.dim)
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            return cos.to(like.dtype), sin.to(like.dtype), None, None
        power = self.scale.to(like.device, torch.float32) ** ((positions - length // 2) / self.scale_base)[:, None]
        return tuple((t * s).to(like.dtype) for s in (power, 1.0 / power) for t in (cos, sin))

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turns qkv, (B, S, 3, H, D) or (B, S, H + 2 * Hkv, D) with num_heads_q, in place; or q = qkv, (B, S, H, D),
        and kv, (B, S, 2, Hkv, D).

        seqlen_offset: position of the first row, one or (B,); then max_seqlen says how long the tables must be.
        """
        length = max_seqlen
        if length is None and isinstance(seqlen_offset, int):
            length = qkv.shape[1] + seqlen_offset
        cos, sin, cos_k, sin_k = self.tables(qkv.shape[1] if length is None else length, qkv)
        assert cos is not None and sin is not None
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )  # fmt: skip
        q = _turned_in_place(qkv, [(qkv, cos, sin)], self.interleaved, seqlen_offset, None)
        keys = (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
        return q, apply_rotary_emb_kv_(kv, *keys, self.interleaved, seqlen_offset)
