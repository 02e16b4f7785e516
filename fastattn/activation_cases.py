"""Sample problems and workloads of an activation of input + bias: those that GELU and SiLU have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastattn.cases import Arguments, Case, Sampler, Workload
from fastattn.layouts import same_columns, strided_rows, transposed

Draw = Callable[..., Tensor]
Build = Callable[[Sampler], Arguments]


def _contiguous(s: Sampler, *shape: int) -> Tensor:
    return s.normal(*shape, std=2.0)


def _build(
    shape: tuple[int, ...],
    form: Arguments,
    *,
    draw: Draw = _contiguous,
    bias: bool = False,
    bias_dtype: torch.dtype | None = None,
) -> Build:
    def build(s: Sampler) -> Arguments:
        arguments: Arguments = {"input": draw(s, *shape), **form}
        if bias:
            arguments["bias"] = s.normal(shape[-1], dtype=bias_dtype)
        return arguments

    return build


def activation_cases(prefix: str = "", *, huge_gradients: bool = True, **form: str) -> Iterator[Case]:
    """Cases of one form of an activation. prefix: of their names; form: the arguments that ask for it; huge_gradients:
    torch's gradients of values survive whose multiples overflow."""
    prefix = prefix and f"{prefix} "

    def case(name: str, *shape: int, core: bool = False, draw: Draw = _contiguous) -> Iterator[Case]:
        """Without and with a bias."""
        yield Case(f"{prefix}{name}", _build(shape, form, draw=draw), core=core)
        yield Case(f"{prefix}{name} bias", _build(shape, form, draw=draw, bias=True), core=core)

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
    yield Case(f"{prefix}no dims", _build((), form), draws=64)
    yield Case(f"{prefix}float32 bias", _build((20, 90), form, bias=True, bias_dtype=torch.float32), core=True)
    for name, mean, std in (
        ("large values", 0.0, 100.0),
        ("tiny values", 0.0, 1e-4),
        ("far below zero", -4.0, 0.5),
        ("far above zero", 4.0, 0.5),
    ):
        yield Case(
            f"{prefix}{name}",
            _build((20, 90), form, draw=lambda s, *n, mean=mean, std=std: s.normal(*n, mean=mean, std=std)),
        )

    yield Case(f"{prefix}up to 1e4", _build((20, 90), form, draw=lambda s, *n: s.uniform(*n, low=-1e4, high=1e4)))

    def strange(s: Sampler) -> Arguments:
        x = s.normal(4, 40)
        x[0, 3], x[1, 4], x[2, 5], x[3, 39] = torch.nan, torch.inf, -torch.inf, torch.nan
        return {"input": x, **form}

    yield Case(f"{prefix}NaN and infinities", strange, core=True)

    def huge(s: Sampler) -> Arguments:
        """As large as the dtype goes: no multiple or power of them may overflow where the result does not."""
        top = torch.finfo(s.dtype).max
        x = s.normal(4, 40) * (top / 16)
        x[0, 3], x[1, 4] = top, -top
        return {"input": x, **form}

    yield Case(f"{prefix}huge values", huge, differentiable=None if huge_gradients else ())


def activation_workload(
    name: str, rows: int, columns: int, *, quick: bool = False, bias: bool = False, **form: str
) -> Workload:
    """Of rows x columns. bias: as after the first product of a feed-forward layer."""
    size = rows * columns
    return Workload(
        " ".join((f"{rows}x{columns}", *filter(None, (name, "bias" if bias else "")))),
        _build((rows, columns), form, bias=bias),
        forward_flops=20 * size,
        backward_flops=30 * size,
        forward_elements=2 * size + (columns if bias else 0),
        backward_elements=3 * size + (2 * columns if bias else 0),
        quick=quick,
    )
