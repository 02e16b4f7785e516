"""Sample problems and workloads of the rotary embedding, its definition in plain torch; torch has no peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastattn.cases import Arguments, Case, Sampler, Suite, Workload
from fastattn.ops.rotary.op import apply_rotary_emb

Draw = Callable[..., Tensor]


def definition(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotation written down, in the dtype of x."""
    if cu_seqlens is None:
        offsets = torch.as_tensor(seqlen_offsets, device=x.device).expand(x.shape[0])
        at = offsets[:, None] + torch.arange(x.shape[1], device=x.device)
    else:
        lengths = cu_seqlens.diff()
        offsets = torch.as_tensor(seqlen_offsets, device=x.device).expand(lengths.shape[0])
        at = torch.cat([o + torch.arange(int(n), device=x.device) for o, n in zip(offsets, lengths, strict=True)])
    c, s = (table.to(x.dtype)[at.long()].unsqueeze(-2) for table in (cos, sin))
    half, rest = cos.shape[1], x[..., 2 * cos.shape[1] :]
    if interleaved:
        a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        return torch.cat((torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2), rest), -1)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat((a * c - b * s, b * c + a * s, rest), -1)


def _contiguous(s: Sampler, *shape: int) -> Tensor:
    return s.normal(*shape)


def _heads_first(s: Sampler, *shape: int) -> Tensor:
    return s.normal(*shape[:-3], shape[-2], shape[-3], shape[-1]).transpose(-2, -3)


def _inside(s: Sampler, *shape: int) -> Tensor:
    """One of three in a packed projection, at an address aligned to nothing."""
    return s.normal(*shape[:-2], 3, shape[-2], shape[-1] + 3)[..., 1, :, 1:-2]


def _expanded(s: Sampler, *shape: int) -> Tensor:
    return s.normal(*shape[:-2], 1, shape[-1]).expand(shape)


def _build(
    *shape: int, rotary_dim: int, positions: int | None = None, draw: Draw = _contiguous, wide: bool = False,
    offsets: tuple[int, ...] | None = None, ends: tuple[int, ...] | None = None, **call: Any,
) -> Callable[[Sampler], Arguments]:  # fmt: skip
    """wide: cos and sin are float32. offsets: of every sequence. ends: of packed sequences."""

    def build(s: Sampler) -> Arguments:
        arguments: Arguments = {"x": draw(s, *shape), **call}
        reach = max(offsets) if offsets else call.get("seqlen_offsets", 0)
        count = positions or shape[0 if ends else 1] + reach
        angle = torch.rand(count, rotary_dim // 2, generator=s.generator) * 6.2831853
        dtype = torch.promote_types(s.dtype, torch.float32) if wide else s.dtype
        arguments["cos"], arguments["sin"] = (t.to(s.device, dtype) for t in (angle.cos(), angle.sin()))
        if offsets:
            arguments["seqlen_offsets"] = torch.tensor(offsets, dtype=torch.int32, device=s.device)
        if ends:
            arguments["cu_seqlens"] = torch.tensor((0, *ends), dtype=torch.int32, device=s.device)
        return arguments

    return build


def _cases() -> Iterator[Case]:
    for style in (False, True):
        kind = "neighbours" if style else "halves"
        for dim in (2, 6, 16, 30, 32, 64, 66, 128, 250):
            yield Case(f"{kind} {dim}", _build(2, 9, 3, dim, rotary_dim=dim, interleaved=style), core=dim in (6, 66))
        for dim in (16, 50, 98):
            yield Case(f"{kind} {dim} of 100", _build(2, 9, 3, 100, rotary_dim=dim, interleaved=style), core=dim == 50)
        yield Case(f"{kind} none of 8", _build(2, 9, 3, 8, rotary_dim=0, interleaved=style))
        yield Case(f"{kind} wide tables", _build(2, 9, 3, 64, rotary_dim=48, wide=True, interleaved=style), core=True)
        yield Case(f"{kind} offset", _build(2, 9, 3, 64, rotary_dim=64, seqlen_offsets=5, interleaved=style))
        yield Case(f"{kind} offsets", _build(3, 9, 3, 64, rotary_dim=64, offsets=(0, 17, 4), interleaved=style),
                   core=True)  # fmt: skip
        yield Case(f"{kind} packed", _build(20, 3, 64, rotary_dim=64, ends=(7, 7, 20), max_seqlen=13,
                                            interleaved=style), core=True)  # fmt: skip
        yield Case(f"{kind} packed, offsets", _build(20, 3, 40, rotary_dim=24, ends=(7, 19, 20), offsets=(3, 0, 9),
                                                     interleaved=style))  # fmt: skip
        for name, draw in {"heads first": _heads_first, "inside": _inside, "expanded": _expanded}.items():
            yield Case(f"{kind} {name}", _build(2, 9, 3, 64, rotary_dim=50, draw=draw, interleaved=style),
                       core=name == "inside")  # fmt: skip
        yield Case(f"{kind} many rows", _build(3, 700, 2, 32, rotary_dim=32, interleaved=style))
    for shape in ((0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)):
        yield Case(f"empty {'x'.join(map(str, shape))}", _build(*shape, rotary_dim=8, positions=5))


def workload(
    batch: int, length: int, heads: int, dim: int, *, interleaved: bool = False, quick: bool = False
) -> Workload:
    size = batch * length * heads * dim
    return Workload(
        f"B{batch} S{length} H{heads} D{dim}{' interleaved' if interleaved else ''}",
        _build(batch, length, heads, dim, rotary_dim=dim, interleaved=interleaved),
        forward_flops=3 * size,
        backward_flops=3 * size,
        forward_elements=2 * size,
        backward_elements=2 * size,
        quick=quick,
    )


WORKLOADS = (
    workload(1, 1024, 12, 64, quick=True),
    workload(1, 1024, 12, 64, interleaved=True),
    workload(4, 4096, 32, 128, quick=True),
    workload(4, 4096, 32, 128, interleaved=True),
)

SUITES = (
    Suite(
        name="rotary",
        function=apply_rotary_emb,
        truth=definition,
        peer=definition,
        differentiable=("x",),
        results=("output",),
        cases=tuple(_cases()),
        workloads=WORKLOADS,
    ),
)
