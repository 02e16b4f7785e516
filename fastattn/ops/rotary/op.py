"""Rotary position embedding: the public function and the op's contract.

Columns 2i and 2i + 1 (interleaved), or i and i + rotary_dim / 2, of a row at position p are turned by the angle whose
cosine and sine are cos[p, i] and sin[p, i]          (Su et al. 2021, "RoFormer", equation 34)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import LIBRARY, Op, Problem, check_size, key_of
from fastattn.numerics import FLOATING

_ARGUMENTS = "Tensor cos, Tensor sin, Tensor? offsets, Tensor? cu_seqlens, int offset, bool interleaved"


@dataclass(frozen=True)
class RotaryProblem(Problem):
    shape: tuple[int, ...]
    rotary_dim: int
    interleaved: bool


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, *tables, ctx.offset, ctx.interleaved = inputs
    ctx.save_for_backward(*tables)


def _backward(kernel: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if grad.stride(-1) != 1 and grad.shape[-1] > 1:
        grad = grad.contiguous()
    return kernel(grad, *ctx.saved_tensors, ctx.offset, ctx.interleaved), None, None, None, None, None, None


OP = Op(
    "rotary",
    forward_schema=f"(Tensor x, {_ARGUMENTS}) -> Tensor",
    backward_schema=f"(Tensor grad, {_ARGUMENTS}) -> Tensor",
    forward_fake=_fake,
    backward_fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def define_in_place(backend: str, kernel: Callable[..., None] | None) -> None:
    """Registers fastattn::rotary_in_place.<backend>, whose schema says that x is written."""
    name = f"rotary_in_place.{backend}"
    LIBRARY.define(f"{name}(Tensor(a!) x, {_ARGUMENTS}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    if kernel is not None:
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{name}", lambda *_: None, lib=LIBRARY)


def _check_index(name: str, tensor: Tensor, x: Tensor, length: int | None) -> None:
    wrong = tensor.dtype not in (torch.int32, torch.int64) or tensor.ndim != 1
    if wrong or (length is not None and tensor.shape[0] != length) or tensor.shape[0] < (length is None):
        shape = "(batch + 1,)" if length is None else f"({length},)"
        raise ValueError(
            f"rotary: {name} must be int32 or int64 of shape {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
        )
    if tensor.device != x.device:
        raise ValueError(f"rotary: {name} is on {tensor.device}, x on {x.device}")


def _check(x: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor | int, cu_seqlens: Tensor | None) -> None:
    if x.dtype not in FLOATING:
        raise ValueError(f"rotary: x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    dims, shape = (4, "(B, S, H, D)") if cu_seqlens is None else (3, "(total, H, D) with cu_seqlens")
    if x.ndim != dims:
        raise ValueError(f"rotary: x must be {shape}, got {x.ndim} dimensions")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"rotary: x must have a last stride of 1, got strides {x.stride()}")
    if cos.ndim != 2 or cos.shape != sin.shape:
        raise ValueError(
            "rotary: cos and sin must be (positions, rotary_dim / 2), both alike, got"
            f" {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    allowed = {x.dtype, torch.float32} if x.dtype != torch.float64 else {x.dtype}
    if cos.dtype not in allowed or sin.dtype != cos.dtype or cos.device != x.device or sin.device != x.device:
        raise ValueError(
            f"rotary: cos and sin must be of the dtype of x, {x.dtype}, or float32 (both alike) and on {x.device}, got"
            f" {cos.dtype} on {cos.device} and {sin.dtype} on {sin.device}"
        )
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(f"rotary: rotary_dim {2 * cos.shape[1]} is more than the head dim {x.shape[-1]}")
    check_size("rotary", "x", x.shape)
    if cu_seqlens is not None:
        _check_index("cu_seqlens", cu_seqlens, x, None)
    if isinstance(offsets, Tensor):
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _check_index("seqlen_offsets", offsets, x, batch)


def _problem(x: Tensor, cos: Tensor, interleaved: bool) -> RotaryProblem:
    return RotaryProblem(x.device.type, x.dtype, tuple(x.shape), 2 * cos.shape[1], interleaved)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """flash_attn.layers.rotary.apply_rotary_emb: turns pairs of columns by an angle that grows with the position.

    Args:
        x: (B, S, H, D), or (total, H, D) with cu_seqlens; float32, bfloat16, float16 or float64. Any strides but the
            last, which is 1.
        cos, sin: (positions, rotary_dim / 2) in the dtype of x or float32; rotary_dim <= D, the other columns are
            copied. They have no gradient.
        interleaved: turn columns 2i and 2i + 1 (GPT-J) instead of i and i + rotary_dim / 2 (GPT-NeoX).
        inplace: write to x and return it; x may not need a gradient then.
        seqlen_offsets: the position of every sequence's first row: one int, or (B,) int32 or int64.
        cu_seqlens: (B + 1,) int32 or int64, where the packed sequences begin and end: from 0 to total.
        max_seqlen: not needed; the longest packed sequence, for callers that pass it.
        backend: serve with this backend or raise BackendUnsupported.

    Returns: contiguous, the shape and dtype of x; arithmetic is float32 (float64 for float64).
    Raises: ValueError for shapes, dtypes or strides that do not fit; RuntimeError for positions that cos and sin do
        not have and cu_seqlens that are not ascending from 0 to total (not on a GPU, where the nearest position that
        they have is taken).
    """
    offset = 0 if isinstance(seqlen_offsets, Tensor) else int(seqlen_offsets)
    offsets = seqlen_offsets if isinstance(seqlen_offsets, Tensor) else None
    if torch.compiler.is_compiling():
        _check(x, cos, sin, seqlen_offsets, cu_seqlens)
        bound = OP.resolve(_problem(x, cos, interleaved), backend)
        compute = bound.public
    else:
        signature = (
            x.shape, x.stride()[-1:], x.dtype, x.device, cos.shape, cos.dtype, cos.device, sin.shape, sin.dtype,
            sin.device, interleaved, key_of(offsets), key_of(cu_seqlens),
        )  # fmt: skip

        def problem() -> RotaryProblem:
            _check(x, cos, sin, seqlen_offsets, cu_seqlens)
            return _problem(x, cos, interleaved)

        bound = OP.resolve_cached(signature, problem, backend)
        compute = bound.run
    tables = [t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin)]
    if not inplace:
        return compute(x, *tables, offsets, cu_seqlens, offset, interleaved)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("rotary: inplace=True would change a tensor that needs a gradient")
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"rotary: inplace=True needs memory of its own for every element, got strides {x.stride()}")
    getattr(torch.ops.fastattn.rotary_in_place, bound.backend)(x, *tables, offsets, cu_seqlens, offset, interleaved)
    return x


def _prepare(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    **_: Any,
) -> tuple[Op, RotaryProblem]:
    _check(x, cos, sin, seqlen_offsets, cu_seqlens)
    return OP, _problem(x, cos, interleaved)


apply_rotary_emb.prepare = _prepare  # type: ignore[attr-defined]
