"""Sample problems and workloads of linear_cross_entropy; torch's linear and cross entropy in float64 are its truth.

torch's own linear_cross_entropy is no peer for the truth: without `options` it forgets ignore_index.
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
from fastattn.layouts import contiguous, strided_rows, transposed
from fastattn.ops.linear_cross_entropy.op import linear_cross_entropy

Draw = Callable[..., Tensor]


def peer(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    **call: Any,
) -> Tensor:
    """The definition: logits in the input's dtype, then torch's cross entropy."""
    logits = F.linear(input, linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten())
    logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    target = target if target.is_floating_point() else target.to(torch.int64)
    weight = None if weight is None else weight.to(logits.dtype)
    return F.cross_entropy(logits, target, weight, ignore_index=-100 if ignore_index is None else ignore_index, **call)


def _build(
    shape: tuple[int, ...],
    classes: int,
    *,
    positions: tuple[int, ...] = (),
    bias: bool = False,
    weight: bool = False,
    probabilities: bool = False,
    ignored: int | None = None,
    target_dtype: torch.dtype = torch.int64,
    draw: Draw = contiguous,
    std: float = 2.0,
    **call: Any,
) -> Callable[[Sampler], Arguments]:
    def build(s: Sampler) -> Arguments:
        inner = shape[-1]
        arguments: Arguments = {
            "input": draw(s, *shape),
            "linear_weight": draw(s, classes, *positions, inner, std=std / max(inner, 1) ** 0.5),
            **call,
        }
        if probabilities:
            logits = s.normal(*shape[:-1], classes, *positions, dtype=torch.float32)
            arguments["target"] = torch.softmax(logits, len(shape) - 1).to(s.dtype)
        else:
            rows = (*shape[:-1], *positions)
            target = s.integers(*rows, high=classes, dtype=target_dtype)
            arguments["target"] = target if ignored is None else target.masked_fill(s.chance(*rows, p=0.25), ignored)
        if ignored is not None:
            arguments["ignore_index"] = ignored
        if bias:
            arguments["linear_bias"] = s.normal(classes, *positions)
        if weight:
            arguments["weight"] = s.uniform(classes, low=0.1, high=2.0)
        return arguments

    return build


PROBABILITIES = ("input", "linear_weight", "target")


def _cases() -> Iterator[Case]:
    for rows, inner, classes in ((1, 8, 5), (7, 33, 17), (24, 64, 65), (70, 50, 257), (300, 40, 100)):
        yield Case(f"{rows}x{inner} to {classes}", _build((rows, inner), classes), core=rows in (7, 70))
    yield Case("large vocabulary", _build((9, 24), 50257, bias=True), core=True)
    yield Case("several chunks", _build((2100, 12), 5, ignored=4), core=True)
    for reduction, smoothing, bias, weight in itertools.product(
        ("mean", "sum", "none"), (0.0, 0.2), (False, True), (False, True)
    ):
        words = [reduction]
        words += ["smoothing"] if smoothing else []
        words += ["bias"] if bias else []
        words += ["weight"] if weight else []
        yield Case(
            " ".join(words),
            _build((24, 30), 19, reduction=reduction, label_smoothing=smoothing, bias=bias, weight=weight, ignored=3),
            core=bias and weight,
        )
    for reduction, smoothing in itertools.product(("mean", "sum", "none"), (0.0, 0.2)):
        yield Case(
            f"probabilities {reduction}{' smoothing' if smoothing else ''}",
            _build((24, 30), 19, probabilities=True, reduction=reduction, label_smoothing=smoothing, weight=True),
            PROBABILITIES,
            core=bool(smoothing),
        )
    yield Case("full smoothing", _build((24, 30), 19, label_smoothing=1.0))
    yield Case("1 row without a batch", _build((30,), 19, bias=True), draws=32)
    yield Case("no batch, none", _build((30,), 19, reduction="none"), draws=32)
    for reduction in ("mean", "sum", "none"):
        yield Case(
            f"positions {reduction}",
            _build((12, 30), 19, positions=(2, 3), bias=True, weight=True, ignored=2, reduction=reduction),
            core=reduction == "mean",
        )
    yield Case("positions of probabilities", _build((12, 30), 9, positions=(2,), probabilities=True), PROBABILITIES)

    def no_weight(s: Sampler) -> Arguments:
        """A mean that divides by 0."""
        arguments = _build((9, 30), 19, weight=True)(s)
        arguments["weight"][::3] = 0.0
        return {**arguments, "target": s.integers(9, high=3) * 3}

    yield Case("targets of no weight", no_weight, core=True)
    yield Case("int32 targets", _build((24, 30), 19, target_dtype=torch.int32))
    yield Case("rows of a larger tensor", _build((24, 30), 40, draw=strided_rows), core=True)
    yield Case("transposed", _build((24, 30), 40, draw=transposed))
    yield Case("large logits", _build((24, 30), 90, std=30.0))
    yield Case("gradient of the input only", _build((24, 30), 40), differentiable=("input",))
    yield Case("gradient of the weight only", _build((24, 30), 40, reduction="none"), differentiable=("linear_weight",))
    yield Case("no rows, sum", _build((0, 5), 7, reduction="sum"), core=True)
    yield Case("no rows, none", _build((0, 5), 7, reduction="none"))
    yield Case("no inputs", _build((6, 0), 7))


def workload(rows: int, inner: int, classes: int, *, quick: bool = False) -> Workload:
    product = 2 * rows * inner * classes
    elements = rows * inner + inner * classes
    return Workload(
        f"{rows}x{inner}->{classes}",
        _build((rows, inner), classes),
        forward_flops=product,
        backward_flops=2 * product,
        forward_elements=elements,
        backward_elements=2 * elements,
        quick=quick,
    )


#: A character model's head, which comes first because it is cheap, GPT-2's at 1024 tokens, and a small model's with a
#: large vocabulary.
WORKLOADS = (
    workload(3072, 384, 65, quick=True),
    workload(1024, 768, 50304),
    workload(2048, 256, 50304),
    workload(512, 256, 8192, quick=True),
)

SUITES = (
    Suite(
        name="linear_cross_entropy",
        function=linear_cross_entropy,
        truth=peer,
        peer=peer,
        differentiable=("input", "linear_weight", "linear_bias"),
        results=("loss",),
        # One number is right or wrong by luck; eight of them have an error.
        cases=tuple(replace(case, draws=max(case.draws, 8)) for case in _cases()),
        workloads=WORKLOADS,
    ),
)
