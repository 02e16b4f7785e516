"""Sample problems and workloads of SwiGLU; torch's silu and product, in float64, are its truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.cases import Arguments, Case, Sampler, Suite, Workload
from fastattn.ops.swiglu.op import swiglu

Draw = Callable[..., tuple[Tensor, Tensor]]


def peer(gate: Tensor, up: Tensor) -> Tensor:
    """torch's silu, then torch's product."""
    return F.silu(gate) * up


def _contiguous(s: Sampler, *shape: int) -> tuple[Tensor, Tensor]:
    return s.normal(*shape, std=2.0), s.normal(*shape)


def _packed(s: Sampler, *shape: int) -> tuple[Tensor, Tensor]:
    """Halves of one tensor, each row's gate before its up."""
    gate, up = s.normal(*shape[:-1], 2 * shape[-1]).chunk(2, -1)
    return gate, up


def _strided_rows(s: Sampler, *shape: int) -> tuple[Tensor, Tensor]:
    return s.normal(*shape[:-1], shape[-1] + 7)[..., 3:-4], s.normal(*shape)


def _transposed(s: Sampler, *shape: int) -> tuple[Tensor, Tensor]:
    return s.normal(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2), s.normal(*shape)


def _expanded(s: Sampler, *shape: int) -> tuple[Tensor, Tensor]:
    return s.normal(*shape), s.normal(*shape[:-1], 1).expand(shape)


def _build(shape: tuple[int, ...], draw: Draw = _contiguous) -> Callable[[Sampler], Arguments]:
    def build(s: Sampler) -> Arguments:
        gate, up = draw(s, *shape)
        return {"gate": gate, "up": up}

    return build


def _cases() -> Iterator[Case]:
    for columns in (1, 3, 15, 16, 17, 33, 64, 100, 257, 4099):
        yield Case(f"{columns} columns", _build((7, columns)), core=columns in (33, 100))
        yield Case(f"{columns} columns, packed", _build((7, columns), _packed), core=columns == 100)
    yield Case("very long rows", _build((3, 40000), _packed))
    yield Case("many rows", _build((3000, 9)))
    yield Case("one dim", _build((50,)))
    yield Case("no dims", _build(()), draws=256)
    yield Case("4 dims, packed", _build((2, 3, 4, 50), _packed))
    yield Case("strided rows", _build((3, 12, 70), _strided_rows), core=True)
    yield Case("transposed", _build((12, 70), _transposed))
    yield Case("expanded", _build((12, 70), _expanded))
    yield Case("no rows", _build((0, 5)))
    yield Case("no columns", _build((5, 0)))
    for name, mean, std in (
        ("large values", 0.0, 30.0),
        ("tiny values", 0.0, 1e-4),
        ("far below zero", -20.0, 2.0),
        ("far above zero", 20.0, 2.0),
    ):
        yield Case(
            name, _build((20, 90), lambda s, *n, mean=mean, std=std: (s.normal(*n, mean=mean, std=std), s.normal(*n)))
        )

    def strange(s: Sampler) -> Arguments:
        gate, up = s.normal(4, 40), s.normal(4, 40)
        gate[0, 3], gate[1, 4], gate[2, 5], up[3, 39], up[3, 0] = torch.nan, torch.inf, -torch.inf, torch.nan, torch.inf
        return {"gate": gate, "up": up}

    yield Case("NaN and infinities", strange, core=True)

    def huge(s: Sampler) -> Arguments:
        return {"gate": s.normal(4, 40) * (torch.finfo(s.dtype).max / 16), "up": s.normal(4, 40)}

    yield Case("huge values", huge)


def workload(rows: int, columns: int, *, packed: bool = False, quick: bool = False) -> Workload:
    size = rows * columns
    return Workload(
        f"{rows}x{columns}{' packed' if packed else ''}",
        _build((rows, columns), _packed if packed else _contiguous),
        forward_flops=15 * size,
        backward_flops=25 * size,
        forward_elements=3 * size,
        backward_elements=5 * size,
        quick=quick,
    )


WORKLOADS = (
    workload(1024, 2816, quick=True),
    workload(4096, 2816, quick=True),
    workload(4096, 2816, packed=True),
    workload(4096, 4096),
)

SUITES = (
    Suite(
        name="swiglu",
        function=swiglu,
        truth=peer,
        peer=peer,
        differentiable=("gate", "up"),
        results=("output",),
        cases=tuple(replace(case, draws=max(case.draws, 8)) for case in _cases()),
        workloads=WORKLOADS,
    ),
)
