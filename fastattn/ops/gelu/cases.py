"""Sample problems and workloads of GELU, its definition in plain torch, and torch's peer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.cases import Arguments, Case, Sampler, Suite, Workload
from fastattn.layouts import same_columns, strided_rows, transposed
from fastattn.ops.gelu.op import gelu

Draw = Callable[..., Tensor]


def definition(input: Tensor, approximate: str = "none", *, bias: Tensor | None = None) -> Tensor:
    """GELU written down, in the dtype of its inputs."""
    x = input if bias is None else input + bias
    if approximate == "tanh":
        return 0.5 * x * (1.0 + (math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))).tanh())
    return 0.5 * x * (1.0 + (x / math.sqrt(2.0)).erf())


def peer(input: Tensor, approximate: str = "none", *, bias: Tensor | None = None) -> Tensor:
    """torch's gelu after torch's addition, in the input's dtype."""
    return F.gelu(input if bias is None else input + bias.to(input.dtype), approximate=approximate)


def _contiguous(s: Sampler, *shape: int) -> Tensor:
    return s.normal(*shape, std=2.0)


def _build(
    shape: tuple[int, ...],
    approximate: str,
    *,
    draw: Draw = _contiguous,
    bias: bool = False,
    bias_dtype: torch.dtype | None = None,
) -> Callable[[Sampler], Arguments]:
    def build(s: Sampler) -> Arguments:
        arguments: Arguments = {"input": draw(s, *shape), "approximate": approximate}
        if bias:
            arguments["bias"] = s.normal(shape[-1], dtype=bias_dtype)
        return arguments

    return build


def _cases() -> Iterator[Case]:
    for approximate in ("none", "tanh"):

        def case(
            name: str, *shape: int, kind: str = approximate, core: bool = False, draw: Draw = _contiguous
        ) -> Iterator[Case]:
            """Without and with a bias."""
            yield Case(f"{kind} {name}", _build(shape, kind, draw=draw), core=core)
            yield Case(f"{kind} {name} bias", _build(shape, kind, draw=draw, bias=True), core=core)

        for columns in (1, 3, 15, 16, 17, 33, 64, 100, 257, 4099):
            yield from case(f"{columns} columns", 7, columns, core=columns in (33, 100))
        yield from case("very long rows", 3, 40000)
        yield from case("many rows", 3000, 9, core=True)
        yield from case("chunks of rows", 533, 70)
        yield from case("1 row", 1, 200)
        yield from case("one dim", 50)
        yield from case("4 dims", 2, 3, 4, 50)
        yield from case("strided rows", 12, 70, draw=strided_rows, core=True)
        yield from case("strided rows of 3 dims", 3, 12, 70, draw=strided_rows)
        yield from case("transposed", 12, 70, draw=transposed)
        yield from case("expanded", 12, 70, draw=same_columns)
        yield from case("no rows", 0, 5)
        yield from case("no columns", 5, 0)
        yield Case(f"{approximate} no dims", _build((), approximate), draws=64)
        yield Case(
            f"{approximate} float32 bias", _build((20, 90), approximate, bias=True, bias_dtype=torch.float32), core=True
        )
        for name, mean, std in (
            ("large values", 0.0, 100.0),
            ("tiny values", 0.0, 1e-4),
            ("far below zero", -4.0, 0.5),
            ("far above zero", 4.0, 0.5),
        ):
            yield Case(
                f"{approximate} {name}",
                _build((20, 90), approximate, draw=lambda s, *n, mean=mean, std=std: s.normal(*n, mean=mean, std=std)),
            )

        def strange(s: Sampler, kind: str = approximate) -> Arguments:
            x = s.normal(4, 40)
            x[0, 3], x[1, 4], x[2, 5], x[3, 39] = torch.nan, torch.inf, -torch.inf, torch.nan
            return {"input": x, "approximate": kind}

        yield Case(f"{approximate} NaN and infinities", strange, core=True)

        def huge(s: Sampler, kind: str = approximate) -> Arguments:
            """As large as the dtype goes: no power of them may overflow where the result does not."""
            return {"input": s.normal(4, 40) * (torch.finfo(s.dtype).max / 16), "approximate": kind}

        # torch's own cube of these overflows, and its gradient is NaN.
        yield Case(f"{approximate} huge values", huge, differentiable=())


def workload(rows: int, columns: int, *, approximate: str = "tanh", quick: bool = False) -> Workload:
    """Bias and GELU, as after the first product of a feed-forward layer."""
    size = rows * columns
    return Workload(
        f"{rows}x{columns} {approximate} bias",
        _build((rows, columns), approximate, bias=True),
        forward_flops=20 * size,
        backward_flops=30 * size,
        forward_elements=2 * size + columns,
        backward_elements=3 * size + 2 * columns,
        quick=quick,
    )


WORKLOADS = (
    workload(1024, 3072, quick=True),
    workload(4096, 3072, approximate="none"),
    workload(4096, 4096, quick=True),
    workload(4096, 4096, approximate="none"),
)

SUITES = (
    Suite(
        name="gelu",
        function=gelu,
        truth=definition,
        peer=peer,
        differentiable=("input", "bias"),
        results=("output",),
        cases=tuple(replace(case, draws=max(case.draws, 8)) for case in _cases()),
        workloads=WORKLOADS,
    ),
)
