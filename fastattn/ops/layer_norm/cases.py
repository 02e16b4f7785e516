"""Sample problems and workloads of LayerNorm and of the sum's, their definitions in plain torch, and torch's peers."""

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
from fastattn.ops.layer_norm.op import add_layer_norm, layer_norm

Draw = Callable[..., Tensor]


def definition(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    weight_offset: float = 0.0,
) -> Any:
    """LayerNorm written down, in the dtype of its inputs."""
    total = input if residual is None else input + residual
    dims = tuple(range(-len(normalized_shape), 0))
    mean = total.mean(dims, keepdim=True)
    variance = (total - mean).square().mean(dims, keepdim=True)
    output = (total - mean) / (variance + eps).sqrt()
    if weight is not None:
        output = output * (weight + weight_offset)
    if bias is not None:
        output = output + bias
    return (output, total) if prenorm else output


def peer(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    prenorm: bool = False,
    weight_offset: float = 0.0,
) -> Any:
    """torch's layer_norm after torch's addition; parameters in dtypes that it refuses are converted to the input's."""
    total = input if residual is None else input + residual
    if weight is not None and weight_offset != 0.0:
        weight = weight + weight_offset
    given = {t.dtype for t in (weight, bias) if t is not None}
    if given not in (set(), {total.dtype}, {torch.float32}) or total.dtype not in (torch.bfloat16, torch.float16):
        weight, bias = (None if t is None else t.to(total.dtype) for t in (weight, bias))
    output = F.layer_norm(total, tuple(normalized_shape), weight, bias, eps)
    return (output, total) if prenorm else output


def _build(
    shape: tuple[int, ...],
    dims: int = 1,
    *,
    weight: bool = True,
    bias: bool = True,
    parameters: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
    residual: bool = False,
    residual_dtype: torch.dtype | None = None,
    draw: Draw = contiguous,
    **call: Any,
) -> Callable[[Sampler], Arguments]:
    normalized_shape = shape[len(shape) - dims :]

    def build(s: Sampler) -> Arguments:
        arguments: Arguments = {"input": draw(s, *shape), "normalized_shape": normalized_shape, **call}
        if weight:
            arguments["weight"] = s.normal(*normalized_shape, mean=1.0, std=0.5, dtype=parameters)
        if bias:
            arguments["bias"] = s.normal(*normalized_shape, dtype=bias_dtype or parameters)
        if residual:
            arguments["residual"] = draw(s, *shape).to(residual_dtype or s.dtype)
        return arguments

    return build


def _outlier_in_front(s: Sampler) -> Arguments:
    """The first columns say nothing of the mean."""
    arguments = _build((20, 500))(s)
    arguments["input"][:, 0] += 3000.0
    return arguments


def _halves_apart(s: Sampler) -> Arguments:
    arguments = _build((20, 1000))(s)
    arguments["input"][:, 32:] += 50.0
    return arguments


def _cases() -> Iterator[Case]:
    for columns in (2, 3, 7, 15, 16, 17, 31, 33, 64, 100, 127, 128, 255, 257, 768, 1000, 4099):
        core = columns in (3, 33, 768, 4099)
        yield Case(f"{columns} columns", _build((9, columns)), core=core)
    # The input's gradient is 0 there: what is left of it is rounding.
    yield Case("1 column", _build((9, 1)), differentiable=("weight", "bias"))
    yield Case("1 row", _build((1, 300)))
    yield Case("one dim", _build((77,)))
    yield Case("many rows", _build((1200, 24)), core=True)
    yield Case("many short rows", _build((5000, 5)))
    yield Case("3 dims", _build((4, 30, 96)))
    yield Case("2 normalised dims", _build((6, 10, 12), dims=2), core=True)
    yield Case("3 normalised dims", _build((5, 3, 4, 10), dims=3))
    yield Case("everything normalised", _build((5, 13), dims=2))
    yield Case("no affine", _build((20, 100), weight=False, bias=False), core=True)
    yield Case("no affine, residual", _build((20, 100), weight=False, bias=False, residual=True))
    yield Case("weight only", _build((20, 100), bias=False))
    yield Case("bias only", _build((20, 100), weight=False))
    yield Case("float32 parameters", _build((20, 100), parameters=torch.float32), core=True)
    yield Case("float64 parameters", _build((20, 100), parameters=torch.float64))
    yield Case("bfloat16 parameters", _build((20, 100), parameters=torch.bfloat16))
    yield Case("parameters of two dtypes", _build((20, 100), parameters=torch.float32, bias_dtype=torch.bfloat16))
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
    yield Case("huge offset", _build((30, 200), draw=lambda s, *n: s.normal(*n, mean=1000.0)), core=True)
    yield Case("huge offset in long rows", _build((4, 5000), draw=lambda s, *n: s.normal(*n, mean=-3000.0, std=2.0)))
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
    yield Case("a mean of ten thousand", _build((6, 300), draw=lambda s, *n: s.normal(*n, mean=1e4, std=100.0)))
    yield Case("a tiny variance", _build((30, 100), draw=lambda s, *n: s.normal(*n, mean=0.0, std=1e-6)))
    yield Case("an outlier in front", _outlier_in_front)
    yield Case("halves apart", _halves_apart)
    yield Case("no rows", _build((0, 16)))
    yield Case("no rows, residual", _build((0, 16), residual=True, prenorm=True))
    yield Case("no rows in the middle", _build((3, 0, 16)))

    def nan_row(s: Sampler) -> Arguments:
        arguments = _build((6, 40))(s)
        arguments["input"][2, 5] = torch.nan
        arguments["input"][4, 1] = torch.inf
        return arguments

    yield Case("NaN and infinity in rows", nan_row, differentiable=("input",))


def _add_cases() -> Iterator[Case]:
    add = functools.partial(_build, residual=True)
    for columns in (1, 2, 7, 31, 33, 64, 100, 768, 1025, 4099):
        differentiable = ("weight", "bias") if columns == 1 else None
        yield Case(f"{columns} columns", add((9, columns)), differentiable=differentiable, core=columns in (7, 768))
    yield Case("2 normalised dims", add((6, 10, 12), dims=2))
    yield Case("no affine", add((20, 100), weight=False, bias=False))
    yield Case("float32 parameters", add((20, 100), parameters=torch.float32), core=True)
    yield Case("float32 residual", add((21, 100), residual_dtype=torch.float32, parameters=torch.float32), core=True)
    yield Case("bfloat16 residual", add((21, 100), residual_dtype=torch.bfloat16))
    yield Case("weight offset", add((30, 100), weight_offset=1.0))
    for p in (0.0, 0.1, 0.5, 1.0):
        yield Case(f"dropout {p}", add((40, 133), dropout_p=p, seed=1234), core=p == 0.1)
    yield Case("dropout of long rows", add((5, 3001), dropout_p=0.3, seed=2**63 - 1))
    yield Case("dropout of 1 column", add((50, 1), dropout_p=0.5, seed=9), differentiable=("weight", "bias"))
    yield Case("dropout of 2 dims", add((3, 7, 5, 6), dims=2, dropout_p=0.2, seed=0))
    yield Case(
        "dropout into a float32 residual",
        add((21, 100), residual_dtype=torch.float32, parameters=torch.float32, dropout_p=0.25, seed=5),
        core=True,
    )
    for name, draw, shape in (
        ("strided rows", strided_rows, (12, 70)),
        ("transposed", transposed, (12, 70)),
        ("permuted rows", permuted_rows, (3, 6, 4, 50)),
        ("expanded", same_rows, (8, 70)),
    ):
        yield Case(name, add(shape, draw=draw), core=name == "strided rows")
        yield Case(f"{name} with dropout", add(shape, draw=draw, dropout_p=0.3, seed=3))
    yield Case("no rows", add((0, 16), dropout_p=0.5, seed=1))


def workload(rows: int, columns: int, *, residual: bool = False, quick: bool = False) -> Workload:
    size = rows * columns
    return Workload(
        f"{rows}x{columns}",
        _build((rows, columns), residual=residual),
        forward_flops=(8 + residual) * size,
        backward_flops=(13 + residual) * size,
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
        name="layer_norm",
        function=layer_norm,
        truth=definition,
        peer=peer,
        differentiable=("input", "weight", "bias", "residual"),
        results=("output", "sum"),
        cases=tuple(replace(case, draws=4) for case in _cases()),
        workloads=WORKLOADS,
    ),
    Suite(
        name="add_layer_norm",
        function=add_layer_norm,
        truth=of_sum(definition),
        peer=of_sum(peer),
        differentiable=("input", "weight", "bias", "residual"),
        results=("output", "sum"),
        cases=tuple(replace(case, draws=4) for case in _add_cases()),
        workloads=ADD_WORKLOADS,
    ),
)
