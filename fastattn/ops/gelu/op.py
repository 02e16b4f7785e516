"""GELU of input + bias: the public function and the op's contract.

GELU(x) = x Phi(x), Phi the distribution function of the standard normal (Hendrycks and Gimpel 2016, section 2), or
with Phi(x) taken as (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 or as sigmoid(1.702 x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastattn.activations import ActivationProblem, activation_op, check, compute, facts
from fastattn.dispatch import Op

#: By number, as the torch ops take them.
APPROXIMATIONS = ("none", "tanh", "sigmoid")
_FORMS = {name: (number,) for number, name in enumerate(APPROXIMATIONS)}


@dataclass(frozen=True)
class GeluProblem(ActivationProblem):
    approximate: str


OP = activation_op("gelu", "int approximate")


def _problem(input: Tensor, approximate: str, bias: Tensor | None) -> GeluProblem:
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"gelu: approximate must be one of {APPROXIMATIONS}, got {approximate!r}")
    check("gelu", input, bias)
    return GeluProblem(approximate=approximate, **facts(input, bias))


def gelu(input: Tensor, approximate: str = "none", *, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """torch.nn.functional.gelu, optionally of input + bias in one pass.

    Args:
        input: any shape and strides, float32, bfloat16, float16 or float64.
        approximate: "none": x Phi(x) by the error function; "tanh": the approximation by tanh; "sigmoid":
            x sigmoid(1.702 x), which is CLIP's "quick" GELU and none of torch's.
        bias: (columns,), added along the last dimension before the activation, any floating dtype. The sum is float32
            (float64 for float64) and is not rounded in between.
        backend: serve with this backend or raise BackendUnsupported.

    Returns: contiguous, the input's shape and dtype. The bias' gradient is accumulated in float32.
    Raises: ValueError for shapes, dtypes, devices or an approximation that do not fit.
    """
    return compute(OP, lambda: _problem(input, approximate, bias), input, bias, backend, _FORMS.get(approximate))


def _prepare(
    input: Tensor, approximate: str = "none", *, bias: Tensor | None = None, **_: Any
) -> tuple[Op, GeluProblem]:
    return OP, _problem(input, approximate, bias)


gelu.prepare = _prepare  # type: ignore[attr-defined]
