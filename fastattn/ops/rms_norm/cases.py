"""Sample problems and workloads of RMSNorm and of the sum's, their definitions in plain torch, and torch's peers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.cases import Arguments, Case, Sampler, Suite, Workload
from fastattn.layouts import contiguous, permuted_rows, same_rows, strided_rows, transposed
from fastattn.norms import of_sum
from fastattn.ops.rms_norm.op import add_rms_norm, rms_norm

Draw = Callable[..., Tensor]


def definition(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    weight_offset: float = 0.0,
) -> Any:
    """RMSNorm written down, in the dtype of its inputs."""
    total = input if residual is None else input + residual
    dims = tuple(range(-len(normalized_shape), 0))
    output = total / (total.square().mean(dims, keepdim=True) + eps).sqrt()
    if weight is not None:
        output = output * (weight + weight_offset)
    return (output, total) if prenorm else output


def peer(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    weight_offset: float = 0.0,
) -> Any:
    """torch's rms_norm after torch's addition; its weight has the input's dtype."""
    total = input if residual is None else input + residual
    if weight is not None:
        weight = (weight + weight_offset if weight_offset != 0.0 else weight).to(total.dtype)
    output = F.rms_norm(total, tuple(normalized_shape), weight, eps)
    return (output, total) if prenorm else output


def _build(
    shape: tuple[int, ...],
    dims: int = 1,
    *,
    weight: bool = True,
    parameters: torch.dtype | None = None,
    residual: bool = False,
    residual_dtype: torch.dtype | None = None,
    draw: Draw = contiguous,
    eps: float = 1e-6,
    **call: Any,
) -> Callable[[Sampler], Arguments]:
    normalized_shape = shape[len(shape) - dims :]

    def build(s: Sampler) -> Arguments:
        arguments: Arguments = {"input": draw(s, *shape), "normalized_shape": normalized_shape, "eps": eps, **call}
        if weight:
            arguments["weight"] = s.normal(*normalized_shape, mean=1.0, std=0.5, dtype=parameters)
        if residual:
            arguments["residual"] = draw(s, *shape).to(residual_dtype or s.dtype)
        return arguments

    return build


def _cases() -> Iterator[Case]:
    for columns in (2, 3, 7, 15, 16, 17, 31, 33, 64, 100, 127, 128, 255, 257, 768, 1000, 4099):
        yield Case(f"{columns} columns", _build((9, columns)), core=columns in (3, 33, 768, 4099))
    yield Case("1 column", _build((9, 1)), differentiable=("weight",))  # the input's gradient is eps' alone
    yield Case("1 row", _build((1, 300)))
    yield Case("one dim", _build((77,)))
    yield Case("many rows", _build((1200, 24)), core=True)
    yield Case("many short rows", _build((5000, 5)))
    yield Case("3 dims", _build((4, 30, 96)))
    yield Case("2 normalised dims", _build((6, 10, 12), dims=2), core=True)
    yield Case("3 normalised dims", _build((5, 3, 4, 10), dims=3))
    yield Case("everything normalised", _build((5, 13), dims=2))
    yield Case("no weight", _build((20, 100), weight=False), core=True)
    yield Case("no weight, residual", _build((20, 100), weight=False, residual=True))
    yield Case("float32 weight", _build((20, 100), parameters=torch.float32), core=True)
    yield Case("float64 weight", _build((20, 100), parameters=torch.float64))
    yield Case("bfloat16 weight", _build((20, 100), parameters=torch.bfloat16))
    yield Case("residual", _build((30, 100), residual=True), core=True)
    yield Case("prenorm", _build((30, 101), residual=True, prenorm=True), core=True)
    yield Case("prenorm without residual", _build((30, 100), prenorm=True))
    yield Case("prenorm of 2 dims", _build((7, 8, 9), dims=2, residual=True, prenorm=True))
    yield Case("residual in float32", _build((30, 100), residual=True, residual_dtype=torch.float32))
    yield Case("weight offset", _build((30, 100), weight_offset=1.0), core=True)
    yield Case("weight offset in float32", _build((30, 100), parameters=torch.float32, weight_offset=-0.5))
    yield Case("weight offset without weight", _build((30, 100), weight=False, weight_offset=1.0))
    yield Case("large eps", _build((30, 100), eps=0.5))
    yield Case("no eps", _build((30, 100), eps=0.0))
    yield Case("tiny values", _build((30, 100), draw=lambda s, *n: s.normal(*n, std=1e-3)))
    yield Case("large values", _build((30, 100), draw=lambda s, *n: s.normal(*n, std=300.0)))
    yield Case("offset", _build((30, 200), draw=lambda s, *n: s.normal(*n, mean=100.0)), core=True)
    layouts: dict[str, tuple[Draw, tuple[int, ...]]] = {
        "strided rows": (strided_rows, (12, 70)),
        "strided rows of 3 dims": (strided_rows, (3, 12, 70)),
        "transposed": (transposed, (12, 70)),
        "permuted rows": (permuted_rows, (3, 6, 4, 50)),
        "expanded": (same_rows, (8, 70)),
    }
    for name, (draw, shape) in layouts.items():
        yield Case(name, _build(shape, draw=draw), core=name == "strided rows")
        yield Case(f"{name} with residual", _build(shape, draw=draw, residual=True, prenorm=True))
    yield Case("65536 columns", _build((3, 65536)))
    yield Case("100003 columns", _build((2, 100003)))
    yield Case("rows of 2050 columns", _build((11, 2050)))
    yield Case("no rows", _build((0, 16)))
    yield Case("no rows, residual", _build((0, 16), residual=True, prenorm=True))
    yield Case("no rows in the middle", _build((3, 0, 16)))

    def nan_row(s: Sampler) -> Arguments:
        arguments = _build((6, 40))(s)
        arguments["input"][2, 5] = torch.nan
        return arguments

    yield Case("NaN in a row", nan_row, differentiable=("input",))


def _add_cases() -> Iterator[Case]:
    add = functools.partial(_build, residual=True)
    for columns in (1, 2, 7, 31, 33, 64, 100, 768, 1025, 4099):
        differentiable = ("weight",) if columns == 1 else None
        yield Case(f"{columns} columns", add((9, columns)), differentiable=differentiable, core=columns in (7, 768))
    yield Case("2 normalised dims", add((6, 10, 12), dims=2))
    yield Case("no weight", add((20, 100), weight=False))
    yield Case("float32 residual", add((21, 100), residual_dtype=torch.float32, parameters=torch.float32), core=True)
    yield Case("weight offset", add((30, 100), weight_offset=1.0))
    for p in (0.1, 0.5, 1.0):
        yield Case(f"dropout {p}", add((40, 133), dropout_p=p, seed=1234), core=p == 0.1)
    yield Case(
        "dropout into a float32 residual",
        add((21, 100), residual_dtype=torch.float32, parameters=torch.float32, dropout_p=0.25, seed=5),
        core=True,
    )
    yield Case("strided rows", add((12, 70), draw=strided_rows), core=True)
    yield Case("permuted rows with dropout", add((3, 6, 4, 50), draw=permuted_rows, dropout_p=0.3, seed=3))
    yield Case("no rows", add((0, 16), dropout_p=0.5, seed=1))


def workload(rows: int, columns: int, *, residual: bool = False, quick: bool = False) -> Workload:
    size = rows * columns
    return Workload(
        f"{rows}x{columns}",
        _build((rows, columns), residual=residual),
        forward_flops=(4 + residual) * size,
        backward_flops=(9 + residual) * size,
        forward_elements=(4 if residual else 2) * size,
        backward_elements=(4 if residual else 3) * size,
        quick=quick,
    )


WORKLOADS = (
    workload(1024, 768, quick=True),
    workload(4096, 768, quick=True),
    workload(8192, 1024),
    workload(4096, 4096),
)

ADD_WORKLOADS = (
    workload(1024, 768, residual=True),
    workload(4096, 768, residual=True, quick=True),
    workload(8192, 1024, residual=True),
    workload(4096, 4096, residual=True),
)

SUITES = (
    Suite(
        name="rms_norm",
        function=rms_norm,
        truth=definition,
        peer=peer,
        differentiable=("input", "weight", "residual"),
        results=("output", "sum"),
        cases=tuple(replace(case, draws=4) for case in _cases()),
        workloads=WORKLOADS,
    ),
    Suite(
        name="add_rms_norm",
        function=add_rms_norm,
        truth=of_sum(definition),
        peer=of_sum(peer),
        differentiable=("input", "weight", "residual"),
        results=("output", "sum"),
        cases=tuple(replace(case, draws=4) for case in _add_cases()),
        workloads=ADD_WORKLOADS,
    ),
)
