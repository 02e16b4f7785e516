"""Sample problems and workloads of cross entropy; torch's own function in float64 is its truth.

Which rows count, what the mean divides by and how smoothing meets weights is torch's to say; what is measured here is
how precisely that is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.cases import Arguments, Case, Sampler, Suite, Workload
from fastattn.layouts import strided_rows
from fastattn.ops.cross_entropy.op import cross_entropy

Draw = Callable[..., Tensor]
REDUCTIONS = ("mean", "sum", "none")


def peer(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    z_loss: float = 0.0,
    return_z_loss: bool = False,
    softcap: float = 0.0,
    **call: Any,
) -> Any:
    """torch's cross_entropy, which wants int64 indices and the input's dtype; z_loss and softcap around it."""
    target = target if target.is_floating_point() else target.to(torch.int64)
    weight = None if weight is None else weight.to(input.dtype)
    x = softcap * (input / softcap).tanh() if softcap else input
    loss = F.cross_entropy(x, target, weight, **call)
    if not z_loss and not return_z_loss:
        return loss
    squares = z_loss * torch.logsumexp(x, 0 if x.ndim == 1 else 1).square()
    total: Any = squares.numel()
    if not target.is_floating_point():
        ignored = target == call.get("ignore_index", -100)
        squares = squares.masked_fill(ignored, 0.0)
        shares = torch.ones_like(squares) if weight is None else weight[target.masked_fill(ignored, 0)]
        total = shares.masked_fill(ignored, 0.0).sum()
    reduction = call.get("reduction", "mean")
    if reduction != "none":
        squares = squares.sum() / total if reduction == "mean" else squares.sum()
    return (loss + squares, squares.detach()) if return_z_loss else loss + squares


def _contiguous(s: Sampler, *shape: int) -> Tensor:
    return s.normal(*shape, std=2.0)


def _transposed(s: Sampler, rows: int, classes: int) -> Tensor:
    return s.normal(classes, rows).t()


def _expanded(s: Sampler, rows: int, classes: int) -> Tensor:
    return s.normal(1, classes).expand(rows, classes)


def _indices(
    s: Sampler, shape: tuple[int, ...], ignored: int | None = None, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Class numbers for logits of this shape; with `ignored`, a quarter of them are that number."""
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = s.integers(*rows, high=shape[min(len(shape) - 1, 1)], dtype=dtype)
    if ignored is not None:
        target = target.masked_fill(s.chance(*rows, p=0.25), ignored)
    return target


def _probabilities(s: Sampler, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    dim = 0 if len(shape) == 1 else 1
    return torch.softmax(s.normal(*shape, dtype=torch.float32), dim).to(s.dtype if dtype is None else dtype)


def _build(
    shape: tuple[int, ...],
    *,
    probabilities: bool = False,
    probability_dtype: torch.dtype | None = None,
    weight: bool = False,
    weight_dtype: torch.dtype | None = None,
    unweighted: bool = False,
    ignored: int | None = None,
    target_dtype: torch.dtype = torch.int64,
    draw: Draw = _contiguous,
    **call: Any,
) -> Callable[[Sampler], Arguments]:
    """unweighted: of every third class the weight is 0."""
    classes = shape[min(len(shape) - 1, 1)]

    def build(s: Sampler) -> Arguments:
        arguments: Arguments = {"input": draw(s, *shape), **call}
        if probabilities:
            arguments["target"] = _probabilities(s, shape, probability_dtype)
        else:
            arguments["target"] = _indices(s, shape, ignored, target_dtype)
        if weight:
            arguments["weight"] = s.uniform(classes, low=0.1, high=2.0, dtype=weight_dtype)
            if unweighted:
                arguments["weight"][::3] = 0.0
        if ignored is not None:
            arguments["ignore_index"] = ignored
        return arguments

    return build


LOGITS = ("input",)
LOGITS_AND_TARGET = ("input", "target")


def _cases() -> Iterator[Case]:
    for classes in (2, 3, 15, 16, 17, 33, 64, 100, 127, 257, 1000, 4099):
        yield Case(f"{classes} classes", _build((9, classes)), core=classes in (3, 33, 4099))
    yield Case("1 class", _build((9, 1)), differentiable=())
    yield Case("large vocabulary", _build((6, 50304)), core=True)
    yield Case("large vocabulary, smoothing", _build((6, 50257), label_smoothing=0.1))
    yield Case("many rows", _build((3000, 11)), core=True)
    yield Case("1 row", _build((1, 200)))
    yield Case("one dim", _build((50,)), draws=64)
    yield Case("one dim, no reduction", _build((50,), reduction="none"))
    yield Case("one dim of probabilities", _build((50,), probabilities=True), LOGITS_AND_TARGET, draws=64)
    for reduction, smoothing, weight, ignored in itertools.product(
        REDUCTIONS, (0.0, 0.2), (False, True), (None, -100, 3)
    ):
        words = [reduction]
        words += ["smoothing"] if smoothing else []
        words += ["weight"] if weight else []
        words += [f"ignoring {ignored}"] if ignored is not None else []
        yield Case(
            " ".join(words),
            _build((24, 19), reduction=reduction, label_smoothing=smoothing, weight=weight, ignored=ignored),
            core=ignored == 3 and bool(smoothing) == weight,
        )
    for reduction, smoothing, weight in itertools.product(REDUCTIONS, (0.0, 0.2), (False, True)):
        words = [reduction]
        words += ["smoothing"] if smoothing else []
        words += ["weight"] if weight else []
        yield Case(
            f"probabilities {' '.join(words)}",
            _build((24, 19), probabilities=True, reduction=reduction, label_smoothing=smoothing, weight=weight),
            differentiable=LOGITS_AND_TARGET,
            core=bool(smoothing) and weight,
        )
    yield Case(
        "float32 probabilities",
        _build((24, 19), probabilities=True, probability_dtype=torch.float32),
        differentiable=LOGITS_AND_TARGET,
    )
    yield Case("full smoothing", _build((24, 19), label_smoothing=1.0))
    for reduction in REDUCTIONS:
        yield Case(f"3 dims {reduction}", _build((4, 7, 9), reduction=reduction, ignored=2, weight=True))
    yield Case("4 dims", _build((2, 7, 3, 5), label_smoothing=0.1), core=True)
    yield Case("4 dims of probabilities", _build((2, 7, 3, 5), probabilities=True), differentiable=LOGITS_AND_TARGET)
    yield Case("int32 targets", _build((24, 19), target_dtype=torch.int32))
    yield Case("uint8 targets", _build((24, 19), target_dtype=torch.uint8))
    yield Case("float32 weight", _build((24, 19), weight=True, weight_dtype=torch.float32))
    combinations: tuple[dict[str, Any], ...] = ({"z_loss": 0.05}, {"softcap": 5.0}, {"z_loss": 0.05, "softcap": 5.0})
    for features in combinations:
        name = " ".join(features)
        for reduction in REDUCTIONS:
            yield Case(f"{name} {reduction}", _build((24, 19), reduction=reduction, ignored=3, **features), core=True)
        yield Case(
            f"{name} smoothing weight",
            _build((24, 19), label_smoothing=0.2, weight=True, ignored=-100, **features),
        )
        yield Case(
            f"{name} probabilities",
            _build((24, 19), probabilities=True, label_smoothing=0.2, weight=True, **features),
            LOGITS_AND_TARGET,
            core=True,
        )
        yield Case(f"{name} large vocabulary", _build((6, 50304), **features))
        yield Case(f"{name} 3 dims", _build((4, 7, 9), **features))
        yield Case(f"{name} strided rows", _build((12, 70), draw=strided_rows, **features))
        yield Case(f"{name} large logits", _build((24, 90), draw=lambda s, *n: s.normal(*n, std=50.0), **features))
    # Longer than registers hold: read in parts.
    combined: dict[str, dict[str, Any]] = {
        "smoothing z_loss": {"label_smoothing": 0.2, "z_loss": 0.1, "ignored": -100},
        "softcap sum": {"softcap": 5.0, "reduction": "sum", "ignored": -100},
        "smoothing softcap probabilities": {"label_smoothing": 0.1, "softcap": 3.0, "probabilities": True},
    }
    for name, features in combined.items():
        yield Case(
            f"long rows, weights of 0, {name}", _build((6, 5000), weight=True, unweighted=True, **features),
            LOGITS_AND_TARGET if "probabilities" in features else None, core=name == "smoothing z_loss",
        )  # fmt: skip
    yield Case("weights of 0", _build((24, 19), weight=True, unweighted=True, label_smoothing=0.2), core=True)
    # So far from zero that lse is too coarse for their probabilities.
    yield Case("long rows far above zero", _build((6, 5000), draw=lambda s, *n: s.normal(*n, mean=3000.0, std=2.0)))
    yield Case("z_loss returned", _build((24, 19), ignored=3, z_loss=0.05, return_z_loss=True))
    yield Case("z_loss returned none", _build((24, 19), ignored=3, z_loss=0.05, return_z_loss=True, reduction="none"))
    yield Case("strided rows", _build((12, 70), draw=strided_rows), core=True)
    yield Case("transposed", _build((12, 70), draw=_transposed))
    yield Case("expanded", _build((12, 70), draw=_expanded))
    yield Case("large logits", _build((24, 90), draw=lambda s, *n: s.normal(*n, std=50.0)), core=True)
    yield Case("logits far from zero", _build((24, 90), draw=lambda s, *n: s.normal(*n, mean=-1000.0)))
    yield Case("no rows, sum", _build((0, 5), reduction="sum"))
    yield Case("no rows, none", _build((0, 5), reduction="none"))
    yield Case("no rows, mean", _build((0, 5)))

    def all_ignored(reduction: str) -> Callable[[Sampler], Arguments]:
        def build(s: Sampler) -> Arguments:
            return {**_build((8, 19), reduction=reduction)(s), "target": torch.full((8,), 4), "ignore_index": 4}

        return build

    yield Case("all ignored, sum", all_ignored("sum"))
    yield Case("all ignored, none", all_ignored("none"), core=True)
    yield Case("all ignored, mean", all_ignored("mean"), differentiable=())  # 0 / 0, as torch's

    def no_weight(classes: int) -> Callable[[Sampler], Arguments]:
        """A mean that divides by 0: rows that count have NaN for gradients, ignored ones 0."""

        def build(s: Sampler) -> Arguments:
            arguments = _build((9, classes), weight=True, unweighted=True)(s)
            return {
                **arguments,
                "target": (s.integers(9, high=3) * 3).index_fill(0, torch.tensor([2, 7], device=s.device), -100),
            }

        return build

    for classes in (19, 5000):
        yield Case(f"targets of no weight, {classes} classes", no_weight(classes))

    def minus_inf(s: Sampler) -> Arguments:
        """Impossible classes that are nobody's target, and one that is: its loss is infinite."""
        x, target = s.normal(12, 30), s.integers(12, high=15)
        x[:, 20:25] = -torch.inf
        target[5] = 21
        return {"input": x, "target": target, "reduction": "none"}

    yield Case("-inf logits", minus_inf, core=True)

    def nan_row(s: Sampler) -> Arguments:
        arguments = _build((12, 30), reduction="none")(s)
        arguments["input"][3, 4] = torch.nan
        return arguments

    yield Case("NaN in a row", nan_row)


def workload(rows: int, classes: int, *, quick: bool = False, **features: Any) -> Workload:
    size = rows * classes
    return Workload(
        " ".join((f"{rows}x{classes}", *features)),
        _build((rows, classes), **features),
        forward_flops=4 * size,
        backward_flops=3 * size,
        forward_elements=size,
        backward_elements=2 * size,
        quick=quick,
    )


WORKLOADS = (
    workload(4096, 1024, quick=True),
    workload(1024, 50304, quick=True),
    workload(4096, 32768),
    workload(1024, 50304, z_loss=1e-4),
    workload(1024, 50304, softcap=30.0),
)

SUITES = (
    Suite(
        name="cross_entropy",
        function=cross_entropy,
        truth=peer,
        peer=peer,
        differentiable=LOGITS,
        results=("loss", "z_loss"),
        # One number is right or wrong by luck; eight of them have an error.
        cases=tuple(replace(case, draws=max(case.draws, 8)) for case in _cases()),
        workloads=WORKLOADS,
    ),
)
