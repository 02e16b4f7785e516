"""Sample problems and workloads of softmax and log_softmax, their definitions in plain torch, and torch's peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.cases import Arguments, Case, Sampler, Suite, Workload
from fastattn.layouts import same_columns, strided_rows, transposed
from fastattn.ops.softmax.op import log_softmax, softmax

Draw = Callable[..., Tensor]


def scores(
    input: Tensor, scale: float, mask: Tensor | None, is_causal: bool, causal_alignment: str
) -> tuple[Tensor, Tensor | None]:
    """scale * input + mask, and where nothing is visible (None: torch's softmax has an opinion everywhere)."""
    x = input * scale if scale != 1.0 else input
    if mask is not None:
        x = x.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else x + mask.to(x.dtype)
    if is_causal:
        rows, columns = x.shape[-2:]
        diagonal = 1 if causal_alignment == "top_left" else columns - rows + 1
        x = x.masked_fill(torch.ones(rows, columns, dtype=torch.bool, device=x.device).triu(diagonal), -torch.inf)
    return x, x == -torch.inf if mask is not None or is_causal else None


def _written_down(x: Tensor, dim: int, log: bool) -> Tensor:
    shifted = x - (x.amax(dim, keepdim=True) if x.numel() else 0.0)
    exponentials = shifted.exp()
    total = exponentials.sum(dim, keepdim=True)
    return shifted - total.log() if log else exponentials / total


def _of_visible(plain: Callable[[Tensor], Tensor], x: Tensor, hidden: Tensor | None, dim: int, log: bool) -> Tensor:
    """plain(x), with rows that see nothing 0 (log: -inf) and without a gradient."""
    if hidden is None or x.numel() == 0:
        return plain(x)
    dead = hidden.all(dim, keepdim=True)
    return plain(x.masked_fill(dead, 0.0)).masked_fill(dead, -torch.inf if log else 0.0)


def definition(
    input: Tensor,
    dim: int,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
) -> Tensor:
    """softmax written down, in the dtype of its input (the truth of dtype= is that of the input as it is)."""
    x, hidden = scores(input, scale, mask, is_causal, causal_alignment)
    return _of_visible(lambda x: _written_down(x, dim, False), x, hidden, dim, False)


def log_definition(
    input: Tensor,
    dim: int,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
) -> Tensor:
    """log_softmax written down, in the dtype of its input."""
    x, hidden = scores(input, scale, mask, is_causal, causal_alignment)
    return _of_visible(lambda x: _written_down(x, dim, True), x, hidden, dim, True)


def _peer(log: bool) -> Callable[..., Tensor]:
    def peer(
        input: Tensor,
        dim: int,
        dtype: torch.dtype | None = None,
        *,
        scale: float = 1.0,
        mask: Tensor | None = None,
        is_causal: bool = False,
        causal_alignment: str = "top_left",
    ) -> Tensor:
        """torch's function of scores made in the input's dtype."""
        function = F.log_softmax if log else F.softmax
        x, hidden = scores(input, scale, mask, is_causal, causal_alignment)
        return _of_visible(lambda x: function(x, dim, dtype=dtype), x, hidden, dim, log)

    return peer


def _contiguous(s: Sampler, *shape: int) -> Tensor:
    return s.normal(*shape, std=2.0)


def _permuted(s: Sampler, *shape: int) -> Tensor:
    """The first dimension is the innermost in memory."""
    return s.normal(*shape[1:], shape[0]).movedim(-1, 0)


def _some_minus_inf(s: Sampler, *shape: int) -> Tensor:
    """A third of the entries are -inf, never a whole row or column."""
    strange = s.chance(*shape, p=0.3)
    strange[..., 0], strange[0] = False, False
    return s.normal(*shape).masked_fill(strange, -torch.inf)


def _dead_row(rows: int, columns: int) -> Callable[[Sampler], Tensor]:
    """A mask whose second row hides everything."""

    def build(s: Sampler) -> Tensor:
        mask = s.chance(rows, columns, p=0.7)
        mask[1] = False
        return mask

    return build


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
        "strided rows": (strided_rows, (12, 70)),
        "strided rows of 3 dims": (strided_rows, (3, 12, 70)),
        "transposed": (transposed, (12, 70)),
        "permuted": (_permuted, (4, 6, 50)),
        "expanded": (same_columns, (12, 70)),
    }
    for name, (draw, shape) in layouts.items():
        for dim in (-1, 0):
            yield Case(f"{name}, dim {dim}", _build(shape, dim=dim, draw=draw), core=name == "permuted")
    for shape, dim in (((0, 5), 1), ((5, 0), 1), ((5, 0), 0), ((2, 0, 3), 2)):
        yield Case(f"empty {'x'.join(map(str, shape))} dim {dim}", _build(shape, dim=dim))

    def featured(
        *shape: int,
        dim: int = -1,
        mask: Callable[[Sampler], Tensor] | None = None,
        dtype: torch.dtype | None = None,
        **call: Any,
    ) -> Callable[[Sampler], Arguments]:
        def build(s: Sampler) -> Arguments:
            arguments = _build(shape, dim, dtype=dtype)(s)
            return {**arguments, **call} if mask is None else {**arguments, "mask": mask(s), **call}

        return build

    def some(*shape: int, p: float = 0.7) -> Callable[[Sampler], Tensor]:
        return lambda s: s.chance(*shape, p=p)

    def added(*shape: int, dtype: torch.dtype | None = None) -> Callable[[Sampler], Tensor]:
        return lambda s: s.normal(*shape, dtype=dtype)

    both = ("input", "mask")
    yield Case("scale", featured(20, 90, scale=0.3), core=True)
    yield Case("negative scale", featured(20, 90, scale=-1.5))
    yield Case("scale, dim 0", featured(20, 90, dim=0, scale=0.3))
    yield Case("scale, to float32", featured(20, 90, scale=0.3, dtype=torch.float32))
    yield Case("bool mask", featured(2, 3, 12, 70, mask=some(2, 3, 12, 70)), core=True)
    yield Case("bool mask of columns", featured(2, 3, 12, 70, mask=some(2, 1, 1, 70), scale=0.125), core=True)
    yield Case("bool mask of rows", featured(2, 3, 12, 70, mask=some(3, 12, 1)))
    yield Case("bool mask, dim 1", featured(2, 9, 30, dim=1, mask=some(9, 30)))
    yield Case("transposed bool mask", featured(12, 70, mask=lambda s: s.chance(70, 12).t()))
    yield Case("bool mask of long rows", featured(3, 4099, mask=some(4099)))
    yield Case("mask of one number", featured(12, 70, mask=some(p=1.0)))
    yield Case("mask", featured(2, 3, 12, 70, mask=added(2, 3, 12, 70)), both, core=True)
    yield Case("mask of heads", featured(2, 3, 12, 70, mask=added(3, 1, 70), scale=0.3), both, core=True)
    yield Case("mask of rows", featured(2, 3, 12, 70, mask=added(2, 1, 12, 1)), ("input",))
    yield Case("float32 mask", featured(2, 12, 70, mask=added(12, 70, dtype=torch.float32)), both)
    yield Case("float32 mask, dim 0", featured(12, 70, dim=0, mask=added(12, 1, dtype=torch.float32)), both)
    for alignment in ("top_left", "bottom_right"):
        causal: dict[str, Any] = {"is_causal": True, "causal_alignment": alignment}
        for rows, columns in ((40, 40), (33, 70), (70, 33)):
            yield Case(f"causal {alignment} {rows}x{columns}", featured(2, rows, columns, **causal), core=rows == 70)
        yield Case(
            f"causal {alignment} scale mask", featured(2, 3, 12, 70, scale=0.3, mask=added(2, 1, 1, 70), **causal), both
        )

        # Longer than registers hold: read twice, in parts.
        long = (2, 3, 9001)
        yield Case(f"long rows causal {alignment}", featured(*long, **causal))
        yield Case(f"long rows causal {alignment} bool mask", featured(*long, mask=_dead_row(*long[1:]), **causal),
                   core=alignment == "bottom_right")  # fmt: skip
        yield Case(
            f"long rows causal {alignment} mask", featured(*long, mask=added(2, 1, 9001), scale=-0.5, **causal), both
        )
    for repeats in ((2, 1, 3, 1, 2, 1, 3, 5), (1, 3, 1, 2, 1, 3, 1, 1), (2, 3, 1, 2, 2, 1, 3, 5)):
        grad = both if repeats[-1] > 1 else ("input",)  # what is added to whole rows has a gradient of 0
        yield Case(
            f"mask of 8 dims {'x'.join(map(str, repeats))}",
            featured(2, 3, 3, 2, 2, 3, 3, 5, mask=added(*repeats)),
            grad,
            core=repeats[-1] == 1,
        )

    def dead_rows(s: Sampler) -> Arguments:
        mask = s.chance(6, 40)
        mask[1], mask[4] = False, False
        return {"input": s.normal(3, 6, 40), "dim": -1, "mask": mask}

    yield Case("rows that see nothing", dead_rows, core=True)

    def smallest(s: Sampler) -> Arguments:
        """Many models write "not visible" as the smallest number."""
        hidden = s.normal(6, 40).masked_fill(s.chance(6, 40), torch.finfo(s.dtype).min)
        return {"input": s.normal(3, 6, 40), "dim": -1, "mask": hidden}

    yield Case("mask of the smallest number", smallest)

    def nan_in_rows(s: Sampler) -> Arguments:
        arguments = dead_rows(s)
        arguments["input"][0, 1, 3], arguments["input"][0, 2, :], arguments["input"][1, 3, 5] = (
            torch.nan,
            torch.nan,
            torch.inf,
        )
        arguments["mask"][3, 5] = True
        return arguments

    yield Case("NaN and infinities under a mask", nan_in_rows, differentiable=())
    yield Case("no rows under a mask", featured(0, 5, mask=some(5)))
    yield Case("no columns under a mask", featured(5, 0, mask=some(5, 1)))


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


def causal_workload(batch: int, rows: int, *, quick: bool = False) -> Workload:
    """Scaled causal scores, as attention that is not fused has them: half of them are visible."""
    size = batch * rows * rows
    return Workload(
        f"{batch}x{rows}x{rows} scaled causal",
        lambda s: {"input": s.normal(batch, rows, rows, std=2.0), "dim": -1, "scale": 0.125, "is_causal": True},
        forward_flops=3 * size,
        backward_flops=2 * size,
        forward_elements=3 * size // 2,
        backward_elements=2 * size,
        quick=quick,
    )


WORKLOADS = (
    workload(4096, 768, quick=True),
    workload(8192, 1024),
    workload(4096, 4096),
    workload(512, 32768, quick=True),
    workload(1024, 50304),
    causal_workload(12, 1024),
)

SUITES = (
    Suite(
        name="softmax",
        function=softmax,
        truth=definition,
        peer=_peer(False),
        differentiable=("input",),
        results=("output",),
        cases=tuple(replace(case, draws=8) for case in _cases(log=False)),
        workloads=WORKLOADS,
    ),
    Suite(
        name="log_softmax",
        function=log_softmax,
        truth=log_definition,
        peer=_peer(True),
        differentiable=("input",),
        results=("output",),
        cases=tuple(replace(case, draws=8) for case in _cases(log=True)),
        workloads=WORKLOADS,
    ),
)
