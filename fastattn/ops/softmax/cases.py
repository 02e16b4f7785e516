"""Sample problems and workloads of softmax and log_softmax, their definitions in plain torch, and torch's peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.cases import Arguments, Case, Sampler, Suite, Workload
from fastattn.ops.softmax.op import log_softmax, softmax

Draw = Callable[..., Tensor]


def definition(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """softmax written down, in the dtype of its input (the truth of dtype= is that of the input as it is)."""
    shifted = input - (input.amax(dim, keepdim=True) if input.numel() else 0.0)
    exponentials = shifted.exp()
    return exponentials / exponentials.sum(dim, keepdim=True)


def log_definition(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """log_softmax written down, in the dtype of its input."""
    shifted = input - (input.amax(dim, keepdim=True) if input.numel() else 0.0)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


def _contiguous(s: Sampler, *shape: int) -> Tensor:
    return s.normal(*shape, std=2.0)


def _strided_rows(s: Sampler, *shape: int) -> Tensor:
    return s.normal(*shape[:-1], shape[-1] + 7)[..., 3:-4]


def _transposed(s: Sampler, *shape: int) -> Tensor:
    return s.normal(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


def _permuted(s: Sampler, *shape: int) -> Tensor:
    """The first dimension is the innermost in memory."""
    return s.normal(*shape[1:], shape[0]).movedim(-1, 0)


def _expanded(s: Sampler, *shape: int) -> Tensor:
    return s.normal(*shape[:-1], 1).expand(shape)


def _some_minus_inf(s: Sampler, *shape: int) -> Tensor:
    """A third of the entries are -inf, never a whole row or column."""
    strange = s.chance(*shape, p=0.3)
    strange[..., 0], strange[0] = False, False
    return s.normal(*shape).masked_fill(strange, -torch.inf)


def _build(
    shape: tuple[int, ...], dim: int = -1, draw: Draw = _contiguous, dtype: torch.dtype | None = None
) -> Callable[[Sampler], Arguments]:
    def build(s: Sampler) -> Arguments:
        arguments: Arguments = {"input": draw(s, *shape), "dim": dim}
        if dtype is not None:
            arguments["dtype"] = torch.promote_types(dtype, s.dtype)
        return arguments

    return build


def _cases(log: bool) -> Iterator[Case]:
    for columns in (2, 3, 7, 15, 16, 17, 31, 33, 64, 100, 127, 128, 257, 1000, 4099):
        yield Case(f"{columns} columns", _build((7, columns)), core=columns in (3, 33, 100, 4099))
    yield Case("1 column", _build((7, 1)), differentiable=())  # its gradient is 0: what is left is rounding
    yield Case("very long rows", _build((3, 50304)), core=True)
    yield Case("many rows", _build((3000, 9)))
    for dim in (0, 1, 2, 3, -2, -4):
        yield Case(f"dim {dim} of 4", _build((5, 7, 6, 10), dim=dim), core=dim in (0, -2))
    yield Case("dim 0 of 2", _build((33, 65), dim=0), core=True)
    yield Case("long dim 0", _build((3000, 5), dim=0))
    yield Case("dim 1, wide inside", _build((2, 9, 300), dim=1))
    yield Case("one dim", _build((50,), dim=0))
    yield Case("no dims", _build((), dim=0), differentiable=())
    yield Case("to float32", _build((20, 90), dtype=torch.float32), core=True)
    yield Case("to float32, dim 0", _build((20, 90), dim=0, dtype=torch.float32))
    yield Case("large values", _build((20, 90), draw=lambda s, *n: s.normal(*n, std=100.0)), core=True)
    yield Case("very large values", _build((20, 90), draw=lambda s, *n: s.normal(*n, std=10000.0)))
    yield Case("tiny values", _build((20, 90), draw=lambda s, *n: s.normal(*n, std=1e-4)))
    yield Case("far from zero", _build((20, 90), draw=lambda s, *n: s.normal(*n, mean=-1000.0)))
    yield Case("equal values", _build((20, 90), draw=lambda s, *n: s.normal(*n, mean=3.0, std=0.0)))
    yield Case("-inf entries", _build((20, 90), draw=_some_minus_inf), core=True)
    yield Case("-inf entries, dim 0", _build((20, 90), dim=0, draw=_some_minus_inf))

    def nan_rows(s: Sampler) -> Arguments:
        x = s.normal(6, 40)
        x[1], x[3, 5], x[4, 7] = -torch.inf, torch.nan, torch.inf
        return {"input": x, "dim": -1}

    yield Case("rows of -inf, NaN, inf", nan_rows, differentiable=() if log else None, core=True)
    layouts: dict[str, tuple[Draw, tuple[int, ...]]] = {
        "strided rows": (_strided_rows, (12, 70)),
        "strided rows of 3 dims": (_strided_rows, (3, 12, 70)),
        "transposed": (_transposed, (12, 70)),
        "permuted": (_permuted, (4, 6, 50)),
        "expanded": (_expanded, (12, 70)),
    }
    for name, (draw, shape) in layouts.items():
        for dim in (-1, 0):
            yield Case(f"{name}, dim {dim}", _build(shape, dim=dim, draw=draw), core=name == "permuted")
    for shape, dim in (((0, 5), 1), ((5, 0), 1), ((5, 0), 0), ((2, 0, 3), 2)):
        yield Case(f"empty {'x'.join(map(str, shape))} dim {dim}", _build(shape, dim=dim))


def workload(rows: int, columns: int, *, quick: bool = False) -> Workload:
    size = rows * columns
    return Workload(
        f"{rows}x{columns}",
        _build((rows, columns)),
        forward_flops=5 * size,
        backward_flops=4 * size,
        forward_elements=2 * size,
        backward_elements=3 * size,
        quick=quick,
    )


WORKLOADS = (
    workload(4096, 768, quick=True),
    workload(8192, 1024),
    workload(4096, 4096),
    workload(512, 32768, quick=True),
    workload(1024, 50304),
)

SUITES = (
    Suite(
        name="softmax",
        function=softmax,
        truth=definition,
        peer=F.softmax,
        differentiable=("input",),
        results=("output",),
        cases=tuple(replace(case, draws=8) for case in _cases(log=False)),
        workloads=WORKLOADS,
    ),
    Suite(
        name="log_softmax",
        function=log_softmax,
        truth=log_definition,
        peer=F.log_softmax,
        differentiable=("input",),
        results=("output",),
        cases=tuple(replace(case, draws=8) for case in _cases(log=True)),
        workloads=WORKLOADS,
    ),
)
