"""Sample problems and workloads of linear; torch's own linear and activation in float64 are its truth."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.cases import Arguments, Case, Sampler, Suite, Workload
from fastattn.layouts import contiguous, strided_rows, transposed
from fastattn.ops.linear.op import ACTIVATIONS, linear

Draw = Callable[..., Tensor]


def peer(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """torch's linear, then torch's activation."""
    output = F.linear(input, weight, bias)
    if activation is None:
        return output
    if activation == "relu":
        return F.relu(output)
    return F.gelu(output, approximate="tanh" if activation == "gelu_tanh" else "none")


def _expanded(s: Sampler, *shape: int, std: float = 1.0) -> Tensor:
    return s.normal(*shape[1:], std=std).expand(shape)


def _every_other(s: Sampler, *shape: int, std: float = 1.0) -> Tensor:
    return s.normal(*shape[:-1], 2 * shape[-1], std=std)[..., ::2]


def _build(
    shape: tuple[int, ...],
    out: int,
    *,
    bias: bool = True,
    input: Draw = contiguous,
    weight: Draw = contiguous,
    std: float = 1.0,
    **call: Any,
) -> Callable[[Sampler], Arguments]:
    inner = shape[-1]

    def build(s: Sampler) -> Arguments:
        arguments: Arguments = {
            "input": input(s, *shape),
            "weight": weight(s, out, inner, std=std / max(inner, 1) ** 0.5),
            **call,
        }
        if bias:
            arguments["bias"] = s.normal(out)
        return arguments

    return build


def _cases() -> Iterator[Case]:
    # Around the sizes of registers, tiles, panels and blocks.
    for rows, inner, out in (
        (1, 1, 1), (1, 64, 5), (2, 3, 7), (3, 16, 17), (5, 33, 24), (6, 64, 64), (7, 65, 63), (13, 31, 65),
        (25, 257, 129), (97, 128, 100), (70, 513, 200),
    ):  # fmt: skip
        core = (rows, inner, out) in ((1, 64, 5), (7, 65, 63), (70, 513, 200))
        few = 8 if rows * out < 256 else 1
        yield Case(f"{rows}x{inner} to {out}", _build((rows, inner), out), draws=few, core=core)
    yield Case("many rows", _build((1100, 40), 24), core=True)
    yield Case("many inputs", _build((9, 3000), 33))
    yield Case("many outputs", _build((9, 40), 1700))
    for activation, bias in itertools.product(ACTIVATIONS, (False, True)):
        name = f"{activation or 'no activation'}, {'bias' if bias else 'no bias'}"
        yield Case(name, _build((37, 70), 83, bias=bias, activation=activation), core=bias)
    for activation in ACTIVATIONS[1:]:
        yield Case(f"{activation} far from zero", _build((17, 40), 50, std=12.0, activation=activation))
    yield Case("1 dim", _build((50,), 20), draws=8)
    yield Case("3 dims", _build((2, 7, 50), 20, activation="gelu"), core=True)
    yield Case("4 dims", _build((2, 3, 5, 20), 12))
    yield Case(
        "rows of a larger tensor",
        _build((4, 6, 30), 20, input=strided_rows, weight=strided_rows),
        core=True,
    )
    yield Case("odd rows of a larger tensor", _build((6, 31), 21, input=strided_rows, weight=strided_rows))
    yield Case("every other element", _build((6, 30), 20, input=_every_other, weight=_every_other))
    yield Case("transposed weight", _build((26, 70), 90, weight=transposed), core=True)
    yield Case("transposed input", _build((26, 70), 90, input=transposed))
    yield Case("expanded input", _build((5, 6, 70), 40, input=_expanded))
    yield Case("large and small", _build((20, 100), 40, std=1e4))

    def vector_weight(s: Sampler) -> Arguments:
        return {"input": s.normal(6, 9, 50), "weight": s.normal(50), "bias": s.normal(1).reshape(())}

    yield Case("vector weight", vector_weight, draws=16, core=True)
    yield Case("gradient of the input only", _build((17, 30), 20, activation="gelu"), differentiable=("input",))
    yield Case("gradient of the weight only", _build((17, 30), 20), differentiable=("weight",), core=True)
    yield Case("gradient of the bias only", _build((17, 30), 20, activation="relu"), differentiable=("bias",))
    for name, shape, out in (("no rows", (0, 5), 3), ("no inputs", (4, 0), 3), ("no outputs", (4, 5), 0)):
        yield Case(name, _build(shape, out, activation="gelu_tanh"), core=True)

    def not_finite(s: Sampler) -> Arguments:
        arguments = _build((13, 35), 70, activation="relu")(s)
        arguments["input"][3, 4] = torch.nan
        arguments["input"][7, 34] = torch.inf
        return arguments

    yield Case("NaN and infinity in rows", not_finite, differentiable=(), core=True)


def workload(rows: int, inner: int, outer: int, *, quick: bool = False) -> Workload:
    product = 2 * rows * inner * outer
    elements = rows * inner + inner * outer + rows * outer
    return Workload(
        f"{rows}x{inner}->{outer}",
        _build((rows, inner), outer),
        forward_flops=product,
        backward_flops=2 * product,
        forward_elements=elements,
        backward_elements=2 * elements,
        quick=quick,
    )


#: The projections of GPT-2 124M at 1024 tokens, and of a model of 10M parameters at 3072.
WORKLOADS = (
    workload(1, 768, 3072, quick=True),
    workload(1024, 768, 2304),
    workload(1024, 768, 768, quick=True),
    workload(1024, 768, 3072, quick=True),
    workload(1024, 3072, 768, quick=True),
    workload(1024, 768, 50304),
    workload(3072, 384, 384, quick=True),
    workload(3072, 384, 1536),
    workload(3072, 1536, 384),
)

SUITES = (
    Suite(
        name="linear",
        function=linear,
        truth=peer,
        peer=peer,
        differentiable=("input", "weight", "bias"),
        results=("output",),
        cases=tuple(_cases()),
        workloads=WORKLOADS,
    ),
)
